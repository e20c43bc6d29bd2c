"""What becomes of rollouts, pins and devices when a release is revoked, by CI or on this server."""

import json
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from fleet.devices.models import Device
from fleet.errors import Invalid
from fleet.releases import services as releases
from fleet.releases.models import Model, Release
from fleet.rollouts import selectors, services, snapshots
from fleet.rollouts.models import Rollout, Stage
from tests.fleet_world import completed, device, release, running
from tests.registry import Registry, manifest_for, onnx_model, refusal

pytestmark = pytest.mark.django_db
State = Rollout.State


def assigned(entry: Device) -> tuple[str | None, bool]:
    (assignment,) = selectors.assignments_for(Device.objects.get(pk=entry.pk))
    return assignment.release and assignment.release.version, assignment.stop


def revoke(registry: Registry, version: str) -> Any:
    def remove(role: Any) -> None:
        for path in [path for path in role.targets if path.split("/")[1] == version]:
            del role.targets[path]

    body = {"role": registry.role([], edit=remove)}
    return registry.call("POST", "/models/digits/role", data=json.dumps(body), content_type="application/json")


@pytest.fixture(autouse=True)
def _old_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A revocation must show at once, not when a kept snapshot is a second old."""
    monkeypatch.setattr(snapshots, "MAX_AGE", 3600)


@pytest.mark.parametrize("state", [State.DRAFT, State.RUNNING, State.PAUSED, State.HALTED])
def test_a_rollout_of_a_revoked_release_ends_and_says_why(state: str) -> None:
    rollout = running(release("1.1.0"))
    Rollout.objects.update(state=state)
    releases.revoke(release=rollout.release, reason="it mislabels bicycles")
    rollout.refresh_from_db()
    assert rollout.state == State.CANCELLED
    assert "digits 1.1.0 was revoked: it mislabels bicycles" in rollout.reason
    assert rollout.actions.last().actor == "guard"


def test_devices_go_to_the_newest_older_release_that_is_valid() -> None:
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        completed(release(version))
    entry = device(runs={"digits": "1.2.0/default"})
    assert assigned(entry) == ("1.2.0", False)
    releases.revoke(release=Release.objects.get(version="1.1.0"), reason="")
    releases.revoke(release=Release.objects.get(version="1.2.0"), reason="")
    assert assigned(entry) == ("1.0.0", False)
    assert Rollout.objects.get(release__version="1.2.0").state == State.COMPLETED


def test_a_running_rollout_to_some_gives_way_to_the_standing_answer() -> None:
    completed(release("1.0.0"))
    running(release("1.1.0"), stages=(services.StagePlan(percent=50), services.StagePlan(percent=100)))
    entries = [device(f"cam-{index}") for index in range(40)]  # all on one side: once in 2^39
    assert {assigned(entry)[0] for entry in entries} == {"1.0.0", "1.1.0"}
    releases.revoke(release=Release.objects.get(version="1.1.0"), reason="")
    assert {assigned(entry)[0] for entry in entries} == {"1.0.0"}


def test_a_pin_of_a_revoked_release_binds_no_more() -> None:
    completed(release("1.0.0"))
    pinned = release("1.1.0")
    entry = device()
    services.pin(device=entry, model="digits", version="1.1.0", actor="ann")
    assert assigned(entry) == ("1.1.0", False)
    releases.revoke(release=pinned, reason="")
    assert assigned(entry) == ("1.0.0", False)


def test_with_nothing_left_devices_keep_what_runs_unless_the_model_is_to_stop() -> None:
    completed(release("1.0.0"))
    entry = device(runs={"digits": "1.0.0/default"})
    releases.revoke(release=Release.objects.get(), reason="")
    assert assigned(entry) == (None, False)
    releases.set_when_nothing(model=Model.objects.get(), policy="stop")
    assert assigned(entry) == (None, True)
    releases.set_when_nothing(model=Model.objects.get(), policy="keep")
    assert assigned(entry) == (None, False)


def test_an_unknown_policy_is_refused() -> None:
    release()
    with pytest.raises(Invalid):
        releases.set_when_nothing(model=Model.objects.get(), policy="explode")


def test_the_stop_is_signed_only_where_it_is_the_policy() -> None:
    completed(release("1.0.0"))
    entry = device()
    (without,) = selectors.assignments_for(entry)
    releases.set_when_nothing(model=Model.objects.get(), policy="stop")
    (with_stop,) = selectors.assignments_for(entry)
    assert "stop" not in without.to_custom()
    assert with_stop.to_custom() == {**without.to_custom(), "stop": True}


def test_a_rollout_that_cannot_be_read_stops_no_model() -> None:
    """Any doubt keeps what runs."""
    rollout = completed(release("1.0.0"))
    releases.set_when_nothing(model=Model.objects.get(), policy="stop")
    Stage.objects.filter(rollout=rollout).delete()
    snapshots.bump()
    assert assigned(device()) == (None, False)


def test_a_release_without_a_valid_variant_stops_no_model() -> None:
    rollout = completed(release("1.0.0"))
    releases.set_when_nothing(model=Model.objects.get(), policy="stop")
    rollout.release.variants.update(state="invalid")
    snapshots.bump()
    assert assigned(device()) == (None, False)


# --- never again -------------------------------------------------------------------------------------------------


def test_a_revoked_release_is_never_rolled_out_or_pinned_again() -> None:
    entry, gone = device(), release("1.1.0")
    drafted = services.create(release=gone, group=None, stages=[services.StagePlan(percent=100)], actor="ann")
    releases.revoke(release=gone, reason="")
    gone.refresh_from_db()
    attempts = [
        lambda: services.create(release=gone, group=None, stages=[services.StagePlan(percent=100)], actor="ann"),
        lambda: services.start(rollout=drafted, actor="ann"),
        lambda: services.resume(rollout=drafted, actor="ann"),
        lambda: services.pin(device=entry, model="digits", version="1.1.0", actor="ann"),
    ]
    for attempt in attempts:
        with pytest.raises(Invalid) as caught:
            attempt()
        assert caught.value.code == "release_not_valid"


def test_a_revoked_version_is_not_taken_in_again(registry: Registry) -> None:
    registry.publish("1.0.0")
    registry.publish("1.1.0")
    assert revoke(registry, "1.1.0").status_code == 201
    manifest = manifest_for("1.1.0", {"model.onnx": onnx_model()})
    assert refusal(registry.post("1.1.0", [manifest], registry.role([manifest]))) == (422, "release_revoked")
    other = manifest_for("1.1.0", {"model.onnx": onnx_model(3.0)})
    assert refusal(registry.post("1.1.0", [other], registry.role([other]))) == (422, "release_revoked")
    body = json.dumps({"role": registry.role([manifest])})
    listed = registry.call("POST", "/models/digits/role", data=body, content_type="application/json")
    assert refusal(listed) == (422, "foreign_target")
    assert Release.objects.get(version="1.1.0").state == "revoked"


def test_a_new_version_cannot_carry_a_revoked_one_back_into_the_role(registry: Registry) -> None:
    registry.publish("1.0.0")
    old = manifest_for("1.0.0", {"model.onnx": onnx_model()})
    revoke(registry, "1.0.0")
    new = manifest_for("1.1.0", {"model.onnx": onnx_model()})
    assert refusal(registry.post("1.1.0", [new], registry.role([new, old]))) == (422, "foreign_target")


# --- by whom -----------------------------------------------------------------------------------------------------


def test_it_is_told_who_revoked_it(registry: Registry) -> None:
    for version in ("1.0.0", "1.1.0"):
        registry.publish(version)
    revoke(registry, "1.1.0")
    releases.revoke(release=Release.objects.get(version="1.0.0"), reason="a complaint")
    by = dict(Release.objects.values_list("version", "revoked_by"))
    assert by == {"1.1.0": "ci", "1.0.0": "server"}
    assert all(row.revoked_at for row in Release.objects.all())


def test_what_a_person_withdrew_ci_may_still_revoke(registry: Registry) -> None:
    registry.publish("1.0.0")
    releases.revoke(release=Release.objects.get(), reason="a complaint")
    revoke(registry, "1.0.0")
    row = Release.objects.get()
    assert (row.revoked_by, "CI removed it" in row.reason) == ("ci", True)


def test_a_poll_right_after_a_revocation_is_not_answered_with_what_ci_took_back(registry: Registry) -> None:
    registry.publish("1.0.0")
    registry.publish("1.1.0")
    for version in ("1.0.0", "1.1.0"):
        completed(Release.objects.get(version=version))
    entry = device()
    assert assigned(entry) == ("1.1.0", False)
    revoke(registry, "1.1.0")
    assert assigned(entry) == ("1.0.0", False)


# --- who still runs it -------------------------------------------------------------------------------------------


def left(target: Release) -> dict[str, tuple[str, str, str]]:
    target.refresh_from_db()
    return {row.device.name: (row.why, row.detail, row.target) for row in selectors.still_running(target)}


def test_who_still_runs_a_revoked_release_is_told_with_the_reason() -> None:
    completed(release("1.0.0"))
    gone = release("1.1.0")
    completed(gone)
    runs, old = {"digits": "1.1.0/default"}, {"digits": "1.0.0/default"}
    now = timezone.now()
    releases.revoke(release=gone, reason="")
    path = "digits/1.0.0/default"
    device("gone-home", runs=old, last_seen=now + timedelta(seconds=1))
    device("offline", runs=runs, last_seen=now - timedelta(days=3))
    device("unasked", runs=runs, last_seen=now - timedelta(seconds=1))
    for name, state, reason in (
        ("waits", "waiting", "window"),
        ("fails", "failed", "bad_model"),
        ("works", "testing", ""),
    ):
        entry = device(name, runs=runs, last_seen=now + timedelta(seconds=9))
        entry.statuses.create(model="digits", state=state, reason=reason, release=path, since=now)
    refusal = {"code": "bad_signature", "message": "", "model": "", "at": now.isoformat()}
    device("refuses", runs=runs, last_seen=now + timedelta(seconds=9), refusal=refusal)
    assert left(gone) == {
        "offline": ("offline", "", "1.0.0"),
        "unasked": ("not_polled", "has not polled since it was revoked", "1.0.0"),
        "waits": ("waiting", "window", "1.0.0"),
        "fails": ("failed", "bad_model", "1.0.0"),
        "works": ("updating", "testing", "1.0.0"),
        "refuses": ("refused", "refused: bad_signature", "1.0.0"),
    }


def test_a_device_that_keeps_a_revoked_release_by_policy_is_told_so() -> None:
    gone = release("1.1.0")
    completed(gone)
    releases.revoke(release=gone, reason="")
    device("keeps", runs={"digits": "1.1.0/default"}, last_seen=timezone.now() + timedelta(seconds=9))
    assert left(gone)["keeps"][0] == "kept"
    releases.set_when_nothing(model=Model.objects.get(), policy="stop")
    assert left(gone)["keeps"] == ("not_polled", "has not started on it yet", "")


def test_who_is_left_is_counted_by_the_api_and_shown_on_the_releases_page(admin_client: Client) -> None:
    gone = release("1.1.0")
    completed(gone)
    device("keeps", runs={"digits": "1.1.0/default"}, last_seen=timezone.now() + timedelta(seconds=9))
    assert "data-revoked" not in admin_client.get(f"/admin/releases/release/{gone.pk}/change/").content.decode()
    releases.revoke(release=gone, reason="it <b>mislabels</b> bicycles")
    told = admin_client.get(f"/api/v1/releases/{gone.pk}/still_running/").json()
    assert (told["count"], told["results"][0]["device"], told["results"][0]["why"]) == (1, "keeps", "kept")
    page = admin_client.get(f"/admin/releases/release/{gone.pk}/change/").content.decode()
    assert 'data-revoked="server"' in page
    assert "it &lt;b&gt;mislabels&lt;/b&gt; bicycles" in page
    assert "kept by policy" in page
    assert "Withdrawn on this server" in page


def test_operators_withdraw_a_release_in_the_admin_and_say_why(admin_client: Client) -> None:
    made = release("1.1.0")
    where = f"/admin/releases/release/{made.pk}/withdraw/"
    assert "Withdraw here" in admin_client.get(f"/admin/releases/release/{made.pk}/change/").content.decode()
    admin_client.post(where, {"comment": "it mislabels bicycles", "_form_submitted": "True"})
    made.refresh_from_db()
    assert (made.state, made.revoked_by, made.reason) == ("revoked", "server", "admin: it mislabels bicycles")
    assert "Withdraw here" not in admin_client.get(f"/admin/releases/release/{made.pk}/change/").content.decode()


def test_a_models_policy_is_set_in_the_admin_and_by_command(admin_client: Client) -> None:
    entry = device(runs={"digits": "1.0.0/default"})
    line = release("1.0.0").model
    form = {"description": "house numbers", "when_nothing": "stop"}
    assert admin_client.post(f"/admin/releases/model/{line.pk}/change/", form).status_code == 302
    line.refresh_from_db()
    assert (line.description, line.when_nothing) == ("house numbers", "stop")
    assert assigned(entry) == (None, True)
    call_command("model_policy", "digits", "keep")
    assert assigned(entry) == (None, False)
    with pytest.raises(CommandError):
        call_command("model_policy", "nothing")
