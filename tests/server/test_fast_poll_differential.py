"""Whatever happens, a poll that is answered from memory is answered as Django would: hypothesis makes things happen."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from device_sdk.protocol.polls import Tag, running_digest
from fleet.devices import services as devices
from fleet.devices.models import Device
from fleet.errors import FleetError
from fleet.feedback import services as feedback
from fleet.releases import services as releases
from fleet.releases.models import Model, Release
from fleet.rollouts import services as rollouts
from fleet.rollouts import snapshots
from fleet.rollouts.models import Rollout
from fleet.rollouts.services import StagePlan
from fleet.trust import selectors as trust_selectors
from fleet.trust import services as trust_services
from tests.fleet_world import MODEL, device, event, group, post, release, running_set
from tests.registry import Registry
from tests.server.fast_world import Answer, Clock, Server, request, undone

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("bounded_memory")]
VERSIONS = ("1.0.0", "1.1.0", "2.0.0")
RUNS = ({}, {MODEL: "1.0.0/default"}, {MODEL: "2.0.0/default"}, {MODEL: "0.0.1/never-heard-of"})
LABELS = ({}, {"site": "berlin"}, {"site": "hamburg", "variant": "int8"})
MOVES = ("pause", "resume", "cancel", "roll_back")

who = st.integers(0, 1)
version = st.sampled_from(VERSIONS)
TAGS = ("held", "held", "held", "held", "old", "old", "none", "newer", "weak", "zeros", "bad")
QUERIES = ("root=1", "root=1", "root=1", "root=1", "", "root=0", "root=x", "root=1&a=b")
PLAIN: dict[str, str] = {}
ODD = (
    *[PLAIN] * 15, {"HTTP_HOST": "evil.example"}, {"method": "HEAD"}, {"HTTP_AUTHORIZATION": ""},
    {"HTTP_AUTHORIZATION": "Bearer 1.1.demo." + "A" * 32}, {"HTTP_X_FORWARDED_PROTO": "https"},
)  # fmt: skip
polled = st.tuples(
    st.just("poll"), who, st.sampled_from(TAGS), st.sampled_from([0, 1, 1, 1, 2, 2, 3]), st.sampled_from(QUERIES),
    st.sampled_from(ODD), st.integers(0, 1),
)  # fmt: skip
changed = st.one_of(
    st.tuples(st.just("start"), version, st.booleans(), st.sampled_from([30.0, 100.0])),
    st.tuples(st.just("move"), st.integers(0, 5), st.sampled_from(MOVES)),
    st.tuples(st.just("complete"), st.integers(0, 5)),
    st.tuples(st.just("pin"), who, st.sampled_from([None, *VERSIONS])),
    st.tuples(st.just("labels"), who, st.sampled_from(LABELS)),
    st.tuples(st.just("revoke"), who),
    st.tuples(st.just("reissue"), who),
    st.tuples(st.just("fail"), who, st.integers(0, 5)),
    st.tuples(st.just("withdraw"), version),
    st.tuples(st.just("sample"), st.integers(1, 20)),
    st.tuples(st.just("nothing"), st.sampled_from(list(Model.WhenNothing.values))),
    st.tuples(st.just("group"), st.sampled_from(["berlin", "hamburg"])),
    st.tuples(st.just("mirror"), st.sampled_from(["http://near", "http://nearer:8080", ""])),
    st.tuples(st.just("trust"), st.just(0)),
    st.tuples(st.just("wait"), st.sampled_from([1, 13, 25])),
    st.tuples(st.just("upgrade"), who),
)


@dataclass
class World:
    """Two devices, two web processes, and what can happen to them."""

    clock: Clock
    servers: list[Server] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # device to the view that it has
    past: dict[int, list[int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.devices = [device(f"cam-{number}", labels=LABELS[number]) for number in range(2)]
        self.site = group("site", site=["berlin"])
        self.releases = {version: release(version, variants=("default", "int8")) for version in VERSIONS}
        for runs in RUNS[:3]:
            running_set(runs)
        self.servers = [Server(), Server()]

    def happen(self, step: tuple[Any, ...]) -> None:
        with suppress(FleetError):  # what cannot happen now does not
            getattr(self, step[0])(*step[1:])

    def poll(self, number: int, tag: str, runs: int, query: str, odd: dict[str, str], process: int) -> None:
        """Both look first, as they do within a second; then memory and Django must say the same."""
        server, entry = self.servers[process], Device.objects.get(pk=self.devices[number].pk)
        environ = request(entry, self.tag(number, tag, running_digest(RUNS[runs])), query=query, **odd)
        server.look()
        answer, from_memory = server.poll(environ)
        django = server.by_django(environ)
        self.counts[f"{answer.status}{' from memory' if from_memory else ''}"] += 1
        assert answer.told == django.told, (from_memory, answer, django)
        self.note(number, answer)

    def tag(self, number: int, kind: str, runs: str) -> str | None:
        held = self.held.get(number, 0)
        old = (self.past.get(number) or [0])[0]
        views = {"held": held, "old": old, "newer": held + 50, "weak": held, "zeros": held}
        if kind == "none":
            return None
        if kind == "bad":
            return '"nonsense"'
        text = str(Tag(views[kind], runs))
        return {"weak": f"W/{text}", "zeros": f'"00{text[1:]}'}.get(kind, text)

    def note(self, number: int, answer: Answer) -> None:
        if answer.status == 200:
            self.past.setdefault(number, []).append(self.held.get(number, 0))
            self.held[number] = Tag.parse(answer.headers["ETag"]).view

    def start(self, version: str, grouped: bool, percent: float) -> None:
        stages = [StagePlan(percent=percent), *([StagePlan(percent=100)] if percent < 100 else [])]
        made = rollouts.create(
            release=Release.objects.get(pk=self.releases[version].pk), group=self.site if grouped else None,
            stages=stages, actor="ann",
        )  # fmt: skip
        rollouts.start(rollout=made, actor="ann")

    def move(self, number: int, action: str) -> None:
        getattr(rollouts, action)(rollout=self.rollout(number), actor="ann")

    def complete(self, number: int) -> None:
        Rollout.objects.filter(pk=self.rollout(number).pk).update(state=Rollout.State.COMPLETED)
        snapshots.bump()

    def rollout(self, number: int) -> Rollout:
        rows = list(Rollout.objects.order_by("pk"))
        if not rows:
            raise FleetError("none", "there is no rollout")
        return rows[number % len(rows)]

    def pin(self, number: int, version: str | None) -> None:
        entry = Device.objects.get(pk=self.devices[number].pk)
        rollouts.pin(device=entry, model=MODEL, version=version, actor="ann")

    def labels(self, number: int, labels: dict[str, str]) -> None:
        devices.set_labels(device=self.devices[number], labels=labels, actor="ann")

    def revoke(self, number: int) -> None:
        devices.revoke(device=Device.objects.get(pk=self.devices[number].pk), actor="ann")

    def reissue(self, number: int) -> None:
        devices.reissue(device=Device.objects.get(pk=self.devices[number].pk), actor="ann")

    def fail(self, number: int, rollout: int) -> None:
        row = self.rollout(rollout)
        rollouts.note_events(self.devices[number], [event("failed", row.release, rollout=row)])

    def withdraw(self, version: str) -> None:
        releases.revoke(release=Release.objects.get(pk=self.releases[version].pk), reason="no good")

    def sample(self, hours: int) -> None:
        ends = timezone.now() + timedelta(hours=hours)
        feedback.create_campaign(name=f"night-{timezone.now():%H%M%S%f}", model=Model.objects.get(), expires_at=ends)

    def nothing(self, policy: str) -> None:
        releases.set_when_nothing(model=Model.objects.get(), policy=policy)

    def group(self, site: str) -> None:
        devices.save_group(group=self.site, name="site", selector=f"site={site}", mirror=self.site.mirror)

    def mirror(self, address: str) -> None:
        devices.save_group(group=self.site, name="site", selector=self.site.selector, mirror=address)

    def trust(self, _: int) -> None:
        newest = trust_selectors.newest("other")
        trust_services.store_role("other", newest.version + 1 if newest else 1, b"{}", timezone.now())

    def wait(self, hours: float) -> None:
        self.clock.wait(hours)

    def upgrade(self, number: int) -> None:
        devices.record_events(self.devices[number], post(sdk=f"0.2.{number}"), exists=lambda runs: True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(snapshots, "MAX_AGE", 0)  # Django sees a group's change at once
    return Clock(monkeypatch)


def test_memory_and_django_answer_every_poll_alike(registry: Registry, clock: Clock) -> None:
    """Status, entity tag, what else a device acts upon, and the body to the byte."""
    counts = Counter[str]()
    rounds = st.lists(st.tuples(changed, st.lists(polled, max_size=3), who, st.integers(0, 1)), min_size=4, max_size=6)

    @settings(max_examples=12, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(rounds=rounds)
    def run(rounds: list[tuple[Any, ...]]) -> None:
        clock.reset()
        with undone():
            world = World(clock)
            for change, polls, number, process in rounds:
                usual = [("poll", number, tag, 1, "root=1", PLAIN, process) for tag in ("held", "held", "old")]
                for step in (change, *polls, *usual):
                    world.happen(step)
            counts.update(world.counts)

    run()
    assert min(counts["304 from memory"], counts["200 from memory"]) > 20, counts
