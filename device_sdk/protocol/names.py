"""Names that may appear on the wire, and the TUF target paths made of them.

Names never become file paths: everything is stored by sha256. They are restricted all the same, because a path such
as `detector/../director` does match a TUF delegation of `detector/*/*`.
"""

import re
from dataclasses import dataclass

from device_sdk.protocol.errors import ProtocolError

ASSIGN = "assign"
DIRECTOR = "director"
TOP_LEVEL_ROLES = frozenset({"root", "targets", "snapshot", "timestamp"})
RESERVED_MODELS = TOP_LEVEL_ROLES | {ASSIGN, DIRECTOR}

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
NAME_RULE = "1 to 64 of a-z 0-9 . _ - , starting with a letter or digit, without '..'"


def check_name(value: object, what: str = "name") -> str:
    """Return `value` if it is a legal name of a device, version, variant or label; else raise `invalid_name`."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or ".." in value:
        raise ProtocolError("invalid_name", f"{what}: expected {NAME_RULE}; got {value!r:.80}")
    return value


def check_model(value: object) -> str:
    """A model's name is also the name of its TUF role, so the names of other roles are not free."""
    name = check_name(value, "model")
    if name in RESERVED_MODELS:
        raise ProtocolError("invalid_name", f"model: {name!r} is reserved")
    return name


def check_file_name(value: object) -> str:
    """A variant's files lie flat beside each other: a plain name, no directory."""
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value) or ".." in value:
        raise ProtocolError("invalid_name", f"file: expected a plain name without directories; got {value!r:.80}")
    return value


def check_sha256(value: object, what: str = "sha256") -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ProtocolError("invalid_sha256", f"{what}: expected 64 lower-case hex digits; got {value!r:.80}")
    return value


@dataclass(frozen=True, slots=True, order=True)
class ReleasePath:
    """`<model>/<version>/<variant>`: the TUF target path of one variant of one release."""

    model: str
    version: str
    variant: str

    def __str__(self) -> str:
        return f"{self.model}/{self.version}/{self.variant}"

    @property
    def running(self) -> str:
        """How a device names what it runs of a model: `<version>/<variant>`."""
        return f"{self.version}/{self.variant}"

    @classmethod
    def parse(cls, value: object) -> "ReleasePath":
        parts = value.split("/") if isinstance(value, str) else []
        if len(parts) != 3:
            raise ProtocolError("invalid_name", f"release: expected model/version/variant; got {value!r:.80}")
        return cls(check_model(parts[0]), check_name(parts[1], "version"), check_name(parts[2], "variant"))


def assign_path(device: str, model: str) -> str:
    """The TUF target path by which the director tells `device` what to run of `model`."""
    return f"{ASSIGN}/{check_name(device, 'device')}/{check_model(model)}"
