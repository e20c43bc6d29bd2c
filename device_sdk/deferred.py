"""Put off what a start without a network does not need: making an object, and importing what it is made of."""

from collections.abc import Callable
from threading import RLock
from typing import Any


class Deferred:
    """Stands for an object that is made when something of it is asked for first."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._deferred_make: Callable[[], Any] | None = make
        self._deferred_lock = RLock()
        self._deferred_made: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._deferred_make is not None:
            with self._deferred_lock:
                if self._deferred_make is not None:
                    self._deferred_made = self._deferred_make()
                    self._deferred_make = None
        return getattr(self._deferred_made, name)


def is_made(thing: object) -> bool:
    """Whether asking something of it makes nothing."""
    return not isinstance(thing, Deferred) or thing._deferred_make is None  # noqa: SLF001  this module's own
