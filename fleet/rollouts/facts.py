"""What the policy is told: rollouts in force, and what is known of a device. Values only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from device_sdk.protocol.abilities import UNSAID, Abilities
from device_sdk.protocol.assignment import ALWAYS, MAX_HOLD, NO_CONDITIONS, Conditions, Probation, Window
from device_sdk.protocol.manifest import Requirements
from fleet.devices.mirrors import NO_MIRRORS, Mirrors
from fleet.devices.selection import EVERY, Selector

DRAFT, AWAITING_APPROVAL, RUNNING, PAUSED = "draft", "awaiting_approval", "running", "paused"
HALTED, CANCELLED, COMPLETED = "halted", "cancelled", "completed"
IN_FORCE = frozenset({RUNNING, PAUSED, COMPLETED})  # the others admit nobody

NO_FLOORS = Requirements()


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """The signed manifest of a variant. `length` in bytes."""

    length: int
    sha256: str
    requires: Requirements = NO_FLOORS


@dataclass(frozen=True, slots=True)
class ReleaseRef:
    """A valid release and its valid variants. `floors`: the valid releases to step through, by version."""

    model: str
    version: str
    variants: Mapping[str, ManifestRef]
    floors: Mapping[str, "ReleaseRef"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RolloutRules:
    """A rollout as far as devices are concerned: its group is `selector` without `excludes`.

    `percent` and `rings` are those of the stages up to the one in force.
    """

    id: int
    state: str
    release: ReleaseRef
    salt: str
    percent: float
    selector: Selector = EVERY
    excludes: tuple[Selector, ...] = ()
    rings: tuple[Selector, ...] = ()
    urgent: bool = False
    window: Window = ALWAYS
    probation: Probation = field(default_factory=Probation)
    conditions: Conditions = NO_CONDITIONS
    max_hold: int = MAX_HOLD
    forgive: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The policy in force: rollouts by model, the newest first. `stops`: models to stop where nothing may run."""

    rollouts: Mapping[str, Sequence[RolloutRules]] = field(default_factory=dict)
    stops: frozenset[str] = frozenset()
    mirrors: Mirrors = NO_MIRRORS


@dataclass(frozen=True, slots=True)
class Traits:
    """What many devices share: their labels (sorted pairs), their models, and what they can run. Hashable.

    Empty text, 0 and none: the device does not say. `memory` in bytes, rounded down.
    """

    labels: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()
    sdk: str = ""
    runtime: str = ""
    opset: int = 0
    memory: int = 0
    arch: str = ""
    providers: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, labels: Mapping[str, str], models: Iterable[str], *, sdk: str = "", abilities: Abilities = UNSAID
    ) -> "Traits":
        """Memory is rounded down by at most 1/16, so that devices of one kind have the same traits."""
        step = 1 << max(abilities.memory.bit_length() - 5, 0)
        return cls(
            labels=tuple(sorted(labels.items())),
            models=tuple(models),
            sdk=sdk,
            runtime=abilities.runtime,
            opset=abilities.opset,
            memory=abilities.memory // step * step,
            arch=abilities.arch,
            providers=abilities.providers,
        )


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """`runs` maps a model to `<version>/<variant>`; a pin to a release that is gone is None, to a revoked one: none."""

    name: str
    traits: Traits
    pins: Mapping[str, ReleaseRef | None] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()  # rollouts in which it failed

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.traits.labels)

    @property
    def models(self) -> tuple[str, ...]:
        return self.traits.models
