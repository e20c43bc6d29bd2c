"""Choose the variant of a release that a device can run, and the releases that it must step through. Pure.

What a device does not say is not held against it where the device itself looks before it activates (SDK, runtime,
opset, memory: older SDKs say nothing). An architecture or a provider that a variant asks for must have been said.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from device_sdk.protocol.manifest import Requirements
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.versions import is_at_least, older
from fleet.rollouts.facts import ManifestRef, ReleaseRef, Traits

VARIANT_LABEL, DEFAULT_VARIANT = "variant", "default"
STEPS = 16  # releases on the way to one


@dataclass(frozen=True, slots=True)
class Step:
    """A release on the way, as the variant that the device runs. `floor`: what it must have run before, or empty."""

    path: ReleasePath
    manifest: ManifestRef

    @property
    def floor(self) -> str:
        return self.manifest.requires.release


@dataclass(frozen=True, slots=True)
class Way:
    """The release itself first, then those to step through; or none, and what the device lacks."""

    steps: tuple[Step, ...] = ()
    lacks: str = ""


def choose_variant(release: ReleaseRef, traits: Traits) -> str | None:
    """Of the variants that the device can run: the one that its label `variant` asks for; else, in this order,

    the one for the provider that it ranks highest, `default`, the one that asks for most memory, the first by name.
    A label that names no variant of this release asks for nothing.
    """
    fits = [name for name in _wanted(release, traits) if not lacks(release.variants[name].requires, traits)]
    return min(fits, key=lambda name: _order(name, release.variants[name].requires, traits), default=None)


def _wanted(release: ReleaseRef, traits: Traits) -> list[str]:
    label = dict(traits.labels).get(VARIANT_LABEL, "")
    return [label] if label in release.variants else sorted(release.variants)


def _order(name: str, requires: Requirements, traits: Traits) -> tuple[int, bool, int, str]:
    ranks = [rank for rank, provider in enumerate(traits.providers) if provider in requires.providers]
    return min(ranks, default=len(traits.providers)), name != DEFAULT_VARIANT, -requires.memory, name


def lacks(requires: Requirements, traits: Traits) -> str:
    """The first thing for which the device cannot run it, in words; empty: it can."""
    return next((f"needs {floor}, has {has}" for met, floor, has in _floors(requires, traits) if not met), "")


def _floors(requires: Requirements, traits: Traits) -> Iterator[tuple[bool, str, str]]:
    """Whether it is met, the floor, and what the device has."""
    yield not (traits.sdk and older(traits.sdk, requires.sdk)), f"SDK {requires.sdk}", traits.sdk
    yield (
        not (traits.runtime and older(traits.runtime, requires.runtime)),
        f"runtime {requires.runtime}",
        traits.runtime,
    )
    yield not 0 < traits.opset < requires.opset, f"opset {requires.opset}", str(traits.opset)
    yield not 0 < traits.memory < requires.memory, f"{_mebibytes(requires.memory)} of memory", _mebibytes(traits.memory)
    arch = not requires.arch or traits.arch in requires.arch
    yield arch, f"architecture {' or '.join(requires.arch)}", traits.arch or "not said its own"
    provider = not requires.providers or bool(set(requires.providers) & set(traits.providers))
    yield provider, f"provider {' or '.join(requires.providers)}", ", ".join(traits.providers) or "named none"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def way_to(release: ReleaseRef, traits: Traits) -> Way:
    """How a device with these traits comes to the release, or why it cannot."""
    steps: list[Step] = []
    at: ReleaseRef | None = release
    while at is not None:
        variant = choose_variant(at, traits)
        if variant is None:
            return Way(lacks=_why_none(at, release, traits))
        steps.append(Step(ReleasePath(at.model, at.version, variant), at.variants[variant]))
        floor = steps[-1].floor
        if floor and (floor not in release.floors or len(steps) == STEPS):
            return Way(lacks=f"must step through {floor}, which is not there to run")
        at = release.floors[floor] if floor else None
    return Way(tuple(steps))


def _why_none(at: ReleaseRef, release: ReleaseRef, traits: Traits) -> str:
    names = _wanted(at, traits)
    if not names:
        return f"{at.version} has no valid variant"
    why = f"variant {names[0]} {lacks(at.variants[names[0]].requires, traits)}"
    more = f" (and {len(names) - 1} more that it cannot run)" if len(names) > 1 else ""
    return f"{'' if at == release else f'must step through {at.version}: '}{why}{more}"


def place_on(way: Way, running: str) -> int:
    """Which of the steps comes next for a device that runs the version `running`; the last one asks for nothing."""
    return next((place for place, step in enumerate(way.steps) if _may_have(step, running)), 0)


def _may_have(step: Step, running: str) -> bool:
    return not step.floor or step.path.version == running or is_at_least(running, step.floor)
