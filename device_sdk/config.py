"""The device's directory: what the operator provisioned, who the device is, and where everything lies.

`provision.json` is out-of-band trust: the operator hands it out. `identity.json` is made at enrolment and is secret.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from device_sdk.errors import SetupError
from device_sdk.protocol import fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_model, check_name

_LIMIT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Provision:
    """Server address, pinned root metadata (text), enrolment token, models, extra hosts that may serve blobs.

    `clock_floor` is unix seconds: no honest clock shows an earlier time.
    """

    server: str
    root: str
    token: str
    models: tuple[str, ...]
    blob_hosts: tuple[str, ...] = ()
    clock_floor: int = 0

    @classmethod
    def parse(cls, data: bytes) -> "Provision":
        item = fields.parse_object(data, limit=_LIMIT, what="provision.json")
        server = fields.take_text(item, "server", limit=500).rstrip("/")
        if urlsplit(server).scheme not in {"http", "https"} or not urlsplit(server).netloc:
            raise ProtocolError("malformed", f"server: expected an http(s) address; got {server!r:.80}")
        return cls(
            server=server,
            root=fields.take_text(item, "root", limit=_LIMIT),
            token=fields.take_text(item, "token", limit=200),
            models=tuple(check_model(name) for name in fields.take_list(item, "models", limit=64)),
            blob_hosts=tuple(str(host) for host in fields.take_list(item, "blob_hosts", limit=16)),
            clock_floor=fields.take_int(item, "clock_floor", high=2**40, default=0),
        )

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the device is. `credential` empty: asked for, not yet granted; the nonce makes asking again harmless."""

    device: str
    nonce: str
    credential: str = field(default="", repr=False)

    @classmethod
    def parse(cls, data: bytes) -> "Identity":
        item = fields.parse_object(data, limit=_LIMIT, what="identity.json")
        return cls(
            device=check_name(item.get("device"), "device"),
            nonce=fields.take_text(item, "nonce", limit=64),
            credential=fields.take_text(item, "credential", limit=300, default=""),
        )

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class Home:
    """The directory's layout. Private: 0700."""

    path: Path

    @property
    def provision_file(self) -> Path:
        return self.path / "provision.json"

    @property
    def identity_file(self) -> Path:
        return self.path / "identity.json"

    @property
    def trust(self) -> Path:
        return self.path / "trust"

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def outbox(self) -> Path:
        return self.path / "outbox"

    def make(self) -> None:
        for folder in (self.path, self.trust, self.store, self.spool, self.outbox):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def provision(self) -> Provision:
        return Provision.parse(self._read(self.provision_file, "hand it out with `manage.py provision`"))

    def identity(self) -> Identity:
        return Identity.parse(self._read(self.identity_file, "run `fleet-device enrol` first"))

    def _read(self, path: Path, hint: str) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise SetupError(f"cannot read {path}: {error.strerror}; {hint}") from error


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a small file: temp, fsync, rename, fsync of the directory. Old or new, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a planted link must not be what gets written through
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
