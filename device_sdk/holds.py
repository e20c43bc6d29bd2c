"""Not now: the program that runs the models puts off activations, with a reason."""

from collections.abc import Callable
from typing import Self

_CHARS = 100


class Hold:
    """Holds from when it is made until `release`, or the end of a `with` block. Released twice, it is released once."""

    def __init__(self, reason: str, end: Callable[["Hold"], None]) -> None:
        self.reason = reason[:_CHARS] or "asked"
        self._end = end

    def release(self) -> None:
        self._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Holds:
    """Those that are in force. `on_end` is called when one is released."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._held: tuple[Hold, ...] = ()  # replaced whole: other threads read it
        self._on_end = on_end

    def begin(self, reason: str) -> Hold:
        hold = Hold(reason, self._release)
        self._held = (*self._held, hold)
        return hold

    def reason(self) -> str:
        """The latest one's; "": nothing is held."""
        held = self._held
        return held[-1].reason if held else ""

    def _release(self, hold: Hold) -> None:
        if hold in self._held:
            self._held = tuple(each for each in self._held if each is not hold)
            self._on_end()
