"""Which mirror a device is told to ask for files first: that of the first group, by name, which has one and holds the
device. Pure.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fleet.devices.selection import NAME, Selector


@dataclass(frozen=True, slots=True)
class Mirror:
    group: str
    selector: Selector
    address: str


@dataclass(frozen=True)
class Mirrors:
    """All of them, in the order of their groups' names. They may be thousands, so a label's value leads to them."""

    every: tuple[Mirror, ...] = ()

    def possible(self, labels: Mapping[str, str]) -> tuple[Mirror, ...]:
        """Those that a device of these labels may have, in order; all but the last hang on its name."""
        found: list[Mirror] = []
        for place in sorted(self._worth_asking(labels)):
            holds = self.every[place].selector.by_labels(labels)
            if holds is not False:
                found.append(self.every[place])
            if holds:
                break
        return tuple(found)

    def _worth_asking(self, labels: Mapping[str, str]) -> set[int]:
        return {place for key in (None, *labels.items()) for place in self._places.get(key, ())}

    @cached_property
    def _places(self) -> Mapping[tuple[str, str] | None, Sequence[int]]:
        """By one of the values that a selector asks a label for; None: it asks for no value."""
        places = defaultdict[tuple[str, str] | None, list[int]](list)
        for place, mirror in enumerate(self.every):
            for key in _keys(mirror.selector):
                places[key].append(place)
        return places


NO_MIRRORS = Mirrors()


def chosen(mirrors: Iterable[Mirror], labels: Mapping[str, str], name: str) -> Mirror | None:
    return next((mirror for mirror in mirrors if mirror.selector.matches(labels, name)), None)


def _keys(selector: Selector) -> Sequence[tuple[str, str] | None]:
    asks = (each for each in selector.requirements if each.values and not each.negated and each.label != NAME)
    asked = next(asks, None)
    return [(asked.label, value) for value in asked.values] if asked else [None]
