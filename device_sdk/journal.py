"""Where each model stands, on disk before anyone is told; and the telling, through the outbox."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from threading import RLock
from typing import Any

from device_sdk.config import read_plainly, write_durably
from device_sdk.naming import token_hex
from device_sdk.outbox import Outbox
from device_sdk.protocol import events, fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.events import Event
from device_sdk.protocol.names import ReleasePath
from device_sdk.updater import Progress, State

log = logging.getLogger("device_sdk")

_LIMIT = 1024 * 1024


class Journal:
    """Progress by model. Without an outbox (a process that only serves) it is read, never written."""

    def __init__(self, path: Path, outbox: Outbox | None, *, now: Callable[[], float]) -> None:
        self._path = path
        self._outbox = outbox
        self._now = now
        self._lock = RLock()
        self._progress = _read(path)
        self.on_event: Callable[[], None] = lambda: None

    def reload(self) -> None:
        """Take up what another process wrote."""
        self._progress = _read(self._path)

    def take_over(self, outbox: Outbox) -> None:
        """From now on this process writes it, and tells."""
        with self._lock:
            self.reload()
            self._outbox = outbox

    @property
    def refusal(self) -> str:
        """The code of what this device refuses now, of an earlier process too: its end must be told. "": nothing."""
        return self.get("").reason

    def keep_refusal(self, code: str) -> None:
        """It stands beside the models, under no name."""
        if code != self.refusal:
            with self._lock:
                self._progress[""] = Progress("", reason=code)
                self._write()

    def get(self, model: str) -> Progress:
        return self._progress.get(model, Progress(model))

    def record(self, progress: Progress, detail: Mapping[str, float | str] | None = None) -> None:
        """Persist a transition, then report it. A disk that takes nothing does not stop the device: it is reported."""
        progress = replace(progress, id=token_hex(16), at=self._now())
        with self._lock:
            self._progress[progress.model] = progress
            self._write()
        log.info("%s: %s %s%s", progress.model, progress.state, progress.release or "", _reason(progress))
        if progress.state is not State.IDLE:
            self._report(_event(progress, detail or {}))

    def repeat(self, model: str) -> None:
        """Report the last transition again, under its own id: the process may have ended before it was in the outbox.

        The server takes one id once.
        """
        progress = self.get(model)
        if progress.id and progress.state is not State.IDLE:
            self._report(_event(progress, {}))

    def note(
        self, kind: str, progress: Progress, *, reason: str = "", detail: Mapping[str, float | str] | None = None
    ) -> None:
        """Report what is no transition: a refusal, counters."""
        event = _event(replace(progress, id=token_hex(16), at=self._now(), reason=reason), detail or {})
        self._report(replace(event, kind=kind))

    def _write(self) -> None:
        try:
            write_durably(self._path, _to_bytes(self._progress))
        except OSError as error:
            log.warning("progress is kept in memory only: %s", error.strerror)

    def _report(self, event: Event) -> None:
        if self._outbox is not None:
            self._outbox.add(event)
            self.on_event()


def _event(progress: Progress, detail: Mapping[str, float | str]) -> Event:
    return Event(
        id=progress.id,
        at=progress.at,
        kind=progress.state if progress.state is not State.IDLE else events.HEALTH,
        model=progress.model,
        release=progress.release,
        rollout=progress.rollout,
        reason=progress.reason,
        detail=detail,
    )


def _reason(progress: Progress) -> str:
    return f" ({progress.reason})" if progress.reason else ""


def _to_bytes(progress: Mapping[str, Progress]) -> bytes:
    return json.dumps({name: _to_json(each) for name, each in progress.items()}, indent=1).encode()


def _to_json(progress: Progress) -> dict[str, Any]:
    return {**asdict(progress), "release": str(progress.release) if progress.release else None}


def _read(path: Path) -> dict[str, Progress]:
    """A journal that is lost costs the reasons, not the models: the store says what is installed."""
    try:
        items = fields.parse_object(read_plainly(path, limit=_LIMIT), limit=_LIMIT, what="progress")
        return {model: _parse(fields.as_object(item, model)) for model, item in items.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ProtocolError, TypeError, ValueError) as error:
        log.warning("%s was lost: %s", path, error)
        return {}


def _parse(item: Mapping[str, Any]) -> Progress:
    release = ReleasePath.parse(item["release"]) if item.get("release") else None
    return Progress(**{**item, "release": release, "state": State(item.get("state", ""))})
