"""A small fleet whose devices report quality numbers, by the door that devices use."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from django.test import Client

from device_sdk.protocol import events
from fleet.releases.models import Release
from fleet.rollouts import policy, services, snapshots
from fleet.rollouts.models import Rollout, Sheet
from fleet.rollouts.services import StagePlan
from tests.fleet_world import MODEL, Caller, completed, devices, event, release, running
from tests.server import slow_counts

GUARDS: Mapping[str, Any] = {"errors": {}, "false_alarm": 0.3, "devices": 1}  # so lax that few devices can show it
OLD_LOAD, NEW_LOAD = "0000000a", "0000000b"
HALVES = (StagePlan(percent=50, success_threshold=1.0, min_reports=4), StagePlan(percent=100, success_threshold=1.0))


def numbers(load: str, calls: int, errors: int = 0, **more: Any) -> dict[str, Any]:
    return {"load": load, "calls": calls, "errors": errors, "checked": calls, "invalid": 0, "p95_us": 2_000, **more}


def _halved(rollout: Rollout, names: Sequence[str]) -> Rollout:
    """With a salt by which half of the group is half of these devices."""
    salts = (f"salt-{number}" for number in count())
    fair = (salt for salt in salts if sum(policy.in_cohort(salt, name, 50) for name in names) == len(names) // 2)
    Rollout.objects.filter(pk=rollout.pk).update(salt=next(fair))
    snapshots.bump()
    rollout.refresh_from_db()
    return rollout


class GuardedFleet:
    """Devices on 1.0.0, and a rollout of 1.1.0 with guards. Each device reports as the SDK does."""

    def __init__(
        self, client: Client, number: int = 8, *, guards: Mapping[str, Any] | None = GUARDS, **more: Any
    ) -> None:
        self.old, self.new = release("1.0.0"), release("1.1.0")
        completed(self.old)
        made = devices(number, runs={MODEL: "1.0.0/default"})
        self.callers = [Caller(client, entry, {MODEL: "1.0.0/default"}) for entry in made]
        self.rollout = running(self.new, **{"guards": guards, "stages": HALVES, **more})
        self.rollout = _halved(self.rollout, [entry.name for entry in made])
        for caller in self.callers:  # each has run the old release for a while
            self.health(caller, self.old, numbers(OLD_LOAD, 1_000, 5))
        exposed = {entry.pk for entry in slow_counts.assigned(self.rollout)}
        self.exposed = [caller for caller in self.callers if caller.device.pk in exposed]
        self.others = [caller for caller in self.callers if caller.device.pk not in exposed]

    def health(self, caller: Caller, target: Release, detail: Mapping[str, Any]) -> None:
        about = self.rollout if target == self.new else ""
        self.say(caller, event(events.HEALTH, target, rollout=about, detail=detail))

    @staticmethod
    def say(caller: Caller, *told: events.Event) -> None:
        assert caller.post(*told).status_code == 200

    def stays(self, caller: Caller, *, errors: int = 0, calls: int = 100) -> None:
        """An unexposed device goes on."""
        self.health(caller, self.old, numbers(OLD_LOAD, 1_000 + calls, 5 + errors))

    def updates(self, caller: Caller, *, errors: int = 0, calls: int = 100, load: str = NEW_LOAD, **more: Any) -> None:
        """An exposed device commits after ten calls, and then tells of more."""
        self.commits(caller, load)
        self.health(caller, self.new, numbers(load, calls, errors, **more))

    def commits(self, caller: Caller, load: str = NEW_LOAD) -> None:
        caller.runs = {MODEL: "1.1.0/default"}
        began = event(events.PROBATION, self.new, rollout=self.rollout)
        self.say(caller, began, event(events.COMMITTED, self.new, rollout=self.rollout, detail=numbers(load, 10)))

    def live(self, *, errors: int = 0, exposed: Sequence[Caller] | None = None) -> "GuardedFleet":
        """The exposed update and err so often in a hundred calls; the others go on."""
        for caller in self.others:
            self.stays(caller, errors=1)
        for caller in self.exposed if exposed is None else exposed:
            self.updates(caller, errors=errors)
        return self

    def tick(self) -> Rollout:
        services.tick()
        self.rollout = Rollout.objects.select_related("release__model", "group").get(pk=self.rollout.pk)
        return self.rollout

    def compared(self, guard: str = "errors") -> dict[tuple[int, int], tuple[int, int]]:
        """Devices folded so far, exposed and unexposed, by stage and age."""
        rows = Sheet.objects.filter(rollout=self.rollout, run=self.rollout.evidence_run)
        return {
            (row.stage, row.age): (row.sides[guard][0]["devices"], row.sides[guard][1]["devices"])
            for row in rows
            if guard in row.sides
        }
