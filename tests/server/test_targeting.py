"""Targeting in the database: selectors as queries, rings, excludes and floors of real rollouts, and explaining them."""

import io
import json
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from hypothesis import HealthCheck, given, settings

from device_sdk.protocol.abilities import Abilities
from device_sdk.protocol.events import COMMITTED, DOWNLOADING, FAILED
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.polls import EnrolRequest
from fleet.audit.models import AuditEntry
from fleet.devices import matching, selection
from fleet.devices import services as devices_services
from fleet.devices.models import Device, Group
from fleet.devices.selection import Selector
from fleet.errors import Invalid
from fleet.releases.models import Release, Variant
from fleet.rollouts import policy, selectors, services, snapshots, targeting
from fleet.rollouts.models import Outcome, Rollout
from fleet.rollouts.services import StagePlan
from tests.fleet_world import (
    api_token,
    completed,
    device,
    enrolment_token,
    event,
    group,
    operator,
    post,
    release,
    running,
    superuser,
    viewer,
)
from tests.server.test_selection import selectors as random_selectors

pytestmark = pytest.mark.django_db
LABELS: list[dict[str, str]] = [
    {}, {"site": "berlin"}, {"site": "paris", "hw": "pi"}, {"0": "x", "a.b": "", "in": "in"}, {"hw": 'q"uo\\te'},
]  # fmt: skip


def gives(row: Device) -> str | None:
    """The version that the device should run now."""
    row.refresh_from_db()
    (answer,) = selectors.assignments_for(row)
    return answer.release.version if answer.release else None


def require(made: Release, **floors: Any) -> Release:
    Variant.objects.filter(release=made).update(requires=floors)
    return made


# --- selectors as queries ----------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(selector=random_selectors)
def test_the_database_finds_the_devices_that_a_selector_matches(selector: Selector) -> None:
    if not Device.objects.exists():
        for number, labels in enumerate(LABELS):
            device(f"d{number}", labels=labels)
    check_query(selector)


@pytest.mark.parametrize(
    "text", ["site", "!site", "site=berlin", "site!=berlin", "0=x", "a.b", 'a.b=""', "in in (in)", "hw!=pi",
             'hw="q\\"uo\\\\te"', "@name in (d1, d2), site", "@name!=d0", "!@name"],
)  # fmt: skip
def test_single_requirements_are_queries_too(text: str) -> None:
    for number, labels in enumerate(LABELS):
        device(f"d{number}", labels=labels)
    check_query(selection.parse(text))


def check_query(selector: Selector) -> None:
    found = set(Device.objects.filter(matching.where(selector)).values_list("name", flat=True))
    assert found == {row.name for row in Device.objects.all() if selector.matches(row.labels, row.name)}


def test_a_group_is_counted_by_one_query(django_assert_num_queries: Any) -> None:
    device("a", labels={"site": "berlin"})
    with django_assert_num_queries(1):
        assert matching.chosen(selection.parse("site in (berlin, paris), !lab")).count() == 1


def test_the_old_form_of_a_group_becomes_a_text() -> None:
    migration = import_module("fleet.devices.migrations.0003_selectors_and_abilities")
    row = SimpleNamespace(chosen={"site": ["a", "b c"], "hw": ["x"]}, save=lambda **_: None)
    old = SimpleNamespace(get_model=lambda *_: SimpleNamespace(objects=SimpleNamespace(all=lambda: [row])))
    migration.to_text(old, None)
    assert row.selector == 'site in (a, "b c"), hw=x'
    row.chosen = None
    migration.to_json(old, None)
    assert row.chosen == {"site": ["a", "b c"], "hw": ["x"]}


# --- rings and excludes ------------------------------------------------------------------------------------------


def test_a_ring_goes_first_whatever_its_cohort_and_stays_in_later_stages() -> None:
    canary = group("canary", tier=["canary"])
    first, other = device("a", labels={"tier": "canary"}), device("b")
    stages = [
        StagePlan(ring=canary, min_reports=0, success_threshold=0),
        StagePlan(percent=0.01),
        StagePlan(percent=100),
    ]
    rollout = running(release("1.0.0"), stages=stages)
    assert (gives(first), gives(other)) == ("1.0.0", None)
    services.tick()
    rollout.refresh_from_db()
    assert rollout.stage_index == 1
    assert (gives(first), gives(other)) == ("1.0.0", None)
    assert [str(stage) for stage in rollout.stages.all()] == ["ring canary", "0.01 %", "100 %"]
    assert selectors.progress(rollout).admitted == 1


def test_a_device_that_joins_a_ring_or_a_group_later_gets_the_release_at_the_stage_in_force() -> None:
    canary = group("canary", tier=["canary"])
    running(release("1.0.0"), stages=[StagePlan(ring=canary), StagePlan(percent=100)])
    late = device("late")
    assert gives(late) is None
    devices_services.set_labels(device=late, labels={"tier": "canary"}, actor="ann")
    assert gives(late) == "1.0.0"
    assert gives(device("new", labels={"tier": "canary"})) == "1.0.0"


def test_excluded_devices_get_what_an_older_rollout_gives_them() -> None:
    completed(release("1.0.0"))
    rows = [device("a"), device("b"), device("c", labels={"lab": "yes"}), device("d", labels={"tier": "gold"})]
    rollout = running(
        release("1.1.0"), exclude="@name in (a)", exclude_group=group("labs", lab=["yes"]), selector="tier!=gold"
    )
    assert [gives(row) for row in rows] == ["1.0.0", "1.1.0", "1.0.0", "1.0.0"]
    assert selectors.progress(rollout).total == 1
    assert [row.name for row in targeting.devices(rollout)] == ["b"]


def test_an_excluded_device_is_no_laggard_of_that_rollout() -> None:
    device("a")
    running(release("1.0.0"), exclude="@name=a")
    assert list(selectors.laggards()) == []


def test_a_report_of_an_excluded_device_does_not_count() -> None:
    row = device("a")
    made = release("1.0.0")
    rollout = running(made, exclude="@name=a")
    services.note_events(row, [event(FAILED, made, rollout=rollout)])
    assert not Outcome.objects.exists()


def test_a_stored_selector_that_cannot_be_read_admits_nobody() -> None:
    row = device("a")
    rollout = running(release("1.0.0"))
    Rollout.objects.filter(pk=rollout.pk).update(exclude="site in (")
    snapshots.bump()
    assert gives(row) is None
    (told,) = selectors.explain(row)
    assert [each.detail for each in told.considered] == ["it is unreadable"]


@pytest.mark.parametrize(
    "stages",
    [
        ["canary"], ["canary", "canary", "100"], ["100", "canary"], ["5", "5", "100"], ["0", "100"], ["nobody", "100"],
        ["nan", "100"], ["ring:100", "100"],
    ],
)  # fmt: skip
def test_stages_that_make_no_sense_are_refused(stages: list[str]) -> None:
    group("canary")
    with pytest.raises(Invalid) as refused:
        draft(stages)
    assert refused.value.code == "stages_malformed"


def draft(stages: list[str]) -> Rollout:
    plans = [StagePlan(**targeting.read_stage(text)) for text in stages]
    return services.create(release=release(), group=None, stages=plans, actor="ann")


@pytest.mark.parametrize("term", ["selector", "exclude"])
def test_a_rollout_with_a_selector_that_makes_no_sense_is_refused(term: str) -> None:
    with pytest.raises(Invalid) as refused:
        services.create(release=release(), group=None, stages=[StagePlan(percent=100)], actor="a", **{term: "site="})
    assert refused.value.code == "selector_malformed"


# --- floors and variants -----------------------------------------------------------------------------------------


def test_a_device_that_cannot_run_a_release_is_not_assigned_it_and_lags_for_that_reason() -> None:
    completed(release("1.0.0"))
    row = device("a", abilities={"opset": 17}, runs={"digits": "1.0.0/default"})
    running(require(release("1.1.0"), opset=20))
    assert gives(row) == "1.0.0"
    (lag,) = selectors.laggards()
    assert (lag.why, lag.target) == ("lacks", "1.1.0")
    assert "variant default needs opset 20, has 17" in lag.detail


def test_the_opset_that_validation_read_is_a_floor_where_the_manifest_names_none() -> None:
    made = release("1.0.0")
    made.variants.update(opset=20)
    running(made)
    assert gives(device("a", abilities={"opset": 17})) is None
    assert gives(device("b")) == "1.0.0"  # says nothing: it will look itself


def test_a_device_says_what_it_can_run_at_enrolment_and_with_events() -> None:
    token = enrolment_token()[1]
    said = Abilities("1.31.0", 26, 2**30, "aarch64", ("CPUExecutionProvider",))
    row = devices_services.enrol(token=token, request=EnrolRequest("cam-9", "ab" * 16, {}, "0.1.0", said)).device
    assert Abilities.parse(Device.objects.get(pk=row.pk).abilities) == said
    assert selectors.device_facts(row).traits.arch == "aarch64"
    silent = post(event("health"))
    devices_services.record_events(row, silent, exists=lambda _: True)
    assert Abilities.parse(Device.objects.get(pk=row.pk).abilities) == said  # an older SDK says nothing
    newer = type(silent)(events=(), runs={}, sdk="0.2.0", abilities=Abilities(runtime="1.32.0"))
    devices_services.record_events(row, newer, exists=lambda _: True)
    assert Device.objects.get(pk=row.pk).abilities == {"runtime": "1.32.0"}


def test_each_device_gets_the_variant_that_it_can_run() -> None:
    made = release("1.0.0", variants=["default", "cuda"])
    Variant.objects.filter(release=made, name="cuda").update(requires={"providers": ["CUDAExecutionProvider"]})
    running(made)
    providers = {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    answers = [selectors.assignments_for(row)[0].release for row in (device("a", abilities=providers), device("b"))]
    assert [answer.variant for answer in answers if answer] == ["cuda", "default"]


def test_a_device_is_brought_through_the_floor_release_first_and_only_the_last_step_counts_as_success() -> None:
    floor = release("1.5.0")
    rollout = running(require(release("2.0.0"), release="1.5.0"))
    row = device("a")
    assert gives(row) == "1.5.0"
    (answer,) = selectors.assignments_for(row)
    assert answer.rollout == str(rollout.pk)
    for kind in (DOWNLOADING, COMMITTED):
        services.note_events(row, [event(kind, floor, rollout=rollout)])
    assert Outcome.objects.get().state == "updating"
    (answer,) = selectors.assignments_for(row, runs={"digits": "1.5.0/default"})
    assert answer.release == ReleasePath("digits", "2.0.0", "default")
    services.note_events(row, [event(FAILED, floor, rollout=rollout)])
    assert Outcome.objects.get().state == "failed"


def test_a_floor_that_was_revoked_is_a_dead_end_that_is_told() -> None:
    release("1.5.0", state=Release.State.REVOKED)
    running(require(release("2.0.0"), release="1.5.0"))
    row = device("a")
    assert gives(row) is None
    assert "must step through 1.5.0" in next(selectors.laggards()).detail


# --- explaining --------------------------------------------------------------------------------------------------


@pytest.fixture
def explained() -> Device:
    """Four rollouts: one that decides, one behind it, one that was cancelled, one for others."""
    row = device("cam-1", labels={"site": "berlin"}, runs={"digits": "1.0.0/default"})
    completed(release("1.0.0"))
    services.cancel(rollout=running(release("1.1.0")), actor="ann", comment="no")
    running(release("1.2.0"), group=group())
    running(release("1.3.0"), exclude="@name in (cam-1, cam-2)")
    return row


def test_explain_tells_every_rollout_in_order_and_its_verdict_is_the_assignment(explained: Device) -> None:
    (told,) = selectors.explain(explained)
    assert [told.assignment] == selectors.assignments_for(explained)
    assert [(each.gives, each.why, each.decides) for each in told.considered] == [
        ("1.3.0", "excluded", False), ("1.2.0", "admits", True), ("1.1.0", "not_in_force", False),
        ("1.0.0", "admits", False),
    ]  # fmt: skip
    assert told.considered[0].detail == "it excludes @name in (cam-1, cam-2)"


def test_what_is_told_of_the_past_never_changes_the_verdict(explained: Device) -> None:
    """Completed rollouts of a revoked release are told, and admit nobody."""
    Release.objects.filter(version="1.2.0").update(state=Release.State.REVOKED)
    snapshots.bump()
    (told,) = selectors.explain(explained)
    assert told.assignment == policy.desired(snapshots.current(), selectors.device_facts(explained))["digits"]
    assert [each.state for each in told.considered] == ["running", "revoked", "cancelled", "completed"]


def test_the_command_explains_a_device(explained: Device) -> None:
    said = io.StringIO()
    call_command("explain", "cam-1", "digits", stdout=said)
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("digits: runs 1.0.0/default; rollout ")
    assert [line[0] for line in lines[1:]] == [" ", ">", " ", " "]
    with pytest.raises(CommandError, match="there is no device 'cam-7'"):
        call_command("explain", "cam-7")
    with pytest.raises(CommandError, match="does not run 'wine'; its models: digits"):
        call_command("explain", "cam-1", "wine")


def test_the_api_explains_a_device(explained: Device) -> None:
    client = Client(headers={"Authorization": f"Bearer {api_token(viewer(), 'read')}"})
    (told,) = client.get(f"/api/v1/devices/{explained.pk}/explain/?model=digits").json()
    assert (told["by"], told["wants"], told["runs"]) == ("rollout", "1.2.0/default", "1.0.0/default")
    assert [each["decides"] for each in told["considered"]] == [False, True, False, False]
    assert client.get(f"/api/v1/devices/{explained.pk}/explain/?model=wine").json() == []


def test_the_devices_page_explains_it(explained: Device, client: Client) -> None:
    client.force_login(superuser())
    page = client.get(f"/admin/devices/device/{explained.pk}/change/").content.decode()
    assert "Why it runs this" in page
    assert "it excludes @name in (cam-1, cam-2)" in page


# --- the same terms at every door --------------------------------------------------------------------------------

TERMS = {"selector": "site in (berlin, paris)", "exclude": "@name=cam-9"}


def check_terms(rollout: Rollout) -> None:
    assert rollout.exclude_group is not None
    assert (rollout.selector, rollout.exclude, rollout.exclude_group.name) == (*TERMS.values(), "labs")
    assert [(stage.percent, stage.ring and stage.ring.name) for stage in rollout.stages.all()] == [
        (0.0, "canary"), (5.0, None), (100.0, None),
    ]  # fmt: skip
    detail = json.loads(AuditEntry.objects.filter(action="rollout.create").latest("pk").detail)
    assert (detail["exclude_group"], [stage["ring"] for stage in detail["stages"]]) == ("labs", ["canary", "", ""])


@pytest.fixture
def groups() -> dict[str, Group]:
    return {name: group(name, tier=[name]) for name in ("canary", "labs")}


def test_a_rollout_with_all_terms_over_the_api(groups: dict[str, Group]) -> None:
    client = Client(headers={"Authorization": f"Bearer {api_token(operator(), 'operate')}"})
    stages = [{"ring": groups["canary"].pk}, {"percent": 5}, {"percent": 100}]
    body = {"release": release().pk, **TERMS, "exclude_group": groups["labs"].pk, "stages": stages}
    answer = client.post("/api/v1/rollouts/", json.dumps(body), "application/json")
    assert answer.status_code == 201, answer.json()
    assert answer.json()["exclude"] == TERMS["exclude"]
    assert [stage["ring"] for stage in answer.json()["stages"]] == [groups["canary"].pk, None, None]
    check_terms(Rollout.objects.get())


def test_a_rollout_with_all_terms_by_the_command(groups: dict[str, Group]) -> None:
    release("1.0.0")
    terms = ["--only", TERMS["selector"], "--without", TERMS["exclude"], "--without-group", "labs"]
    call_command("rollout", "create", "digits", "1.0.0", *terms, "--stage", "canary", "--stage", "5", "--stage", "100")
    check_terms(Rollout.objects.get())
    with pytest.raises(CommandError, match="there is no group 'nobody'"):
        call_command("rollout", "create", "digits", "1.0.0", "--without-group", "nobody")


def test_a_rollout_with_all_terms_in_the_admin(groups: dict[str, Group], client: Client) -> None:
    client.force_login(superuser())
    form = {
        "release": release().pk, **TERMS, "exclude_group": groups["labs"].pk, "percents": "canary, 5 %, 100",
        "soak_minutes": 1, "success_percent": 90, "min_reports": 1, "failure_budget": 0, "on_failure": "roll_back",
    }  # fmt: skip
    answer = client.post("/admin/rollouts/rollout/add/", form, follow=True)
    assert answer.status_code == 200
    check_terms(Rollout.objects.get())
    page = client.get(f"/admin/rollouts/rollout/{Rollout.objects.get().pk}/change/").content.decode()
    assert "without @name=cam-9" in page
    assert "ring canary" in page


def test_devices_are_found_by_selector_over_the_api() -> None:
    device("a", labels={"site": "berlin"})
    device("b", labels={"site": "berlin", "lab": "x"})
    client = Client(headers={"Authorization": f"Bearer {api_token(viewer(), 'read')}"})
    found = client.get("/api/v1/devices/", {"selector": "site=berlin, !lab"}).json()["results"]
    assert [row["name"] for row in found] == ["a"]
    refused = client.get("/api/v1/devices/", {"selector": "site="})
    assert (refused.status_code, refused.json()["code"], refused.json()["detail"]) == (
        422, "selector_malformed", {"at": 5},
    )  # fmt: skip


# --- the group's page --------------------------------------------------------------------------------------------


def test_a_group_shows_how_many_devices_it_has_as_one_types_and_when_it_is_saved(client: Client) -> None:
    for number in range(10):
        device(f"cam-{number}", labels={"site": "berlin"})
    client.force_login(superuser())
    typed = client.get("/admin/devices/group/preview/", {"selector": "site=berlin, @name!=cam-0"}).content.decode()
    assert 'data-count="9"' in typed
    assert "and 1 more" in typed
    wrong = client.get("/admin/devices/group/preview/", {"selector": "site=<b>"}).content.decode()
    assert "at character 6: expected a value; got &#x27;&lt;b&gt;&#x27;" in wrong
    client.post("/admin/devices/group/add/", {"name": "all", "selector": "site=berlin"})
    page = client.get(f"/admin/devices/group/{Group.objects.get().pk}/change/").content.decode()
    assert 'data-count="10"' in page
    assert 'hx-get="/admin/devices/group/preview/"' in page


def test_the_form_of_a_rollout_counts_whom_it_would_reach_as_one_types(client: Client) -> None:
    for number in range(10):
        device(f"cam-{number}", labels={"site": "berlin"})
    device("other", labels={"site": "berlin"}, model_names=["speech"])
    client.force_login(superuser())
    made, everyone = release("1.0.0"), group("all", site=["berlin"])

    def typed(**given: object) -> str:
        return client.get("/admin/rollouts/rollout/reach/", given).content.decode()

    assert 'data-count="11"' in typed()
    assert 'data-count="9"' in typed(release=made.pk, group=everyone.pk, exclude="@name=cam-0")
    assert 'data-count="0"' in typed(exclude_group=everyone.pk)
    assert "Only: " in typed(selector="site=<b>")
    assert "&lt;b&gt;" in typed(selector="site=<b>")
    assert 'hx-get="/admin/rollouts/rollout/reach/"' in client.get("/admin/rollouts/rollout/add/").content.decode()
