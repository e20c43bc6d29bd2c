"""The audit trail: who did what from where, in a chain that shows when somebody has been at it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import StringIO
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection, transaction
from django.test import Client, RequestFactory
from django.urls import reverse
from django.utils import timezone

from fleet.accounts import services as accounts
from fleet.audit import context, exports, protection, selectors, services
from fleet.audit.addresses import caller_network, client_address
from fleet.audit.chain import Broken, Head, check
from fleet.audit.models import AuditEntry, AuditSeal
from fleet.devices.models import Device
from fleet.devices.services import save_group
from fleet.errors import Conflict
from fleet.rollouts import services as rollouts
from tests.fleet_world import (
    Caller,
    api_token,
    device,
    enrolment_token,
    event,
    operator,
    outsider,
    release,
    running,
    user,
    viewer,
)
from tests.registry import Registry
from tests.server.test_permissions import campaign

pytestmark = pytest.mark.django_db


def staff(person: User) -> User:
    person.is_staff = True
    person.save()
    return person


def newest(action: str = "") -> AuditEntry:
    rows = AuditEntry.objects.order_by("-pk")
    return (rows.filter(action=action) if action else rows)[0]


def detail(entry: AuditEntry) -> dict[str, Any]:
    return json.loads(entry.detail)


def trail(number: int) -> None:
    for index in range(number):
        services.record("group.changed", target=f"group-{index}", detail={"index": index})
    services.seal()


def run(*arguments: str) -> str:
    output = StringIO()
    call_command("audit", *arguments, stdout=output, stderr=StringIO())
    return output.getvalue().strip()


def tamper(sql: str) -> None:
    """As somebody who owns the database can."""
    protection.lift(connection)
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA defer_foreign_keys = ON")
        cursor.execute(sql)


# --- the chain ---------------------------------------------------------------------------------------------------


def test_what_was_recorded_is_sealed_in_order_and_holds() -> None:
    trail(5)
    told = run("verify")
    assert told == f"the audit trail holds: 5 entries, head {selectors.head()}"
    assert list(AuditSeal.objects.values_list("position", flat=True)) == [1, 2, 3, 4, 5]
    assert run("head") == str(selectors.head())
    trail(1)
    assert selectors.head().position == 6


def test_a_change_that_is_rolled_back_was_not_done() -> None:
    with transaction.atomic():
        save_group(name="paris", selector="")
        transaction.set_rollback(True)
    assert not AuditEntry.objects.filter(action="group.created").exists()


@pytest.mark.parametrize(
    ("sql", "position", "why"),
    [
        ("UPDATE audit_auditentry SET comment = 'x' WHERE id = {third}", 3, "changed: entry"),
        ("UPDATE audit_auditentry SET at = '2020-01-01 00:00:00' WHERE id = {third}", 3, "changed: entry"),
        ("UPDATE audit_auditentry SET actor = 'nobody' WHERE id = {third}", 3, "changed: entry"),
        ("UPDATE audit_auditentry SET detail = '{{not json' WHERE id = {third}", 3, "changed: entry"),
        ("UPDATE audit_auditseal SET hash = '" + "a" * 64 + "' WHERE position = 3", 3, "changed: entry"),
        ("DELETE FROM audit_auditseal WHERE position = 3", 3, "missing: position 3 is followed by 4"),
        ("DELETE FROM audit_auditseal WHERE position = 1", 1, "missing: position 1 is followed by 2"),
    ],
)  # fmt: skip
def test_the_first_broken_position_is_named(sql: str, position: int, why: str) -> None:
    trail(5)
    third = AuditSeal.objects.get(position=3).entry_id
    tamper(sql.format(third=third))
    with pytest.raises(CommandError, match=f"broken at position {position}: {why}") as refused:
        run("verify")
    assert refused.value.returncode == 1


def test_two_entries_that_changed_places_are_found() -> None:
    trail(5)
    second, third = AuditSeal.objects.get(position=2).entry_id, AuditSeal.objects.get(position=3).entry_id
    tamper(f"UPDATE audit_auditseal SET entry_id = -1 WHERE entry_id = {second}")
    tamper(f"UPDATE audit_auditseal SET entry_id = {second} WHERE entry_id = {third}")
    tamper(f"UPDATE audit_auditseal SET entry_id = {third} WHERE entry_id = -1")
    with pytest.raises(CommandError, match="broken at position 2: changed: entry"):
        run("verify")


def test_a_cut_tail_is_found_by_a_head_that_was_written_down() -> None:
    trail(5)
    known = run("head")
    tamper("DELETE FROM audit_auditseal WHERE position = 5")
    tamper("DELETE FROM audit_auditentry WHERE id NOT IN (SELECT entry_id FROM audit_auditseal)")
    assert run("verify").startswith("the audit trail holds: 4 entries")  # by itself a cut shows nothing
    with pytest.raises(CommandError, match="position 5: truncated: the chain ends at position 4"):
        run("verify", "--head", known)


def test_a_chain_that_was_written_anew_is_found_by_the_head() -> None:
    trail(3)
    known = run("head")
    tamper("DELETE FROM audit_auditseal")
    tamper("UPDATE audit_auditentry SET actor = 'nobody'")
    assert run("verify").startswith("the audit trail holds: 3 entries")
    with pytest.raises(CommandError, match="broken at position 3: rewritten"):
        run("verify", "--head", known)


def test_a_malformed_head_is_refused_with_what_was_expected() -> None:
    with pytest.raises(CommandError, match="expected POSITION:HASH"):
        run("verify", "--head", "five")


def test_an_export_is_verified_without_the_database(tmp_path: Path) -> None:
    trail(5)
    whole, known = tmp_path / "trail.jsonl", run("head")
    run("export", "--out", str(whole))
    assert run("verify", "--file", str(whole), "--head", known).startswith("the audit trail holds: 5 entries")
    lines = whole.read_text().splitlines(keepends=True)
    broken = {
        "changed: entry": [*lines[:3], lines[3].replace("group-2", "group-7"), *lines[4:]],
        "missing: position 3 is followed by 4": lines[:3] + lines[4:],
        "missing: position 2 is followed by 3": [*lines[:2], lines[3], lines[2], *lines[4:]],
        "truncated: the chain ends at position 4": lines[:-1],
    }
    for why, text in broken.items():
        whole.write_text("".join(text))
        with pytest.raises(CommandError, match=why):
            run("verify", "--file", str(whole), "--head", known)


def test_a_span_of_time_is_exported_with_what_stands_before_it(tmp_path: Path) -> None:
    trail(2)
    between = timezone.now()
    trail(3)
    out = tmp_path / "part.jsonl"
    run("export", "--since", between.isoformat(), "--out", str(out))
    assert len(out.read_text().splitlines()) == 4
    assert run("verify", "--file", str(out)).startswith("the audit trail holds: 3 entries")
    assert json.loads(out.read_text().splitlines()[0])["after"].startswith("2:")
    assert len(run("export", "--until", between.isoformat()).splitlines()) == 3


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"format": "other"}', '{"format": "fleet-audit-1", "after": "x"}'])
def test_a_file_that_is_no_export_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "x").write_text(line)
    with pytest.raises(CommandError, match="expected"):
        run("verify", "--file", str(tmp_path / "x"))


def test_a_repeated_entry_is_no_way_to_fill_a_gap() -> None:
    trail(2)
    links = list(selectors.links())
    doubled = [links[0], type(links[0])(2, links[1].hash, links[0].entry)]
    assert list(check(doubled))[-1] == Broken(
        2, f"repeated: entry {links[0].entry['id']} stands at an earlier position too"
    )
    assert list(check(links)) == [Head(link.position, link.hash) for link in links]
    assert list(check([])) == []


# --- nothing is changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", protection.TABLES)
@pytest.mark.parametrize("statement", ["UPDATE {} SET {} = {}", "DELETE FROM {}"])
def test_the_database_refuses_to_change_the_trail(table: str, statement: str) -> None:
    trail(1)
    column = "position" if table.endswith("seal") else "id"
    with pytest.raises(DatabaseError, match=protection.REFUSAL), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(statement.format(table, column, column))
    assert run("verify").startswith("the audit trail holds: 1 entries")


@pytest.mark.parametrize(
    "attempt",
    [
        lambda entry: entry.save(),
        lambda entry: entry.delete(),
        lambda entry: AuditEntry.objects.update(comment="x"),
        lambda entry: AuditEntry.objects.all().delete(),
        lambda entry: AuditEntry.objects.bulk_update([entry], ["comment"]),
        lambda entry: AuditEntry.objects.update_or_create(pk=entry.pk, defaults={"comment": "x"}),
        lambda entry: entry.seal.delete(),
        lambda entry: AuditSeal.objects.filter(position=1).update(hash="0" * 64),
    ],
)
def test_our_own_code_refuses_too(attempt: Callable[[AuditEntry], object]) -> None:
    trail(1)
    with pytest.raises(Conflict, match="append-only"):
        attempt(AuditEntry.objects.get())
    assert selectors.head().position == 1


@pytest.mark.django_db(transaction=True)
def test_an_entry_is_sealed_right_after_its_commit() -> None:
    save_group(name="paris", selector="")
    entry = newest("group.created")
    assert entry.seal.position == selectors.head().position
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'audit_%'")
        assert cursor.fetchone() == (4,)  # a flush before this test has not left the trail bare


@pytest.mark.django_db(transaction=True)
def test_the_sweep_seals_what_a_crash_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from fleet.audit.tasks import seal

    with monkeypatch.context() as patch:
        patch.setattr(services, "seal", lambda: None)
        save_group(name="paris", selector="")
    assert selectors.unsealed() == 1
    seal.delay()
    assert selectors.unsealed() == 0
    assert run("verify").startswith("the audit trail holds")


@pytest.mark.django_db(transaction=True)
def test_a_failing_seal_fails_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("the lock is away")

    monkeypatch.setattr(services, "_seal_some", broken)
    assert save_group(name="paris", selector="").pk
    assert selectors.unsealed() == 1


# --- who, and from where -----------------------------------------------------------------------------------------


def test_a_persons_revocation_keeps_who_where_and_why(client: Client) -> None:
    entry = device()
    client.force_login(staff(operator()))
    where = reverse("admin:devices_device_revoke", args=[entry.pk])
    client.post(where, {"_form_submitted": "True", "comment": "stolen in Lyon"}, REMOTE_ADDR="192.0.2.7")
    noted = newest()
    assert (noted.action, noted.target_kind, noted.target) == ("device.revoked", "device", "cam-1")
    assert (noted.actor_kind, noted.actor, noted.address) == ("user", "otto", "192.0.2.7")
    assert noted.comment == "stolen in Lyon"
    assert noted.source == "POST /admin/devices/device/<path:object_id>/revoke/"
    assert detail(noted) == {"was": "active"}


def test_an_approvals_comment_is_kept(client: Client) -> None:
    entry = device(state=Device.State.PENDING)
    client.force_login(staff(operator()))
    client.post(
        reverse("admin:devices_device_approve", args=[entry.pk]), {"_form_submitted": "True", "comment": "seen by Ann"}
    )
    assert (newest().action, newest().comment) == ("device.approved", "seen by Ann")


def test_a_token_is_named_with_its_user(client: Client) -> None:
    entry = device(state=Device.State.PENDING)
    token = api_token(operator(), "operate")
    where = f"/api/v1/devices/{entry.pk}/approve/"
    client.post(where, {"comment": "by script"}, content_type="application/json", headers=_bearer(token))
    noted = newest()
    assert (noted.action, noted.actor_kind, noted.actor) == ("device.approved", "token", "script (otto)")
    assert noted.comment == "by script"
    assert token not in noted.source + noted.actor + noted.detail


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_an_enrolment_is_the_devices_doing(client: Client) -> None:
    entry, secret = enrolment_token()
    body = {"device": "till-9", "nonce": "0" * 32, "labels": {}, "sdk": "1"}
    client.post("/api/device/v1/enrol", body, content_type="application/json", headers=_bearer(secret))
    noted = newest()
    assert (noted.action, noted.actor_kind, noted.actor) == ("device.enrolled", "device", "till-9")
    assert detail(noted)["token"] == entry.name
    assert noted.address == "127.0.0.1"


def test_a_command_names_the_person_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/srv/fleet/manage.py", "campaign", "end", "secret-argument"])
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setenv("SUDO_USER", "ann")
    campaign(release().model)
    call_command("campaign", "end", "night", stdout=StringIO())
    noted = newest()
    assert (noted.action, noted.target) == ("campaign.changed", "night")
    assert (noted.actor_kind, noted.actor, noted.source) == ("command", "ann (as root)", "manage.py campaign")
    assert detail(noted) == {"model": "digits", "active": False}


def test_what_a_guard_does_is_the_guards_and_says_in_which_task() -> None:
    from fleet.rollouts import tasks

    started = running(release())
    entry = device()
    caller = Caller(Client(), entry)
    caller.post(event("failed", started.release, rollout=started, reason="crash"))
    tasks.tick.delay()
    noted = newest()
    assert (noted.action, noted.target) == ("rollout.halt", str(started.pk))
    assert (noted.actor_kind, noted.source) == ("guard", "task")
    assert detail(noted)["was"] == "running"


def test_a_task_is_named_and_forgotten_when_it_ends() -> None:
    from fleet.audit.tasks import seal

    seen: list[context.Acting] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "seal", lambda: seen.append(context.current()))
        seal.delay()
    assert [(who.kind, who.name) for who in seen] == [("task", "fleet.audit.tasks.seal")]
    assert context.current().kind == "command"


def test_nothing_leaks_from_one_request_to_another_under_threads(rf: RequestFactory) -> None:
    together = Barrier(8)

    def view(request: Any) -> Any:
        together.wait(20)  # all are inside at once
        return context.current()

    middleware = context.ActingMiddleware(view)

    def call(number: int) -> tuple[context.Acting, context.Acting]:
        within = middleware(rf.get("/", REMOTE_ADDR=f"192.0.2.{number}"))
        return within, context.current()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(1, 9)))
    assert [within.address for within, _ in results] == [f"192.0.2.{number}" for number in range(1, 9)]
    assert {after.kind for _, after in results} == {"command"}


def test_a_request_that_breaks_leaves_nobody_behind(rf: RequestFactory) -> None:
    def view(request: Any) -> Any:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        context.ActingMiddleware(view)(rf.get("/"))
    assert context.current().kind == "command"


def test_polls_and_events_write_no_entry(registry: Registry) -> None:
    registry.publish("1.0.0")
    caller = Caller(Client(), device())
    count = AuditEntry.objects.count()
    assert caller.poll().status_code == 200
    assert caller.post(event("health")).status_code == 200
    assert AuditEntry.objects.count() == count


@pytest.mark.parametrize(
    ("proxies", "forwarded", "expected"),
    [
        (0, "198.51.100.9", "192.0.2.1"),
        (1, "198.51.100.9", "198.51.100.9"),
        (1, "6.6.6.6, 198.51.100.9", "198.51.100.9"),  # what the client wrote itself stands left of ours
        (2, "6.6.6.6, 198.51.100.9, 10.0.0.1", "198.51.100.9"),
        (2, "198.51.100.9", "192.0.2.1"),  # fewer than our proxies: it did not come through them
        (1, "", "192.0.2.1"),
        (1, "rubbish", "192.0.2.1"),
        (1, "[2001:db8::1]:443", "2001:db8::1"),
    ],
)
def test_the_address_is_what_our_own_proxies_say(
    rf: RequestFactory, settings: Any, proxies: int, forwarded: str, expected: str
) -> None:
    settings.PROXIES = proxies
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    assert client_address(rf.get("/", REMOTE_ADDR="192.0.2.1", headers=headers)) == expected


def test_an_ipv6_customer_is_one_caller() -> None:
    assert caller_network("2001:db8::1") == caller_network("2001:db8::ffff:1") == "2001:db8::/64"
    assert caller_network("::ffff:192.0.2.1") == caller_network("192.0.2.1") == "192.0.2.1"
    assert caller_network("") == "unknown"


# --- what is recorded --------------------------------------------------------------------------------------------


def test_each_step_of_a_releases_and_a_rollouts_life_is_there(registry: Registry) -> None:
    registry.publish("1.0.0")
    registry.publish("1.1.0")
    with registry.run_on_commit(execute=True):
        registry.call(
            "POST", "/models/digits/role", content_type="application/json",
            data=json.dumps({"role": registry.role([], edit=lambda role: role.targets.pop("digits/1.0.0/default"))}),
        )  # fmt: skip
    from fleet.releases.models import Release

    started = running(Release.objects.get(version="1.1.0"))
    rollouts.pause(rollout=started, actor=user("ann"), comment="lunch")
    actions = list(AuditEntry.objects.order_by("pk").values_list("action", "target"))
    for expected in [
        ("trust.role_stored", "root"), ("trust.role_stored", "targets"), ("trust.role_stored", "digits"),
        ("model.created", "digits"), ("release.published", "digits 1.0.0"), ("release.found_valid", "digits 1.0.0"),
        ("release.revoked", "digits 1.0.0"), ("rollout.create", str(started.pk)), ("rollout.start", str(started.pk)),
        ("rollout.pause", str(started.pk)),
    ]:  # fmt: skip
        assert expected in actions
    assert newest("release.published").actor_kind == "token"
    assert newest("rollout.pause").comment == "lunch"
    assert detail(newest("rollout.pause"))["for"] == "ann"


def test_people_tokens_and_permissions_are_watched() -> None:
    person = user("ann", groups=["Operators"])
    assert detail(newest("user.groups_added")) == {"groups": ["Operators"]}
    person.set_password("another horse battery")
    person.save()
    assert detail(newest("user.changed")) == {"password": "set"}
    person.is_superuser = True
    person.save()
    assert detail(newest("user.changed")) == {"is_superuser": True}
    token, text = accounts.create_token(name="ci", scopes=["publish"], lifetime=timedelta(days=1))
    token.delete()
    assert newest("api_token.deleted").target == "ci"
    person.groups.clear()
    assert newest().action == "user.groups_cleared"
    person.delete()
    assert newest("user.deleted").target == "ann"
    assert text not in "".join(AuditEntry.objects.values_list("detail", flat=True))


def test_logging_in_is_no_change(client: Client) -> None:
    user("ann")
    before = newest().pk
    assert client.login(username="ann", password="correct horse battery")
    assert newest().pk == before


def test_what_a_version_brings_along_is_nobodys_doing() -> None:
    assert not AuditEntry.objects.filter(action__startswith="permissions.").exists()


def test_a_detail_of_any_kind_is_no_reason_to_fail() -> None:
    odd = {"nan": float("nan"), "when": timezone.now(), "set": {"b", "a"}, "nul": "a\x00b", 1: object}
    services.record("group.changed", target="x" * 500, detail=odd, comment="\x00")
    assert detail(newest())["set"] == ["a", "b"]
    assert detail(newest())["nul"] == "ab"
    assert len(newest().target) == 255


# --- pages -------------------------------------------------------------------------------------------------------


def test_a_viewer_looks_and_an_operator_exports_and_an_outsider_does_neither(client: Client) -> None:
    trail(2)
    page, export = reverse("admin:audit_auditentry_changelist"), reverse("admin:audit_auditentry_export")
    single = reverse("admin:audit_auditentry_change", args=[newest().pk])
    for person, may_look, may_export in [(outsider(), False, False), (viewer(), True, False), (operator(), True, True)]:
        client.force_login(staff(person))
        assert [client.get(where).status_code == 200 for where in (page, single, export)] == [
            may_look, may_look, may_export,
        ]  # fmt: skip
        assert (export in client.get(page).content.decode()) == may_export
    services.seal()
    start, links = exports.read(client.get(export).getvalue().decode().splitlines())
    assert not any(isinstance(step, Broken) for step in check(links, start=start))


def test_the_list_is_searched_and_filtered(client: Client) -> None:
    save_group(name="paris", selector="")
    device("cam-9")
    services.record("device.approved", target="cam-9", comment="seen by Ann")
    client.force_login(staff(viewer()))
    page = reverse("admin:audit_auditentry_changelist")
    for query in ("?q=Ann", "?action=device.approved", "?target_kind=device&target=cam-9"):
        text = client.get(page + query).content.decode()
        assert "Device approved" in text
        assert "cam-9" in text
        assert "paris" not in text


@pytest.mark.parametrize("kind", ["devices_device", "releases_release", "rollouts_rollout"])
def test_a_things_page_leads_to_its_trail(client: Client, kind: str) -> None:
    started = running(release())
    row = {"devices_device": device(), "releases_release": started.release, "rollouts_rollout": started}[kind]
    client.force_login(staff(viewer()))
    page = client.get(reverse(f"admin:{kind}_change", args=[row.pk])).content.decode()
    assert f"{reverse('admin:audit_auditentry_changelist')}?target_kind={kind.split('_')[1]}&amp;target=" in page
