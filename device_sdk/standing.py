"""What the last view said, in a file of our own: a start need not verify signatures again before it serves.

    standing.json   {view: sha256 of trust/view.json, models: {model: {length, sha256, custom, listed}}}

It is not signed, and nothing is installed by it: before the first installation, and at the first poll, the view itself
is verified again. Until then it says what must not be served any more, and what is sampled. Who can change it could as
well remove the view: then the device serves what it has, as it must offline.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device_sdk.config import read_plainly, write_durably
from device_sdk.install import Verified
from device_sdk.protocol import fields, limits
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.manifest import Manifest, digest
from device_sdk.protocol.names import check_sha256

log = logging.getLogger("device_sdk")

_LIMIT = 16 * limits.MIB
_LISTED = 1_000_000


@frozen
class Remembered:
    """Stands for what trust vouched for in an earlier process. Has no manifest: it must not be installed."""

    assignment: Assignment
    listed: frozenset[str] | None
    manifest: Manifest | None = None
    manifest_bytes: bytes | None = None


@frozen
class Standing:
    """Every model's; what a view has, as far as a start needs it."""

    assignments: Mapping[str, Remembered]


def remember(path: Path, view_file: Path, assignments: Mapping[str, Verified]) -> None:
    """Keep what a view says, beside the hash of the file that holds it. What cannot be kept is done without."""
    try:
        content = {
            "view": digest(read_plainly(view_file, limit=_LIMIT)),
            "models": {model: _to_json(each) for model, each in assignments.items()},
        }
        write_durably(path, json.dumps(content).encode())
    except OSError as error:
        log.warning("the next start verifies the view before it serves: %s", error.strerror)


def recall(path: Path, view_file: Path) -> Standing | None:
    """None where it is not of the view that lies there now: that has to be verified."""
    if not os.path.lexists(view_file):
        return Standing({})
    try:
        return parse(read_plainly(path, limit=_LIMIT), view=digest(read_plainly(view_file, limit=_LIMIT)))
    except (OSError, ProtocolError):
        return None


def parse(data: bytes, *, view: str) -> Standing | None:
    """`view`: the hash that it has to name; None where it names another. Raises ProtocolError."""
    item = fields.parse_object(data, limit=_LIMIT, what="standing")
    if item.get("view") != view:
        return None
    models = fields.take_object(item, "models")
    return Standing({model: _parse(model, fields.as_object(value, model)) for model, value in models.items()})


def _to_json(verified: Verified) -> dict[str, Any]:
    assignment = verified.assignment
    return {
        "length": assignment.length,
        "sha256": assignment.sha256,
        "custom": assignment.to_custom(),
        "listed": None if verified.listed is None else sorted(verified.listed),
    }


def _parse(model: str, item: fields.Json) -> Remembered:
    length = fields.take_int(item, "length", high=2**62)
    sha = fields.take_text(item, "sha256", limit=64)
    listed = None
    if item.get("listed") is not None:
        listed = frozenset(check_sha256(each) for each in fields.take_list(item, "listed", limit=_LISTED))
    if not sha:  # nothing is assigned
        custom = fields.take_object(item, "custom")
        return Remembered(Assignment(model, stop=fields.take_bool(custom, "stop")), listed)
    return Remembered(Assignment.parse(model, length, sha, item.get("custom")), listed)
