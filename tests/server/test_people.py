"""Who may let a rollout begin and pass, what they must say, and that admin, REST API and command line do the same."""

from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from fleet.accounts.services import OPERATORS
from fleet.audit.models import AuditEntry
from fleet.devices import services as device_services
from fleet.errors import Conflict, Denied, FleetError, Invalid
from fleet.notices.models import Notice
from fleet.rollouts import approval, deciding, selectors, services
from fleet.rollouts.models import Outcome, Rollout, RolloutAction
from fleet.rollouts.services import StagePlan
from fleet.rollouts.terms.pace import Pace
from tests.fleet_world import AT_ONCE, api_token, device, event, release, subscription, user, viewer

pytestmark = pytest.mark.django_db

State = Rollout.State
FOUR_EYES = Pace(needs_approval=True)
HALVES = (StagePlan(percent=50, needs_approval=True, min_reports=0, success_threshold=0), StagePlan(percent=100))


@pytest.fixture
def anna() -> User:
    """Writes rollouts, and may do everything: she is a superuser."""
    return User.objects.create_superuser("anna", password="correct horse battery")


@pytest.fixture
def bob() -> User:
    return user("bob", groups=[OPERATORS])


def drafted(author: User | str, *, pace: Pace = FOUR_EYES, stages: Any = AT_ONCE, **more: Any) -> Rollout:
    target = more.pop("release", None) or release()
    return services.create(release=target, group=None, stages=stages, actor=author, pace=pace, **more)


def submitted(author: User, **more: Any) -> Rollout:
    return services.start(rollout=drafted(author, **more), actor=author)


def fresh(rollout: Rollout) -> Rollout:
    return Rollout.objects.get(pk=rollout.pk)


def history(rollout: Rollout) -> list[tuple[str, str]]:
    return list(RolloutAction.objects.filter(rollout=rollout).values_list("action", "actor"))


def offered_to_anybody() -> bool:
    return any(each.release for each in selectors.assignments_for(device(f"cam-{timezone.now().timestamp()}")))


# --- approval -----------------------------------------------------------------------------------------------------


def test_a_rollout_that_needs_approval_reaches_nobody_before_another_person_gave_it(anna: User, bob: User) -> None:
    rollout = submitted(anna)
    assert (rollout.state, offered_to_anybody()) == (State.AWAITING_APPROVAL, False)
    services.tick()
    assert fresh(rollout).state == State.AWAITING_APPROVAL
    deciding.approve(rollout=rollout, actor=bob, comment="looked at the figures")
    assert (fresh(rollout).state, offered_to_anybody()) == (State.RUNNING, True)
    assert history(rollout) == [("create", "anna"), ("submit", "anna"), ("approve", "bob"), ("start", "bob")]


def test_trap_5_the_author_of_a_rollout_never_approves_it_not_even_as_a_superuser(anna: User, bob: User) -> None:
    assert anna.has_perm(approval.PERMISSION)
    rollout = submitted(anna)
    with pytest.raises(Denied) as caught:
        deciding.approve(rollout=rollout, actor=anna)
    assert (caught.value.code, fresh(rollout).state) == ("own_rollout", State.AWAITING_APPROVAL)
    # Nor by another's draft that she submitted, nor under a new name, nor when the row has forgotten her.
    theirs = services.start(rollout=drafted(bob, release=release("2.0.0")), actor=anna)
    with pytest.raises(Denied):
        deciding.approve(rollout=theirs, actor=anna)
    User.objects.filter(pk=anna.pk).update(username="hanna")
    with pytest.raises(Denied):
        deciding.approve(rollout=rollout, actor=User.objects.get(pk=anna.pk))
    Rollout.objects.filter(pk=rollout.pk).update(created_by=None)
    for person in (User.objects.get(pk=anna.pk), bob):
        with pytest.raises(Denied) as caught:
            deciding.approve(rollout=rollout, actor=person)
        assert caught.value.code == "author_unknown"
    assert fresh(rollout).state == State.AWAITING_APPROVAL


def test_no_shell_no_token_and_nobody_without_the_right_approves(anna: User) -> None:
    rollout = submitted(anna)
    service = user("token:ci", groups=[OPERATORS])
    gone = user("gone", groups=[OPERATORS])
    gone.is_active = False
    for actor in ("command line", service, viewer(), gone):
        with pytest.raises(Denied):
            deciding.approve(rollout=rollout, actor=actor)
        if not isinstance(actor, User) or actor is not service:
            with pytest.raises(Denied):
                deciding.reject(rollout=rollout, actor=actor)
    assert fresh(rollout).state == State.AWAITING_APPROVAL


def test_a_rollout_whose_author_is_not_known_is_not_submitted(bob: User) -> None:
    rollout = drafted("command line")
    with pytest.raises(Invalid) as caught:
        services.start(rollout=rollout, actor=bob)
    assert (caught.value.code, fresh(rollout).state) == ("author_unknown", State.DRAFT)


def test_the_setting_asks_for_approval_by_model_and_at_the_time_of_the_start(anna: User, settings: Any) -> None:
    rollout = drafted(anna, pace=Pace())
    settings.APPROVAL = ["wine", "dig*"]
    assert services.start(rollout=rollout, actor=anna).state == State.AWAITING_APPROVAL
    settings.APPROVAL = ["wine"]
    other = drafted(anna, pace=Pace(), release=release("2.0.0"))
    assert services.start(rollout=other, actor=anna).state == State.RUNNING


def test_of_two_people_who_decide_the_second_is_told_to_look_again(anna: User, bob: User) -> None:
    """At the same moment, on PostgreSQL: test_chaos.py."""
    carl, rollout = user("carl", groups=[OPERATORS]), submitted(anna)
    deciding.reject(rollout=rollout, actor=carl, comment="no")
    with pytest.raises(Conflict):
        deciding.approve(rollout=rollout.pk, actor=bob)
    assert (fresh(rollout).state, history(rollout)[-1]) == (State.CANCELLED, ("reject", "carl"))


def test_trap_12_what_was_denied_is_never_offered_again(anna: User, bob: User) -> None:
    """Neither a rollout that a person rejected, nor a release that a device has refused for good: at no poll."""
    rollout = submitted(anna)
    deciding.reject(rollout=rollout, actor=bob, comment="not before Christmas")
    for action in (services.start, services.resume, deciding.approve):
        with pytest.raises(FleetError):
            action(rollout=rollout, actor=bob)
    services.tick()
    assert (fresh(rollout).state, offered_to_anybody()) == (State.CANCELLED, False)

    entry = device()
    forced = drafted(anna, pace=Pace(retries=5, retry_seconds=0), release=release("2.0.0"), stages=patient())
    services.start(rollout=forced, actor=anna)
    services.note_events(entry, [event("failed", forced.release, rollout=forced, reason="known_bad")])
    for _ in range(3):
        services.tick()
        assert [each.release for each in selectors.assignments_for(entry)] == [None]
    assert Outcome.objects.get(device=entry).retry_at is None


def patient() -> tuple[StagePlan, ...]:
    return (StagePlan(percent=100, failure_budget=5, min_reports=100),)


def test_a_stage_that_needs_approval_holds_until_another_person_gave_it_once(anna: User, bob: User) -> None:
    subscription()
    device()
    rollout = services.start(rollout=drafted(anna, pace=Pace(), stages=HALVES), actor=anna)
    for _ in range(3):
        services.tick()
    assert (fresh(rollout).stage_index, fresh(rollout).reason) == (0, services.WANTS_APPROVAL)
    assert Notice.objects.filter(kind="rollout.stage_approval_wanted").count() == 1
    with pytest.raises(Denied):
        deciding.approve_stage(rollout=rollout, actor=anna)
    deciding.approve_stage(rollout=rollout, actor=bob, comment="fine")
    with pytest.raises(Conflict):
        deciding.approve_stage(rollout=rollout, actor=bob)
    services.tick()
    assert (fresh(rollout).stage_index, rollout.stages.get(index=0).approved_by) == (1, "bob")
    with pytest.raises(Conflict):
        deciding.approve_stage(rollout=rollout, actor=bob)  # this stage needs none


def test_approval_does_not_make_a_bad_stage_pass(anna: User, bob: User) -> None:
    entry = device()
    stages = (StagePlan(percent=100, needs_approval=True),)
    rollout = services.start(rollout=drafted(anna, pace=Pace(), stages=stages), actor=anna)
    deciding.approve_stage(rollout=rollout, actor=bob)
    services.tick()
    assert fresh(rollout).state == State.RUNNING
    services.note_events(entry, [event("rolled_back", rollout.release, rollout=rollout)])
    services.tick()
    assert fresh(rollout).state == State.HALTED


# --- comments -----------------------------------------------------------------------------------------------------


def test_where_the_setting_asks_for_it_an_action_needs_a_comment_at_every_door(anna: User, settings: Any) -> None:
    settings.COMMENTS = ["rollout.ca*", "device.pinned", "device.labelled"]
    rollout, entry = drafted(anna, pace=Pace()), device()
    silent = [
        lambda comment: services.cancel(rollout=rollout, actor=anna, comment=comment),
        lambda comment: services.pin(device=entry, model="digits", version="1.0.0", actor=anna, comment=comment),
        lambda comment: device_services.set_labels(device=entry, labels={"a": "b"}, actor=anna, comment=comment),
    ]
    for act in silent:
        with pytest.raises(Invalid) as caught:
            act("  ")
        assert caught.value.code == "comment_needed"
    entry.refresh_from_db()
    assert (fresh(rollout).state, entry.pins, entry.labels) == (State.DRAFT, {}, {})
    for act in silent:
        act("because")
    named = AuditEntry.objects.filter(comment="because").values_list("action", flat=True)
    assert sorted(named) == ["device.labelled", "device.pinned", "rollout.cancel"]


def test_the_engine_needs_no_comment(settings: Any) -> None:
    settings.COMMENTS = ["*"]
    entry = device()
    rollout = services.create(release=release(), group=None, stages=AT_ONCE, actor="ann")
    services.start(rollout=rollout, actor="ann", comment="go")
    services.note_events(entry, [event("rolled_back", rollout.release, rollout=rollout)])
    services.tick()
    assert fresh(rollout).state == State.HALTED


# --- the same at every door -----------------------------------------------------------------------------------------

PREPARED = {
    "start": State.DRAFT, "approve": State.AWAITING_APPROVAL, "reject": State.AWAITING_APPROVAL,
    "approve_stage": State.RUNNING, "pause": State.RUNNING, "resume": State.PAUSED, "roll_back": State.RUNNING,
    "cancel": State.PAUSED,
}  # fmt: skip
TERMS = {
    "needs_approval": True, "timeout_seconds": 7200, "retries": 3, "retry_seconds": 60, "max_in_flight": 7,
    "starts_per_minute": 2.5, "objective_percent": 95.0, "objective_days": 7.0,
}  # fmt: skip


def by_api(action: str, rollout: Rollout, person: User) -> None:
    client = Client(headers={"Authorization": f"Bearer {api_token(person, 'operate')}"})
    path = f"/api/v1/rollouts/{rollout.pk}/{action}/"
    answer = client.post(path, {"comment": "why"}, content_type="application/json")
    assert answer.status_code == 200, answer.content


def by_admin(action: str, rollout: Rollout, person: User) -> None:
    client = Client()
    User.objects.filter(pk=person.pk).update(is_staff=True)
    client.force_login(User.objects.get(pk=person.pk))
    assert f"/{action}/" in client.get(f"/admin/rollouts/rollout/{rollout.pk}/change/").content.decode()
    form = {"_form_submitted": "True", "comment": "why"}
    client.post(f"/admin/rollouts/rollout/{rollout.pk}/{action}/", form, follow=True)


def by_command(action: str, rollout: Rollout, person: User) -> None:
    call_command("rollout", action, str(rollout.pk), "--user", person.username, "--comment", "why", stdout=StringIO())


@pytest.mark.parametrize("action", PREPARED)
def test_admin_api_and_command_line_do_the_same(action: str, anna: User, bob: User) -> None:
    seen = []
    for number, door in enumerate((by_api, by_admin, by_command)):
        stages = (StagePlan(percent=100, needs_approval=True),)
        rollout = drafted(anna, pace=Pace(), stages=stages, release=release(f"{number}.0.0"))
        Rollout.objects.filter(pk=rollout.pk).update(state=PREPARED[action])
        door(action, rollout, bob)
        row = (
            RolloutAction.objects.filter(rollout=rollout).exclude(action="create").values("action", "actor", "comment")
        )
        seen.append((fresh(rollout).state, list(row)))
    assert seen[0] == seen[1] == seen[2]
    assert (seen[0][1][0]["action"], seen[0][1][0]["actor"], seen[0][1][0]["comment"]) == (action, "bob", "why")


def test_every_action_of_a_person_is_at_every_door() -> None:
    from fleet.api.operator import RolloutViewSet
    from fleet.rollouts.admin import RolloutAdmin
    from fleet.rollouts.management.commands.rollout import ACTIONS

    in_api = {action.url_path for action in RolloutViewSet.get_extra_actions()}
    assert in_api == set(RolloutAdmin.actions_detail) == ACTIONS.keys() == PREPARED.keys()


def test_a_rollout_is_written_with_the_same_terms_at_every_door(anna: User) -> None:
    target, begin = release(), timezone.now().replace(microsecond=0) + timedelta(days=1)
    client = Client(headers={"Authorization": f"Bearer {api_token(anna, 'operate')}"})
    body = {"release": target.pk, "stages": [{"percent": 100}], **TERMS, "start_at": begin.isoformat()}
    assert client.post("/api/v1/rollouts/", body, content_type="application/json").status_code == 201
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TERMS.items() if name != "needs_approval"]
    options += ["--needs-approval", f"--start-at={begin.isoformat()}"]
    call_command("rollout", "create", "digits", "1.0.0", *options, stdout=StringIO())
    form = {
        "release": target.pk, "percents": "100", "soak_minutes": 0, "success_percent": 90, "min_reports": 1,
        "failure_budget": 0, "on_failure": "roll_back", "needs_approval": "on", "timeout_days": 1 / 12, "retries": 3,
        "retry_minutes": 1, "max_in_flight": 7, "starts_per_minute": 2.5, "objective_percent": 95, "objective_days": 7,
        "start_at_0": f"{begin:%Y-%m-%d}", "start_at_1": f"{begin:%H:%M:%S}",
    }  # fmt: skip
    page = Client()
    page.force_login(anna)
    page.post("/admin/rollouts/rollout/add/", form)
    written = list(Rollout.objects.values(*TERMS, "start_at"))
    assert written == [{**TERMS, "start_at": begin}] * 3


def test_the_button_to_approve_is_not_shown_to_the_author(anna: User, bob: User) -> None:
    rollout = submitted(anna)
    page = Client()
    page.force_login(anna)
    shown = page.get(f"/admin/rollouts/rollout/{rollout.pk}/change/").content.decode()
    assert f"{rollout.pk}/approve/" not in shown
    assert f"{rollout.pk}/cancel/" in shown
    page.post(f"/admin/rollouts/rollout/{rollout.pk}/approve/", {"_form_submitted": "True", "comment": ""})
    assert fresh(rollout).state == State.AWAITING_APPROVAL


def test_the_command_says_why_an_approval_is_refused(anna: User) -> None:
    rollout = submitted(anna)
    with pytest.raises(CommandError, match="never by the author"):
        by_command("approve", rollout, anna)
    with pytest.raises(CommandError, match="takes a person"):
        call_command("rollout", "approve", str(rollout.pk))


def test_pinning_and_labelling_take_a_comment_over_rest(anna: User) -> None:
    entry = device()
    release()
    client = Client(headers={"Authorization": f"Bearer {api_token(anna, 'operate')}"})
    for action, body in (("pin", {"model": "digits", "version": "1.0.0"}), ("labels", {"labels": {"site": "x"}})):
        path = f"/api/v1/devices/{entry.pk}/{action}/"
        assert client.post(path, {**body, "comment": "to find out"}, content_type="application/json").status_code == 200
    assert AuditEntry.objects.filter(comment="to find out").count() == 2
