"""The admin: who may see and do what, what each page says, and that it acts only through services."""

import html
import io
import json
import re
import zipfile
from base64 import b64decode
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.core.cache import cache
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from device_sdk.config import Provision
from device_sdk.protocol.polls import EnrolRequest
from fleet.accounts.models import ApiToken
from fleet.dashboard import selectors, views
from fleet.devices import searching
from fleet.devices import services as devices
from fleet.devices.models import Device, DeviceEvent, EnrolmentToken, Group, SpreadSample
from fleet.feedback.models import Campaign, DatasetPart
from fleet.releases import storage
from fleet.releases.models import Model, Release
from fleet.rollouts import selectors as rollout_selectors
from fleet.rollouts import services as rollouts
from fleet.rollouts.counting.survey import explain
from fleet.rollouts.counting.survey import survey as fleet_survey
from fleet.rollouts.models import Rollout, RolloutAction
from fleet.trust import keystore
from fleet.trust.models import RoleMetadata
from tests.browser import world

pytestmark = pytest.mark.django_db
OURS = [model for model in admin.site._registry if model.__module__.startswith("fleet.")]
ACTIONS = ["start", "pause", "resume", "cancel", "roll_back"]


@pytest.fixture
def fleet() -> world.World:
    return world.build(timezone.now())


@pytest.fixture
def as_user(client: Client) -> Callable[[str], Client]:
    def sign_in(name: str) -> Client:
        client.force_login(User.objects.get(username=name))
        return client

    return sign_in


def address(row, action: str = "change") -> str:
    meta = row._meta
    return reverse(f"admin:{meta.app_label}_{meta.model_name}_{action}", args=[row.pk])


def listing(model) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist")


def text(response) -> str:
    """What a person reads: no tags, single spaces."""
    plain = re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", " ", response.content.decode(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(plain))


def act(client: Client, rollout: Rollout, action: str, **fields: str):
    return client.post(
        f"/admin/rollouts/rollout/{rollout.pk}/{action}/",
        {"_form_submitted": "True", "comment": "", **fields},
        follow=True,
    )


# --- who may look -----------------------------------------------------------------------------------------------------


def test_an_anonymous_visitor_is_sent_to_the_login(client):
    assert client.get("/admin/").headers["Location"].startswith("/admin/login/")


def test_the_login_page_by_itself_leads_to_the_first_page(client):
    User.objects.create_superuser("root", password="correct-horse")
    answer = client.post("/admin/login/", {"username": "root", "password": "correct-horse"})
    assert answer.headers["Location"] == "/admin/"


def test_somebody_who_is_not_staff_sees_nothing(fleet, as_user):
    client = as_user("outsider")

    for path in (
        "/admin/",
        listing(Device),
        address(fleet.running),
        f"/admin/rollouts/rollout/{fleet.running.pk}/pause/",
    ):
        assert client.get(path).headers["Location"].startswith("/admin/login/"), path


def test_staff_without_permissions_is_told_so_and_sees_no_data(fleet, as_user):
    client = as_user("otto")

    page = client.get("/admin/")

    assert "nobody has given you a view" in text(page)
    assert "detector" not in text(page)
    assert client.get(listing(Device)).status_code == 403


@pytest.mark.parametrize("model", OURS, ids=lambda model: model.__name__)
def test_a_viewer_can_open_every_list_and_every_row(fleet, as_user, model):
    client = as_user("victor")

    assert client.get(listing(model)).status_code == 200
    for row in model.objects.all()[:12]:
        assert client.get(address(row)).status_code == 200


@pytest.mark.parametrize("model", OURS, ids=lambda model: model.__name__)
def test_a_viewer_can_neither_add_nor_change_nor_delete(fleet, as_user, model):
    client = as_user("victor")
    row = model.objects.first()
    before = model.objects.count()

    assert client.post(listing(model) + "add/").status_code == 403
    if row is not None:
        assert client.post(address(row), {"name": "other"}).status_code == 403
        assert client.post(address(row, "delete"), {"post": "yes"}).status_code == 403
        client.post(listing(model), {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"})
    assert model.objects.count() == before


@pytest.mark.parametrize("action", ACTIONS)
def test_a_viewer_can_operate_no_rollout(fleet, as_user, action):
    client = as_user("victor")

    answer = act(client, fleet.running, action, comment="let me")

    assert answer.status_code == 403
    fleet.running.refresh_from_db()
    assert fleet.running.state == Rollout.State.RUNNING


def test_a_viewer_is_shown_no_buttons(fleet, as_user):
    client = as_user("victor")

    page = client.get(address(fleet.running)).content.decode()

    assert [action for action in ACTIONS if f"/{fleet.running.pk}/{action}/" in page] == []
    assert "/revoke/" not in client.get(address(fleet.devices[1])).content.decode()


@pytest.mark.parametrize(
    "model", [Device, DeviceEvent, Release, Model, RoleMetadata, Rollout, EnrolmentToken, DatasetPart]
)
def test_not_even_a_superuser_deletes_history(fleet, as_user, model):
    client = as_user("admin")
    row = model.objects.first()

    assert client.post(address(row, "delete"), {"post": "yes"}).status_code == 403
    assert "delete_selected" not in client.get(listing(model)).content.decode()
    assert model.objects.filter(pk=row.pk).exists()


# --- the first page ---------------------------------------------------------------------------------------------------


def test_an_empty_database_says_what_to_do_first(client):
    world.people()
    client.force_login(User.objects.get(username="victor"))

    page = text(client.get("/admin/"))

    assert "python manage.py trust_init" in page
    assert "trust_add_model detector --ci-key-out ci.key" in page
    assert "fleet-publish push model.onnx" in page
    assert "(done)" not in page


def test_a_step_that_was_done_is_ticked_off(client):
    world.people()
    client.force_login(User.objects.get(username="victor"))
    Model.objects.create(name="detector")

    page = text(client.get("/admin/"))

    assert "2. Add a model (done)" in page
    assert "trust_add_model" not in page
    assert "No active device has this model" in page


def test_the_first_page_shows_the_spread_in_counts_and_percent(fleet, as_user):
    page = as_user("victor").get("/admin/")
    spread = {spread["of"].model.name: spread["of"] for spread in page.context["spreads"]}

    counted = {s.version: s.devices for s in spread["detector"].slices}

    assert sum(counted.values()) == spread["detector"].devices == 33
    assert counted["1.4.0"] == fleet.running.outcomes.filter(state="committed").count()
    assert f"{counted['1.4.0']} of 33 on 1.4.0" in text(page)


def test_the_first_page_costs_no_more_queries_with_more_devices(fleet, as_user, django_assert_max_num_queries):
    client = as_user("victor")
    for number in range(60):
        Device.objects.create(
            name=f"more-{number}", model_names=["detector"], labels={"kind": "camera"}, nonce_digest=""
        )

    with django_assert_max_num_queries(78):
        assert client.get("/admin/").status_code == 200


def test_laggards_are_listed_with_the_reason(fleet, as_user):
    page = as_user("victor").get("/admin/")
    rows = {row.device.name: row for row in page.context["laggards"].rows}

    assert sum(number for _, number in page.context["laggards"].reasons) == page.context["laggards"].total
    assert rows["camera-031"].why == "offline"
    assert "window: opens at 01:00" in text(page)


def test_a_role_that_expires_soon_is_announced(fleet, as_user):
    page = text(as_user("victor").get("/admin/"))

    assert "The signed role vibration expires in 2 weeks" in page
    assert "The signed role detector" not in page


def test_an_expired_role_is_announced_as_such(fleet, as_user):
    RoleMetadata.objects.filter(role="detector").update(expires_at=timezone.now() - timedelta(days=2))

    assert "The signed role detector expired 2 days ago" in text(as_user("victor").get("/admin/"))


def test_presence_counts_every_active_device_once(fleet):
    presence = selectors.presence(timezone.now())

    assert sum(row.devices for row in presence.rows) == presence.active == 37
    assert presence.pending == 2
    assert presence.silent == 2


def test_spread_history_carries_the_last_sample_over_quiet_hours():
    now = timezone.now()
    model = Model.objects.create(name="detector")
    for hours, counts in ((30, {"1.0.0": 4}), (3, {"1.0.0": 1, "2.0.0": 3})):
        for version, number in counts.items():
            SpreadSample.objects.create(
                at=now - timedelta(hours=hours), model="detector", version=version, devices=number
            )

    history = selectors.spread_of(model, now, timedelta(days=7)).history
    lines = {line.label: line.points for line in history.lines}

    assert history.step == timedelta(hours=1)
    assert len(history.moments) == 31
    assert lines["1.0.0"][0] == 4
    assert lines["1.0.0"][20] == 4
    assert lines["1.0.0"][-1] == 1
    assert lines["2.0.0"][0] == 0
    assert lines["2.0.0"][-1] == 3


def test_many_versions_are_summed_up_as_older_ones():
    now = timezone.now()
    model = Model.objects.create(name="detector")
    for number in range(9):
        SpreadSample.objects.create(at=now - timedelta(minutes=5), model="detector", version=f"1.{number}", devices=1)
        Release.objects.create(model=model, version=f"1.{number}")

    lines = selectors.spread_of(model, now, timedelta(days=1)).history.lines

    assert [line.label for line in lines] == ["1.8", "1.7", "1.6", "1.5", "1.4", "1.3", "older"]
    assert lines[-1].points[-1] == 3


def test_an_unknown_time_span_falls_back(fleet, as_user):
    page = as_user("victor").get("/admin/?window=<script>")

    assert page.context["window"] == views.DEFAULT_WINDOW
    assert b"<script>?" not in page.content


def test_dates_are_shown_in_the_zone_that_the_browser_told(fleet, as_user):
    client = as_user("victor")
    client.cookies["fleet-zone"] = "Asia%2FTokyo"

    assert "Times are in Asia/Tokyo" in text(client.get("/admin/"))


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "../../etc/passwd", "/etc/passwd", "Europe", "a\0b", "x" * 3000])
def test_a_senseless_zone_is_ignored(as_user, client, zone):
    world.people()
    client.force_login(User.objects.get(username="victor"))
    client.cookies["fleet-zone"] = zone

    assert "Times are in UTC" in text(client.get("/admin/"))


def test_one_look_at_the_fleet_finds_what_single_looks_find(fleet):
    rows = list(Rollout.objects.select_related("release__model", "group"))

    survey = fleet_survey(rows, first=1_000)

    assert survey.progress == {row.pk: rollout_selectors.progress(row) for row in rows}
    assert survey.progress[fleet.running.pk].admitted > survey.progress[fleet.running.pk].committed > 0
    single = {(row.device.pk, row.model): row for row in rollout_selectors.laggards()}
    assert {(row.device.pk, row.model): row for row in explain(survey.first)} == single
    assert survey.total == len(single) > 0


@pytest.mark.parametrize(("cost", "looks"), [(0.5, 2), (3.0, 1)])
def test_only_what_takes_long_to_find_out_is_kept(cost, looks):
    ticks = iter([0.0, cost, 10.0, 10.0 + cost])
    looked = []

    for _ in range(2):
        selectors.costly(f"test-{cost}", lambda: looked.append(1) or 7, clock=lambda: next(ticks))

    assert len(looked) == looks
    cache.delete(f"test-{cost}")


# --- operating --------------------------------------------------------------------------------------------------------


def test_an_operator_pauses_a_rollout_and_the_reason_is_kept(fleet, as_user):
    client = as_user("olga")

    page = act(client, fleet.running, "pause", comment="night shift complains")

    fleet.running.refresh_from_db()
    assert fleet.running.state == Rollout.State.PAUSED
    kept = RolloutAction.objects.filter(rollout=fleet.running).last()
    assert (kept.action, kept.actor, kept.comment) == ("pause", "olga", "night shift complains")
    assert "night shift complains" in text(page)


def test_pausing_asks_why(fleet, as_user):
    page = act(as_user("olga"), fleet.running, "pause")

    fleet.running.refresh_from_db()
    assert fleet.running.state == Rollout.State.RUNNING
    assert "This field is required" in text(page)


def test_looking_at_a_dialog_changes_nothing(fleet, as_user):
    page = as_user("olga").get(f"/admin/rollouts/rollout/{fleet.running.pk}/pause/")

    fleet.running.refresh_from_db()
    assert page.status_code == 200
    assert fleet.running.state == Rollout.State.RUNNING


def test_an_action_without_the_csrf_token_is_refused(fleet):
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.get(username="olga"))

    assert act(client, fleet.running, "pause", comment="forged").status_code == 403
    fleet.running.refresh_from_db()
    assert fleet.running.state == Rollout.State.RUNNING


def test_what_the_service_refuses_is_told(fleet, as_user):
    rollouts.pause(rollout=fleet.running, actor="somebody else")

    page = act(as_user("olga"), fleet.running, "pause", comment="me too")

    assert "cannot pause" in text(page)
    assert RolloutAction.objects.filter(rollout=fleet.running, action="pause").count() == 1


def test_a_dialog_leaves_the_page_through_htmx(fleet, as_user):
    answer = as_user("olga").post(
        f"/admin/rollouts/rollout/{fleet.running.pk}/pause/",
        {"_form_submitted": "True", "comment": "why not"},
        headers={"HX-Request": "true"},
    )

    assert answer.status_code == 200
    assert answer.headers["HX-Redirect"] == address(fleet.running)


@pytest.mark.parametrize(
    ("state", "buttons"),
    [
        ("draft", {"start", "cancel"}),
        ("running", {"pause", "cancel", "roll_back"}),
        ("paused", {"resume", "cancel", "roll_back"}),
        ("halted", {"resume", "cancel"}),
        ("completed", {"roll_back"}),
        ("cancelled", set()),
    ],
)
def test_only_what_the_state_allows_is_offered(fleet, as_user, state, buttons):
    Rollout.objects.filter(pk=fleet.running.pk).update(state=state)

    page = as_user("olga").get(address(fleet.running)).content.decode()

    assert {action for action in ACTIONS if f"/{fleet.running.pk}/{action}/" in page} == buttons


def test_a_rollout_that_has_not_begun_says_how_to_play_it_first(fleet, as_user):
    client, command = as_user("victor"), f"simulate --rollout {fleet.running.pk} --out"
    assert command not in client.get(address(fleet.running)).content.decode()

    Rollout.objects.filter(pk=fleet.running.pk).update(state="draft", started_at=None)

    assert command in client.get(address(fleet.running)).content.decode()


def test_an_action_on_a_rollout_that_is_not_there_is_not_found(fleet, as_user):
    missing = Rollout(pk=fleet.running.pk + 1000)

    assert act(as_user("olga"), missing, "pause", comment="x").status_code == 404


ROLLOUT = {
    "percents": "5, 25, 100", "soak_minutes": "30", "success_percent": "95", "min_reports": "3", "failure_budget": "1",
    "on_failure": "roll_back", "group": "",
}  # fmt: skip


def test_an_operator_plans_a_rollout(fleet, as_user):
    release = Release.objects.get(model__name="detector", version="1.3.0")
    form = {**ROLLOUT, "release": release.pk, "window_start": "22:30", "window_end": "04:00"}

    page = as_user("olga").post("/admin/rollouts/rollout/add/", form, follow=True)

    made = Rollout.objects.latest("pk")
    assert page.status_code == 200
    assert (made.release, made.state, made.created_by.username) == (release, "draft", "olga")
    assert made.window == {"start": 22 * 60 + 30, "end": 4 * 60}
    assert [
        (s.percent, s.soak_seconds, s.success_threshold, s.min_reports, s.failure_budget) for s in made.stages.all()
    ] == [(percent, 1800, 0.95, 3, 1) for percent in (5, 25, 100)]
    assert list(made.actions.values_list("action", "actor")) == [("create", "olga")]


def test_an_operator_says_what_devices_wait_for(fleet, as_user):
    release = Release.objects.get(model__name="detector", version="1.3.0")
    asked = {"charging": "on", "idle": "on", "free_disk": "500", "rate": "50", "daily": "20"}

    page = as_user("olga").post(
        "/admin/rollouts/rollout/add/", {**ROLLOUT, "release": release.pk, **asked}, follow=True
    )

    made = Rollout.objects.latest("pk")
    wanted = {"charging": True, "idle": True, "free_disk": 500 * 10**6, "rate": 50_000, "daily": 20 * 10**6}
    assert (page.status_code, made.conditions) == (200, wanted)
    shown = text(as_user("victor").get(f"/admin/rollouts/rollout/{made.pk}/change/"))
    assert "charging idle 500 MB of disk free 50.0 kB a second 20.0 MB a day" in shown


def test_a_rollout_may_start_at_once(fleet, as_user):
    release = Release.objects.get(model__name="detector", version="1.3.0")

    as_user("olga").post("/admin/rollouts/rollout/add/", {**ROLLOUT, "release": release.pk, "start_now": "on"})

    assert Rollout.objects.latest("pk").state == Rollout.State.RUNNING


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"percents": "5, x"}, "or a group's name as a ring"),
        ({"percents": "50, 25, 100"}, "percentages must rise"),
        ({"percents": "5, 25"}, "to 100, the last"),
        ({"percents": "nan, 100"}, "percentages must rise"),
        ({"window_start": "22:00"}, "give both ends"),
        ({"success_percent": "101"}, "less than or equal to 100"),
    ],
)
def test_a_senseless_plan_is_refused_with_the_reason(fleet, as_user, changes, complaint):
    before = Rollout.objects.count()
    release = Release.objects.get(model__name="detector", version="1.3.0")

    page = as_user("olga").post("/admin/rollouts/rollout/add/", {**ROLLOUT, "release": release.pk, **changes})

    assert complaint in text(page)
    assert Rollout.objects.count() == before


def test_an_invalid_release_cannot_be_chosen(fleet, as_user):
    release = Release.objects.get(version="1.5.0-rc1")

    page = as_user("olga").post("/admin/rollouts/rollout/add/", {**ROLLOUT, "release": release.pk})

    assert "not one of the available choices" in text(page)


# --- devices ----------------------------------------------------------------------------------------------------------


def test_an_operator_approves_a_device(fleet, as_user):
    device = Device.objects.filter(state="pending").first()

    as_user("olga").post(f"/admin/devices/device/{device.pk}/approve/", {"_form_submitted": "True", "comment": ""})

    device.refresh_from_db()
    assert device.state == Device.State.ACTIVE


def test_several_devices_are_approved_together(fleet, as_user):
    pending = list(Device.objects.filter(state="pending").values_list("pk", flat=True))

    as_user("olga").post(listing(Device), {"action": "approve_selected", "_selected_action": pending})

    assert set(Device.objects.filter(pk__in=pending).values_list("state", flat=True)) == {"active"}


def test_revoking_a_device_voids_its_credential(fleet, as_user):
    device = fleet.devices[1]

    as_user("olga").post(f"/admin/devices/device/{device.pk}/revoke/", {"_form_submitted": "True", "comment": "stolen"})

    device.refresh_from_db()
    assert (device.state, device.epoch) == (Device.State.REVOKED, 2)


def refuse(device: Device, message: str = "expected a view of 'cam'; got <b>'x'</b>") -> None:
    at = (timezone.now() - timedelta(minutes=3)).isoformat()
    device.refusal = {"code": "wrong_device", "message": message, "model": "", "at": at}
    device.save()


def test_a_device_that_refuses_what_it_is_sent_says_so_in_red_until_it_is_over(fleet, as_user):
    device = fleet.devices[1]
    refuse(device)

    page = as_user("olga").get(address(device))
    assert "This device refuses what it is sent. refused: wrong_device , 3 minutes ago" in text(page)
    assert "expected a view of 'cam'; got <b>'x'</b>" in text(page)  # escaped: the device's words are no markup
    Device.objects.update(refusal={})
    assert "refuses what it is sent" not in text(as_user("olga").get(address(device)))


def test_devices_that_refuse_are_announced_on_the_first_page_and_listed(fleet, as_user):
    assert "Someone may stand between" not in text(as_user("victor").get("/admin/"))
    refuse(fleet.devices[1])
    assert "1 device refuses what it is sent" in text(as_user("victor").get("/admin/"))
    refuse(fleet.devices[2])
    assert "2 devices refuse what they are sent" in text(as_user("victor").get("/admin/"))

    page = as_user("victor").get(f"{listing(Device)}?refuses=yes")
    assert {row.pk for row in page.context["cl"].queryset} == {fleet.devices[1].pk, fleet.devices[2].pk}
    assert text(page).count("refusing") == 2


def test_a_viewer_approves_and_revokes_nothing(fleet, as_user):
    client = as_user("victor")

    for action in ("approve", "revoke"):
        path = f"/admin/devices/device/{fleet.devices[1].pk}/{action}/"
        assert client.post(path, {"_form_submitted": "True", "comment": "x"}).status_code == 403


@pytest.mark.parametrize(
    ("query", "fits"),
    [
        ("runs=detector/1.4.0", lambda d: d.runs and d.runs.runs.get("detector", "").startswith("1.4.0/")),
        ("runs=detector/-", lambda d: "detector" in d.model_names and not d.runs and d.state == "active"),
        ("state__exact=pending", lambda d: d.state == "pending"),
        ("seen=silent", lambda d: d.last_seen < timezone.now() - timedelta(days=1)),
        ("q=vienna", lambda d: d.labels["site"] == "vienna"),
        ("q=site%20in%20(vienna,%20linz)", lambda d: d.labels["site"] in {"vienna", "linz"}),
        ("q=camera-00", lambda d: d.name.startswith("camera-00")),
    ],
)
def test_devices_are_found_by_what_they_run_and_how_they_are(fleet, as_user, query, fits):
    Device.objects.filter(name="camera-002").update(runs=None)

    page = as_user("victor").get(f"{listing(Device)}?{query}")

    found = {device.name for device in page.context["cl"].queryset}
    assert found == {device.name for device in Device.objects.select_related("runs") if fits(device)}
    assert found


def test_a_large_fleet_is_searched_by_the_beginning_of_a_name_or_by_labels(fleet, as_user, monkeypatch):
    monkeypatch.setattr(searching, "SMALL", 3)
    asked = {"camera-00": True, "amera-00": False, "vienna": False, "site=vienna": True, "site=": False}
    for typed, some in asked.items():
        page = as_user("victor").get(listing(Device), {"q": typed})
        found = [device.name for device in page.context["cl"].queryset]
        assert bool(found) == some, typed
        assert typed != "camera-00" or all(name.startswith(typed) for name in found)


def test_a_group_is_chosen_by_labels_that_people_type(fleet, as_user):
    as_user("olga").post("/admin/devices/group/add/", {"name": "north", "selector": "site in (linz,graz), kind=camera"})

    assert Group.objects.get(name="north").selector == "site in (graz, linz), kind=camera"


@pytest.mark.parametrize("typed", ["site=", "=graz", "Site One=x", "site=graz|linz"])
def test_labels_that_make_no_sense_are_refused(fleet, as_user, typed):
    page = as_user("olga").post("/admin/devices/group/add/", {"name": "north", "selector": typed})

    assert page.status_code == 200
    assert not Group.objects.filter(name="north").exists()


# --- tokens, shown once -----------------------------------------------------------------------------------------------

TOKEN = {"name": "lot 8", "model_names": "detector, keyword", "labels": "site=graz", "max_uses": "2", "days": "3"}


@pytest.fixture
def trust(tmp_path, db):
    keystore.initialise(keystore.at(tmp_path))


def downloaded(page) -> Provision:
    encoded = re.search(r"data:application/json;base64,([A-Za-z0-9+/=]+)", page.content.decode())[1]
    return Provision.parse(b64decode(encoded))


def test_a_new_enrolment_token_brings_a_provisioning_file_that_lets_a_device_in(trust, client):
    world.people()
    client.force_login(User.objects.get(username="olga"))

    page = client.post("/admin/devices/enrolmenttoken/add/", TOKEN)
    provision = downloaded(page)
    device = devices.enrol(token=provision.token, request=EnrolRequest("camera-1", "0" * 32, {}, "0.1.0")).device

    assert provision.models == ("detector", "keyword")
    assert json.loads(provision.root)["signed"]["_type"] == "root"
    assert device.labels == {"site": "graz"}
    assert "no-store" in page.headers["Cache-Control"]
    assert EnrolmentToken.objects.get().created_by.username == "olga"


def test_an_enrolment_token_is_never_shown_again(trust, client):
    world.people()
    client.force_login(User.objects.get(username="olga"))
    secret = downloaded(client.post("/admin/devices/enrolmenttoken/add/", TOKEN)).token
    token = EnrolmentToken.objects.get()

    pages = [client.get(listing(EnrolmentToken)), client.get(address(token)), client.get("/admin/")]

    assert [page for page in pages if secret in page.content.decode()] == []
    assert client.session.keys()
    assert secret not in str(dict(client.session.items()))


def test_without_a_trust_root_the_page_says_what_is_missing(client):
    world.people()
    client.force_login(User.objects.get(username="olga"))

    page = text(client.post("/admin/devices/enrolmenttoken/add/", TOKEN))

    assert "There is no trust root yet" in page
    assert EnrolmentToken.objects.count() == 1


def test_a_revoked_enrolment_token_lets_nobody_in(fleet, as_user):
    token = EnrolmentToken.objects.first()

    as_user("olga").post(f"/admin/devices/enrolmenttoken/{token.pk}/revoke/", {"_form_submitted": "True"})

    token.refresh_from_db()
    assert token.revoked_at is not None


def test_a_new_api_token_is_shown_once_and_works(trust, client):
    world.people()
    client.force_login(User.objects.get(username="admin"))

    form = {"name": "ci", "scopes": ["publish"], "models_allowed": "detector", "days": "30"}
    page = client.post("/admin/accounts/apitoken/add/", form)
    secret = re.search(r'id="token">(flt_\w+)<', page.content.decode())[1]
    token = ApiToken.objects.get()

    assert (token.scopes, token.models_allowed) == (["publish"], ["detector"])
    assert abs(token.expiry - timezone.now() - timedelta(days=30)) < timedelta(minutes=1)
    assert secret not in client.get(listing(ApiToken)).content.decode()
    answer = Client().get("/api/ci/v1/models/detector/role", headers={"Authorization": f"Bearer {secret}"})
    assert answer.status_code == 404  # it came in; there is no such model


def test_operators_cannot_make_api_tokens(fleet, as_user):
    assert as_user("olga").get("/admin/accounts/apitoken/add/").status_code == 403


# --- feedback ---------------------------------------------------------------------------------------------------------


def test_a_campaign_is_planned_and_changed_in_percent_and_clock_times(fleet, as_user):
    client = as_user("olga")
    form = {
        "name": "night", "model": Model.objects.get(name="keyword").pk, "active": "on", "percent": "2.5",
        "expires_at_0": "2099-01-01", "expires_at_1": "12:00", "max_samples": "50", "opens": "01:30", "closes": "04:00",
        "jitter_seconds": "600",
    }  # fmt: skip

    client.post("/admin/feedback/campaign/add/", form)
    made = Campaign.objects.get(name="night")
    client.post(address(made), {**form, "percent": "5", "closes": "05:00"})

    assert (made.rate, made.window_start, made.window_end) == (0.025, 90, 240)
    made.refresh_from_db()
    assert (made.rate, made.window_end, made.model.name) == (0.05, 300, "keyword")
    assert 'value="5.0"' in client.get(address(made)).content.decode()


def test_a_data_set_is_downloaded_as_one_zip(fleet, as_user):
    parts = []
    for day in ("2026-11-01", "2026-11-02"):
        path = f"datasets/model=detector/version=1.3.1/day={day}/part-0.parquet"
        storage.put(path, io.BytesIO(day.encode()))
        parts.append(
            DatasetPart.objects.create(
                model=Model.objects.get(name="detector"), version="1.3.1", day=day, path=path, rows=1, length=10
            )
        )

    answer = as_user("victor").post(
        listing(DatasetPart), {"action": "download", "_selected_action": [part.pk for part in parts]}
    )
    archive = zipfile.ZipFile(io.BytesIO(b"".join(answer.streaming_content)))

    assert answer.headers["Content-Type"] == "application/zip"
    assert [archive.read(name) for name in sorted(archive.namelist())] == [b"2026-11-01", b"2026-11-02"]


@pytest.mark.parametrize("key", ["x", "%00", "1_2Fy", "9" * 30])
@pytest.mark.parametrize(
    "page",
    [
        *(f"devices/device/{{}}/{action}" for action in ("change", "approve", "revoke")),
        *(f"devices/enrolmenttoken/{{}}/{action}" for action in ("change", "revoke")),
        *(f"rollouts/rollout/{{}}/{action}" for action in ("change", *ACTIONS)),
    ],
)
def test_the_address_of_no_row_is_no_failure(client: Client, page: str, key: str) -> None:
    """An address may say anything, where a row's key is a number. A failure would be raised right here."""
    client.force_login(User.objects.create_superuser("root"))
    where = f"/admin/{page.format(key)}/"
    assert client.get(where).status_code in {200, 302, 404}
    assert client.post(where, {"comment": "no"}).status_code in {200, 302, 403, 404}
