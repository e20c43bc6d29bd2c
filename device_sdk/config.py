"""The device's directory: what the operator provisioned, who the device is, and where everything lies.

`provision.json` is out-of-band trust: the operator hands it out. `identity.json` is made at enrolment and is secret.
"""

import errno
import json
import os
import stat
from dataclasses import asdict, field
from pathlib import Path
from urllib.parse import urlsplit

from device_sdk.errors import SetupError
from device_sdk.protocol import fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.names import check_model, check_name

_LIMIT = 1024 * 1024


@frozen
class Provision:
    """Server address, pinned root metadata (text), enrolment token, models, extra hosts that may serve blobs.

    `clock_floor` is unix seconds: no honest clock shows an earlier time. `mirror`: a cache to ask for files first.
    """

    server: str
    root: str
    token: str
    models: tuple[str, ...]
    blob_hosts: tuple[str, ...] = ()
    clock_floor: int = 0
    mirror: str = ""

    @classmethod
    def parse(cls, data: bytes) -> "Provision":
        item = fields.parse_object(data, limit=_LIMIT, what="provision.json")
        server = check_address(fields.take_text(item, "server", limit=500), "server")
        mirror = fields.take_text(item, "mirror", limit=500, default="")
        return cls(
            server=server,
            root=fields.take_text(item, "root", limit=_LIMIT),
            token=fields.take_text(item, "token", limit=200),
            models=tuple(check_model(name) for name in fields.take_list(item, "models", limit=64)),
            blob_hosts=tuple(str(host) for host in fields.take_list(item, "blob_hosts", limit=16)),
            clock_floor=fields.take_int(item, "clock_floor", high=2**40, default=0),
            mirror=check_address(mirror, "mirror") if mirror else "",
        )

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def check_address(text: str, what: str) -> str:
    """Where a server is, without a slash at its end. Raises ProtocolError."""
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ProtocolError("malformed", f"{what}: expected an http(s) address; got {text!r:.80}")
    return text.rstrip("/")


@frozen
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


@frozen
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
    def uploads_file(self) -> Path:
        return self.path / "uploads.json"

    @property
    def traffic_file(self) -> Path:
        return self.path / "traffic.json"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.json"

    @property
    def standing_file(self) -> Path:
        return self.path / "standing.json"

    @property
    def view_file(self) -> Path:
        return self.trust / "view.json"

    @property
    def peers(self) -> Path:
        return self.path / "peers"

    @property
    def outbox(self) -> Path:
        return self.path / "outbox"

    def make(self) -> None:
        """Raises SetupError where something else stands in a folder's place, links included.

        The directory itself, and the spool in it, may lie elsewhere: only what is believed must be our own.
        """
        for folder in (self.path, self.trust, self.store, self.spool, self.outbox):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise SetupError(f"cannot make {folder}: {error.strerror}") from error
            if folder in (self.trust, self.store, self.outbox) and folder.is_symlink():
                raise SetupError(f"{folder}: expected a directory of our own, not a link")

    def provision(self) -> Provision:
        return Provision.parse(self._read(self.provision_file, "hand it out with `manage.py provision`"))

    def identity(self) -> Identity:
        return Identity.parse(self._read(self.identity_file, "run `fleet-device enrol` first"))

    def _read(self, path: Path, hint: str) -> bytes:
        try:
            return read_plainly(path, limit=_LIMIT, follow=True)  # an operator may mount it as a link
        except OSError as error:
            raise SetupError(f"cannot read {path}: {error.strerror}; {hint}") from error


def read_plainly(path: Path, *, limit: int, follow: bool = False) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises OSError for all else, and waits for nobody: a pipe planted
    in our directory would hold up the device for ever.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return data


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


class setup_errors:  # noqa: N801  used as a function
    """What does not parse in the directory is a SetupError that says where."""

    def __enter__(self) -> None:
        return

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ProtocolError):
            raise SetupError(error.message, code=error.code) from error
