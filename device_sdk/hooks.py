"""Tell the program that runs the models what happened to them, on a thread of ours, outside of locks."""

import logging
from collections.abc import Callable, Mapping

from device_sdk.errors import DeviceError
from device_sdk.slot import Slot
from device_sdk.store import Store

log = logging.getLogger("device_sdk")


class Hooks:
    """Remembers what the program knows to serve, and calls it where that has changed. What it raises is logged."""

    def __init__(
        self,
        slots: Mapping[str, Slot],
        on_update: Callable[[str, str], object] | None,
        on_rollback: Callable[[str, str, str], object] | None,
    ) -> None:
        self._slots = slots
        self._on_update = on_update
        self._on_rollback = on_rollback
        self._noted: dict[str, tuple[str, str]] = {}  # sha256 and release

    def note(self, name: str) -> None:
        """What serves now is no news."""
        self._noted[name] = self._serving(name)

    def tell(self, store: Store) -> None:
        for name in list(self._noted):
            before, now = self._noted[name], self._serving(name)
            if before == now:
                continue
            self._noted[name] = now
            if before[0] and store.is_bad(before[0]):
                _call(self._on_rollback, name, before[1], _bad_reason(store, before[0]))
            elif now[0]:
                _call(self._on_update, name, now[1])

    def _serving(self, name: str) -> tuple[str, str]:
        loaded = self._slots[name].current
        return (loaded.sha256, loaded.path.running) if loaded else ("", "")


def _bad_reason(store: Store, sha: str) -> str:
    try:
        return store.bad_reason(sha)
    except DeviceError:
        return ""


def _call(hook: Callable[..., object] | None, *arguments: str) -> None:
    if hook is None:
        return
    try:
        hook(*arguments)
    except Exception:
        log.exception("%s of the program failed", getattr(hook, "__name__", "a hook"))
