"""A fleet whose devices report quality numbers, through the door that devices use."""

from collections.abc import Mapping
from typing import Any

from django.test import Client

from device_sdk.protocol import events
from fleet.devices.models import Device
from fleet.releases.models import Release
from fleet.rollouts import selectors, services
from fleet.rollouts.models import Rollout
from tests.fleet_world import MODEL, Caller, completed, device, event, release, running
from tests.fleet_world import devices as make_devices

GUARDS: Mapping[str, Any] = {"errors": {}, "calls": 50, "devices": 1}
OLD_LOAD, NEW_LOAD = "0000000a", "0000000b"


def numbers(load: str, calls: int, errors: int = 0, **more: Any) -> dict[str, Any]:
    return {"load": load, "calls": calls, "errors": errors, "checked": calls, "invalid": 0, "p95_us": 2_000, **more}


class GuardedFleet:
    """Devices on 1.0.0, and a rollout of 1.1.0 with guards. Each device reports as the SDK does."""

    def __init__(self, client: Client, number: int, *, guards: Mapping[str, Any] = GUARDS, **more: Any) -> None:
        self.old, self.new = release("1.0.0"), release("1.1.0")
        completed(self.old)
        self.callers = [Caller(client, entry, {MODEL: "1.0.0/default"}) for entry in self._made(number)]
        self.rollout = running(self.new, guards=guards, **more)

    @staticmethod
    def _made(number: int) -> list[Device]:
        return make_devices(number, runs={MODEL: "1.0.0/default"})

    def health(self, caller: Caller, target: Release, detail: Mapping[str, Any]) -> None:
        about = self.rollout if target == self.new else ""
        assert caller.post(event(events.HEALTH, target, rollout=about, detail=detail)).status_code == 200

    def settled(self) -> None:
        """Every device has run the old release for a while, and has told so."""
        for caller in self.callers:
            self.health(caller, self.old, numbers(OLD_LOAD, 1_000, 5))

    def stays(self, caller: Caller, *, errors: int = 0, calls: int = 100) -> None:
        """An unexposed device goes on."""
        self.health(caller, self.old, numbers(OLD_LOAD, 1_000 + calls, 5 + errors))

    def updates(self, caller: Caller, *, errors: int = 0, calls: int = 100, **more: Any) -> None:
        """An exposed device commits; what it then tells of the new release decides."""
        caller.runs = {MODEL: "1.1.0/default"}
        began = event(events.PROBATION, self.new, rollout=self.rollout)
        done = event(events.COMMITTED, self.new, rollout=self.rollout, detail=numbers(NEW_LOAD, 10))
        assert caller.post(began, done).status_code == 200
        self.health(caller, self.new, numbers(NEW_LOAD, calls, errors, **more))

    def split(self) -> tuple[list[Caller], list[Caller]]:
        """The exposed by the policy itself, and the others."""
        exposed = {entry.pk for entry in selectors.assigned_devices(self.rollout)}
        return [c for c in self.callers if c.device.pk in exposed], [
            c for c in self.callers if c.device.pk not in exposed
        ]

    def tick(self) -> Rollout:
        services.tick()
        self.rollout = Rollout.objects.select_related("release__model", "group").get(pk=self.rollout.pk)
        return self.rollout


__all__ = ["GUARDS", "GuardedFleet", "device", "numbers"]
