"""What the idle poll needs to know of the whole fleet, in arrays by the device's key. No IO; callers pass the time.

It says that the view a device holds is the present one, or nothing: who gets no answer here asks Django. The loader
alone writes what the database says, under the lock; request threads write only what they have proved from it, under
the same lock, so that nothing proved from an older row outlives that row. Reading needs no lock.

Two columns are memos of texts that were checked in full, kept as the interpreter's keyed 64-bit hash: a credential, and
an entity tag. Both are worth nothing in another process, and are wiped by whatever changes the row.
"""

import threading
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from device_sdk.protocol.assignment import Assignment, Sampling
from device_sdk.protocol.polls import Tag
from fleet.rollouts import policy
from fleet.rollouts.selectors import Pins, facts_of
from fleet.trust import inputs

NEVER = 0xFFFF_FFFF
PLANS, ASSIGNED, RUNNING_SETS = 20_000, 20_000, 100_000  # kept at most; then afresh
SPARSE = 1 << 20  # keys may run so far ahead of eight times the number of devices


@dataclass(frozen=True, slots=True)
class World:
    """What holds for all devices: the policy, what is sampled of which model, and the trust's digest."""

    snapshot: policy.Snapshot
    sampling: Mapping[str, Sampling]
    trust: str


class Row(NamedTuple):
    """A device as the database has it. `epoch` 0: its credential is not to be taken; `until`: seconds of the epoch."""

    device: int
    name: str
    epoch: int
    traits: policy.Traits
    view: int
    until: int
    signed_for: str  # `DeviceView.inputs_digest`
    pins: Mapping[str, str]
    failed: frozenset[int]


class Table:
    """About 70 bytes for each device; devices with pins or failures have a dictionary entry besides."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.devices = 0
        self.epoch, self.kind = array("I", [0]), array("I", [0])  # no device has the key 0
        self.view, self.until, self.signed_for = array("Q", [0]), array("I", [0]), array("Q", [0])
        self.proof, self.told = array("q", [0]), array("q", [0])  # hashes of a credential and of a tag; 0: none
        self.settled = array("I", [0])  # the world in which `told` was found right
        self.name_at, self._names = array("I", [0]), bytearray(1)
        self.since = array("I", [NEVER])  # by kind of device: since which world its plan is the same; NEVER: look
        self._kinds: dict[policy.Traits, int] = {}
        self._traits: list[policy.Traits] = [policy.Traits()]
        self._pins: dict[int, Mapping[str, str]] = {}
        self._failed: dict[int, frozenset[int]] = {}
        self._pinned_to = Pins({})
        self.running_sets: dict[str, Mapping[str, str]] = {}
        self.world: World | None = None
        self._number = 0
        self._plans: dict[int, tuple[policy.Plan, int]] = {}
        self._assigned: dict[tuple[Assignment, ...], str] = {}

    # --- what the database says: the loader ----------------------------------------------------------------------

    def put(self, rows: Iterable[Row]) -> None:
        for row in rows:
            with self.lock:
                if self._has_room(row.device):
                    self._put(row)

    def adopt(self, world: World) -> None:
        """Whatever was settled must be looked at again, once, where the plan for that kind of device changed."""
        if world == self.world:
            return
        with self.lock:
            old, self.world, self._number = self.world, world, self._number + 1
            if old is None or replace(old, snapshot=world.snapshot) != world or len(self._plans) > PLANS:
                self._plans = {}  # else each is compared with the new one when it is needed
            self._assigned = {}
            self.since = array("I", [NEVER]) * len(self._traits)

    def know(self, running_sets: Mapping[str, Mapping[str, str]]) -> None:
        with self.lock:
            if len(self.running_sets) > RUNNING_SETS:
                self.running_sets = {}
            self.running_sets.update(running_sets)

    def lead(self, pins: Pins) -> None:
        """Where pins lead. Comes before the rows that have them."""
        with self.lock:
            self._pinned_to = pins
            for device in self._pins:
                self.told[device] = 0

    @property
    def trust(self) -> str:
        return self.world.trust if self.world else ""

    def pins(self) -> set[tuple[str, str]]:
        """Models and versions to which devices are pinned."""
        return set(chain.from_iterable(pins.items() for pins in self._pins.values()))

    def holds(self, device: int, view: int) -> bool:
        return device < len(self.view) and self.view[device] == view

    @property
    def size(self) -> int:
        """Bytes of what grows with the fleet: the columns and the names."""
        return sum(column.itemsize * len(column) for column in self._columns()) + len(self._names)

    def _has_room(self, device: int) -> bool:
        """A table with a row for every key; keys that are far apart would make it large for few devices."""
        missing = device + 1 - len(self.epoch)
        if missing > 0:
            if device > 8 * self.devices + SPARSE:
                return False
            for column in self._columns():
                column.frombytes(bytes(column.itemsize * missing))
        return True

    def _columns(self) -> tuple["array[int]", ...]:
        return (self.epoch, self.kind, self.view, self.until, self.signed_for, self.proof, self.told, self.settled,
                self.name_at)  # fmt: skip

    def _put(self, row: Row) -> None:
        device = row.device
        self.told[device] = 0
        if self.epoch[device] != row.epoch:
            self.proof[device] = 0
        if not self.name_at[device]:
            self.devices += 1
            self.name_at[device] = len(self._names)
            text = row.name.encode()
            self._names += len(text).to_bytes(1, "big") + text
        self.epoch[device], self.kind[device] = row.epoch, self._kind(row.traits)
        self.view[device], self.until[device] = row.view, max(row.until, 0)
        self.signed_for[device] = _short(row.signed_for)
        _set(self._pins, device, row.pins)
        _set(self._failed, device, row.failed)

    def _kind(self, traits: policy.Traits) -> int:
        kind = self._kinds.get(traits)
        if kind is None:
            kind = self._kinds[traits] = len(self._traits)
            self._traits.append(traits)
            self.since.append(NEVER)
        return kind

    # --- what was proved from it: request threads ----------------------------------------------------------------

    def admit(self, device: int, epoch: int, credential: str) -> bool:
        """Note that a credential is good, if it is of the present epoch."""
        with self.lock:
            if device >= len(self.epoch) or not epoch or self.epoch[device] != epoch:
                return False
            self.proof[device] = hash(credential)
            return True

    def current(self, device: int, tag: Tag, text: str) -> int:
        """The version of the stored view, if it is signed for what the device should run, given what its tag says that
        it runs; else 0. Notes so for the next poll, where the tag names that very view.
        """
        with self.lock:
            view = self.view[device]
            if self.world is None or not view or tag.runs not in self.running_sets:
                return 0
            plan = self._plan(self.kind[device], self.world)
            if _short(self._digest(device, plan, self.world, self.running_sets[tag.runs])) != self.signed_for[device]:
                return 0
            if tag.view == view and text == str(tag):
                self.told[device], self.settled[device] = hash(text), self._number
            return view

    def name(self, device: int) -> str:
        at = self.name_at[device]
        return self._names[at + 1 : at + 1 + self._names[at]].decode()

    def _plan(self, kind: int, world: World) -> policy.Plan:
        """The plan in force. Where it says what the last one said, what was settled by that stays settled."""
        held, since = self._plans.get(kind), self.since[kind]
        if held is not None and since != NEVER:
            return held[0]
        plan = policy.plan(world.snapshot, self._traits[kind])
        if since == NEVER:
            since = held[1] if held is not None and held[0] == plan else self._number
        if len(self._plans) > PLANS:
            self._plans = {}
        self._plans[kind], self.since[kind] = (plan, since), since
        return plan

    def _digest(self, device: int, plan: policy.Plan, world: World, runs: Mapping[str, str]) -> str:
        facts = facts_of(
            name=self.name(device),
            traits=plan.traits,
            pins=self._pins.get(device, {}),
            pinned=self._pinned_to,
            runs=runs,
            failed=self._failed.get(device, frozenset()),
        )
        assigned = tuple(policy.decide(plan, facts).values())
        digest = self._assigned.get(assigned)
        if digest is None:
            if len(self._assigned) > ASSIGNED:
                self._assigned = {}
            sampled = [replace(item, sampling=world.sampling.get(item.model)) for item in assigned]
            digest = self._assigned[assigned] = inputs.of_assignments(sampled)
        return inputs.of_view(facts.name, digest, world.trust)


def _short(digest: str) -> int:
    return int(digest[:16] or "0", 16)


def _set(entries: dict[int, Any], device: int, value: Any) -> None:
    if value:
        entries[device] = value
    else:
        entries.pop(device, None)
