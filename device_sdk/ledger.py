"""What each kept release did on this device over all processes so far: what a trial is compared with, and its own part.

    ledger.json   {model: {sha256: {counts, seconds, runtime}}}, a few kilobytes; only of releases that may serve again

Losing it costs a comparison, never a model. One process writes it, an hour apart and where something ends.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import field
from pathlib import Path

from device_sdk.config import read_plainly, write_durably
from device_sdk.counts import Counts, added
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.names import check_sha256

log = logging.getLogger("device_sdk")

_LIMIT = limits.MIB
_LONGEST = 2.0**40
_RUNTIME_CHARS = 64


@frozen
class Done:
    """What a release did, for how many seconds it served, and the version of onnxruntime that last answered for it."""

    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    runtime: str = ""

    def and_then(self, counts: Counts, seconds: float, runtime: str = "") -> "Done":
        answered = counts.calls > counts.errors
        return Done(
            added([self.counts, counts]), self.seconds + seconds, runtime if answered and runtime else self.runtime
        )


class Ledger:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._done = _read(path)

    def get(self, model: str, sha: str | None) -> Done:
        return self._done.get(model, {}).get(sha or "", Done())

    def keep(self, model: str, sha: str, done: Done, *, kept: Collection[str]) -> None:
        """Set what `sha` did, and forget the model's releases that are not `kept`. A full disk keeps the old."""
        old = self._done.get(model, {})
        self._done[model] = {name: each for name, each in (old | {sha: done}).items() if name in kept}
        try:
            write_durably(self._path, self._to_bytes())
        except OSError as error:
            log.warning("what %s did is kept in memory only: %s", model, error.strerror)

    def _to_bytes(self) -> bytes:
        content = {model: {sha: _to_json(each) for sha, each in done.items()} for model, done in self._done.items()}
        return json.dumps(content).encode()


def parse(data: bytes) -> dict[str, dict[str, Done]]:
    """What each release of each model did. Raises ProtocolError."""
    items = fields.parse_object(data, limit=_LIMIT, what="ledger")
    return {model: _parse(fields.as_object(done, model)) for model, done in items.items()}


def _read(path: Path) -> dict[str, dict[str, Done]]:
    try:
        return parse(read_plainly(path, limit=_LIMIT))
    except FileNotFoundError:
        return {}
    except (OSError, ProtocolError) as error:
        log.warning("%s was lost: %s", path, error)
        return {}


def _to_json(done: Done) -> dict[str, object]:
    return {"counts": done.counts.to_json(), "seconds": done.seconds, "runtime": done.runtime}


def _parse(done: fields.Json) -> dict[str, Done]:
    found = {}
    for sha, value in done.items():
        item = fields.as_object(value, "done")
        seconds = fields.take_number(item, "seconds", low=0, high=_LONGEST)
        runtime = fields.take_text(item, "runtime", limit=_RUNTIME_CHARS, default="")
        found[check_sha256(sha)] = Done(Counts.parse(item.get("counts")), seconds, runtime)
    return found
