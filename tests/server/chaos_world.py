"""What must hold whatever breaks, on a real PostgreSQL, in a process of its own: `test_chaos.py` reads the verdicts.

Run as a program: it prints one JSON object, scenario to "held" or to what went wrong. Arguments: only these functions.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import django

RESULT = "chaos: "
LEAST_DEATHS, MOST_DEATHS = 5, 60  # of processes, until a tick at which five rollouts move is done
ROUNDS = 2


def main() -> None:
    django.setup()
    from django.core.management import call_command

    from fleet.notices import tasks as notices
    from fleet.rollouts import tasks as rollouts
    from fleet.rollouts.counting import tallies

    call_command("migrate", verbosity=0)
    tallies.BUDGET = 60.0  # a tick of a busy machine counts all the same: this is not about who comes first
    notices.deliver.delay, rollouts.tick.delay = void, void  # nobody is told but by the sweeps
    chosen = {name: act for name, act in SCENARIOS.items() if not sys.argv[1:] or act.__name__ in sys.argv[1:]}
    sys.stdout.write(RESULT + json.dumps({name: verdict(act) for name, act in chosen.items()}) + "\n")


def verdict(act: Callable[[], None]) -> str:
    from django.db import connection

    from fleet.rollouts.models import EngineClock

    began = time.monotonic()
    EngineClock.objects.all().delete()  # another scenario's jumps are no part of this one
    try:
        act()
    except BaseException:  # noqa: BLE001  # whatever it is, it is told
        connection.close()
        sys.stderr.write(f"{act.__name__}: {traceback.format_exc()}")
        return traceback.format_exc()[-3000:]
    sys.stderr.write(f"{act.__name__}: {time.monotonic() - began:.1f} s\n")
    return "held"


# --- a fleet in the middle of everything --------------------------------------------------------------------------


@dataclass
class World:
    """Five rollouts at a tick at which each of them moves."""

    passing: Any
    failing: Any
    due: Any
    retried: Any
    late: Any

    def check(self) -> None:
        """Each moved, once, and was told of once; nothing is half done."""
        from fleet.rollouts.models import Outcome, Rollout

        for row in vars(self).values():
            row.refresh_from_db()
        told(self.passing, "running", ["create", "start", "advance"])
        first, second = self.passing.stages.all()
        assert (self.passing.stage_index, first.passed_at is not None, second.entered_at is not None) == (1, True, True)
        told(self.failing, "halted", ["create", "start", "halt"])
        told(self.due, "running", ["create", "schedule", "start"])
        assert self.due.stages.get(index=0).entered_at is not None
        again = Outcome.objects.get(rollout=self.retried)
        assert (again.state, again.step, again.tries, again.retry_at) == ("updating", "retry", 1, None), vars(again)
        assert Outcome.objects.get(rollout=self.late).step == "timed_out"
        Rollout.objects.filter(pk__in=[row.pk for row in vars(self).values()]).update(state="cancelled")


def told(rollout: Any, state: str, actions: list[str]) -> None:
    """Its history, the audit trail and the notices say the same, each thing once."""
    from fleet.audit.models import AuditEntry
    from fleet.notices.models import Delivery, Notice

    assert rollout.state == state, (rollout.state, rollout.reason)
    assert list(rollout.actions.values_list("action", flat=True)) == actions
    entries = AuditEntry.objects.filter(target_kind="rollout", target=str(rollout.pk)).order_by("pk")
    assert [entry.action.partition(".")[2] for entry in entries] == actions
    notices = [row for row in Notice.objects.all() if json.loads(row.body)["data"].get("rollout") == rollout.pk]
    assert len(notices) == len(actions) - 1  # a draft is nobody's news
    assert Delivery.objects.filter(notice__in=notices).count() == len(notices)


def world() -> World:
    from django.utils import timezone

    from fleet.notices.models import Subscription
    from fleet.rollouts import services
    from fleet.rollouts.models import Outcome, Rollout
    from fleet.rollouts.services import StagePlan
    from fleet.rollouts.terms.pace import Pace
    from tests.fleet_world import device, release, subscription

    if not Subscription.objects.exists():
        subscription()
    mark = os.urandom(4).hex()
    entry = device(f"cam-{mark}", model_names=[f"{name}-{mark}" for name in "abcde"])
    ever = StagePlan(percent=100, soak_seconds=10**8, failure_budget=9)
    plans = {"a": [StagePlan(percent=99.99, success_threshold=0), ever], "b": [StagePlan(percent=100)]}

    def begun(letter: str, **pace: Any) -> Any:
        target, stages = release(model=f"{letter}-{mark}"), plans.get(letter, [ever])
        made = services.create(release=target, group=None, stages=stages, actor="ann", pace=Pace(**pace))
        return services.start(rollout=made, actor="ann")

    now = timezone.now()
    made = World(begun("a"), begun("b"), begun("c", start_at=now + timedelta(hours=1)), begun("d"), begun("e"))
    early = now - timedelta(days=30)
    for rollout, state, more in (
        (made.passing, "committed", {}),
        (made.failing, "failed", {"step": "rolled_back"}),
        (made.retried, "failed", {"step": "failed", "reason": "disk", "retry_at": early}),
        (made.late, "updating", {"tried_at": early}),
    ):
        Outcome.objects.create(rollout=rollout, device=entry, state=state, **more)
    Rollout.objects.filter(pk=made.due.pk).update(start_at=early)
    return made


def tick() -> None:
    from fleet.rollouts import services

    services.tick()


def forked(act: Callable[[], None]) -> int:
    """Run in a process of its own with a connection of its own; its pid."""
    from django.db import connection

    connection.close()
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(*pids: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


# --- what breaks ----------------------------------------------------------------------------------------------------


def two_engines() -> None:
    """Three, in processes of their own, at the same moment."""
    for _ in range(ROUNDS):
        made = world()
        reading, writing = os.pipe()

        def engine(start: int = reading, unused: int = writing) -> None:
            os.close(unused)
            tick_once_connected(start)

        pids = [forked(engine) for _ in range(3)]
        os.close(reading)
        os.close(writing)  # all of them see the end of the pipe at once
        assert ended(*pids) == [0, 0, 0]
        made.check()


def tick_once_connected(start: int) -> None:
    from django.db import connection

    connection.ensure_connection()
    os.read(start, 1)
    tick()
    tick()


def killed_worker() -> None:
    """SIGKILL after each commit, which is all that a death leaves behind: of each process, after its second one.

    Its first one notes the time; so each gets one step farther, until one finds nothing to do and lives.
    """
    made, died = world(), 0
    while (code := ended(forked(lambda: killed_after_commit(2)))[0]) == -signal.SIGKILL:
        died += 1
        assert died < MOST_DEATHS, "no tick gets any farther"
    assert code == 0
    assert died >= LEAST_DEATHS, died
    made.check()


def killed_after_commit(number: int) -> None:
    """Tick, and die after so many commits that wrote something: transactions, and statements that are one each."""
    from django.db import connection

    real, seen, wrote = connection.commit, 0, False

    def committed() -> None:
        nonlocal seen, wrote
        wrote, seen = False, seen + 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def commit() -> None:
        real()
        if wrote:
            committed()

    def noting(execute: Any, sql: str, values: Any, many: bool, context: Any) -> Any:
        nonlocal wrote
        answer = execute(sql, values, many, context)
        if sql.startswith(("INSERT", "UPDATE", "DELETE")) and context["cursor"].rowcount:
            wrote = True
            if not connection.in_atomic_block:
                committed()
        return answer

    connection.commit = commit  # type: ignore[method-assign]
    with connection.execute_wrapper(noting):
        tick()


def statements_of(made: World) -> int:
    from django.db import connection

    seen = []
    with connection.execute_wrapper(lambda execute, *rest: (seen.append(1), execute(*rest))[1]):
        tick()
    tick()
    made.check()
    return len(seen)


def at_statement(number: int, act: Callable[[], object]) -> None:
    """Tick, and let something happen just before a statement."""
    from django.db import connection

    seen = 0

    def counting(execute: Any, *rest: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            act()
        return execute(*rest)

    with connection.execute_wrapper(counting):
        tick()


def restarted_database() -> None:
    """Crashed and started anew in the middle of a tick: what was not committed is not there, and is done again."""
    from django.db import connection

    made = world()
    total = statements_of(world())
    for number in (3, total // 2):
        with suppress(django.db.Error):
            at_statement(number, crash)
        connection.close()  # as between two tasks
        await_recovery()
    tick()
    tick()
    made.check()


def crash() -> None:
    """The whole server, as PostgreSQL does when one of its processes dies: all connections end, and it recovers."""
    from django.db import connection

    os.kill(connection.connection.info.backend_pid, signal.SIGKILL)


def await_recovery() -> None:
    from django.db import OperationalError, connection

    deadline = time.monotonic() + 30
    while True:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            return
        except OperationalError:
            connection.close()
            assert time.monotonic() < deadline, "the database does not come back"
            time.sleep(0.05)


def lost_broker() -> None:
    """Nothing that happened is lost with the messages: the sweeps find it all."""
    from fleet.celery import app
    from fleet.notices import services as notices
    from fleet.notices import tasks
    from fleet.notices.models import Delivery

    app.conf.task_always_eager = False
    kept, app.conf.broker_url = app.conf.broker_url, "redis://127.0.0.1:1/0"
    app.conf.task_publish_retry_policy = {"max_retries": 0}
    del tasks.deliver.delay
    try:
        with posted() as keys:
            Delivery.objects.all().delete()
            made = world()
            tick()
            tick()
            assert keys == []
            waiting = set(Delivery.objects.filter(state="pending").values_list("notice__key", flat=True))
            notices.sweep()
            assert set(keys) == waiting
            assert len(keys) == len(waiting) >= 5
            made.check()
    finally:
        app.conf.task_always_eager, app.conf.broker_url = True, kept
        tasks.deliver.delay = void


@contextmanager
def posted() -> Iterator[list[str]]:
    """In place of the world: the ids that were posted, by whatever process."""
    from fleet.notices import webhooks

    path = Path(os.environ["FLEET_VAR"]) / f"posted-{os.urandom(4).hex()}"
    path.touch()
    real, keys = webhooks.post, Lines(path)

    def post(_url: str, message: Any, **_: Any) -> None:
        with path.open("a") as file:
            file.write(message.key + "\n")

    webhooks.post = post  # type: ignore[assignment]
    try:
        yield keys
    finally:
        webhooks.post = real


class Lines(list[str]):
    """A file's, as they are when they are looked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __iter__(self) -> Iterator[str]:
        return iter(self.path.read_text().split())

    def __len__(self) -> int:
        return len(self.path.read_text().split())

    def __eq__(self, other: object) -> bool:
        return [*self] == other

    __hash__ = None  # type: ignore[assignment]


def two_senders() -> None:
    """Three at once, and one that dies before it can note what it sent: each id goes out, and is known again."""
    from django.utils import timezone

    from fleet.notices import services as notices
    from fleet.notices.models import Delivery

    Delivery.objects.all().delete()
    with posted() as keys:
        for number in range(20):
            notices.publish("rollout.halted", f"notice {number}", {})
        assert ended(*(forked(lambda: void(notices.sweep())) for _ in range(3))) == [0, 0, 0]
        assert len(keys) == len(set(keys)) == 20
        assert set(Delivery.objects.values_list("state", flat=True)) == {"sent"}
        notices.publish("rollout.halted", "one more", {})
        row = Delivery.objects.get(state="pending")

        def dies_after_sending() -> None:
            real = notices._send

            def send(*arguments: Any) -> None:
                real(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            notices._send = send
            notices.sweep()

        assert ended(forked(dies_after_sending)) == [-signal.SIGKILL]
        assert notices.sweep() == 0  # it may still be at it
        Delivery.objects.filter(pk=row.pk).update(next_at=timezone.now())
        assert notices.sweep() == 1
        assert [*keys][-2:] == [row.notice.key] * 2  # twice, and the receiver knows it by its id
        assert Delivery.objects.get(pk=row.pk).state == "sent"


def void(*_: object) -> None:
    return None


def jumping_clock() -> None:
    """A year ahead and back between ticks, and the other way round."""
    from django.utils import timezone

    from fleet.rollouts.models import Outcome, Rollout

    real: Callable[[], datetime] = timezone.now
    made = world()
    tick()
    tick()
    fresh = world()
    Outcome.objects.filter(rollout=fresh.late).update(tried_at=real())
    Rollout.objects.filter(pk=fresh.due.pk).update(start_at=real() + timedelta(days=900))
    for days in (365, -365):
        timezone.now = lambda span=timedelta(days=days): real() + span  # type: ignore[assignment]
        try:
            tick()
            tick()
        finally:
            timezone.now = real
        tick()
        tick()
        fresh.due.refresh_from_db()
        assert (fresh.due.state, Outcome.objects.get(rollout=fresh.late).state) == ("scheduled", "updating")
        fresh.passing.refresh_from_db()
        assert (fresh.passing.state, fresh.passing.stage_index) == ("running", 1)  # its second stage soaks for years
    made.check()
    fresh.failing.refresh_from_db()
    told(fresh.failing, "halted", ["create", "start", "halt"])
    Rollout.objects.update(state="cancelled")


def two_people() -> None:
    """One approves and one rejects at the same moment: one of them did, and the other is told."""
    from django.contrib.auth.models import User
    from django.db import connection

    from fleet.errors import Conflict
    from fleet.rollouts import deciding, services
    from fleet.rollouts.models import Rollout
    from fleet.rollouts.terms.pace import Pace
    from tests.fleet_world import AT_ONCE, release

    anna, bob, carl = (User.objects.create_superuser(name, password=name * 5) for name in ("anna", "bob", "carl"))
    for number in range(3):
        target = release(f"{number}.0.0", model="people")
        made = services.create(release=target, group=None, stages=AT_ONCE, actor=anna, pace=Pace(needs_approval=True))
        services.start(rollout=made, actor=anna)
        barrier, refused = threading.Barrier(2), []

        def decide(act: Any, who: User, pk: int = made.pk, at: Any = barrier, lost: Any = refused) -> None:
            at.wait()
            try:
                act(rollout=pk, actor=who, comment="mine")
            except Conflict as error:
                lost.append(error.code)
            finally:
                connection.close()

        pair = [threading.Thread(target=decide, args=job) for job in ((deciding.approve, bob), (deciding.reject, carl))]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()
        row = Rollout.objects.get(pk=made.pk)
        done = ["create", "submit", *(["approve", "start"] if row.state == "running" else ["reject"])]
        assert refused == ["wrong_state"]
        told(row, row.state, done)


SCENARIOS: dict[str, Callable[[], None]] = {
    "two engines at once": two_engines,
    "a worker killed in mid-tick": killed_worker,
    "a lost broker": lost_broker,
    "two senders, and one that is killed": two_senders,
    "a clock that jumps": jumping_clock,
    "two people at once": two_people,
    "a restarted database": restarted_database,
}

if __name__ == "__main__":
    main()
