"""The folder that carries root, targets and public keys between machines. Nothing in it is believed for being there.

`N.root.json`, `N.targets.json` and `NAME.pub.json` are read, as regular files of a bounded size; all else is foreign
and is neither opened nor changed. A file appears whole or not at all: temporary name, fsync, rename, fsync of folder.
"""

import os
import re
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_name
from device_sdk.signing import MAX_KEY_FILE, public_from_json, public_to_json
from fleet.errors import Conflict, Invalid, NotFound
from fleet.trust.offline import Named

_ROLE = re.compile(r"([1-9][0-9]{0,8})\.(root|targets)\.json")
_PUBLIC = ".pub.json"
MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Stick:
    folder: Path

    def versions(self, role: str) -> list[int]:
        found = (_ROLE.fullmatch(name) for name in self._names())
        return sorted(int(match[1]) for match in found if match and match[2] == role)

    def role(self, role: str, version: int) -> bytes:
        return self._read(f"{version}.{role}.json", limits.METADATA)

    def write_role(self, role: str, version: int, content: bytes) -> None:
        self._write(f"{version}.{role}.json", content)

    def public(self, who: str) -> Named:
        """A key by its name on the stick, or by the path of its file; the file's name is the key's."""
        path = Path(who)
        if path.name == who and not who.endswith(_PUBLIC):
            path = self.folder / f"{_key_name(who)}{_PUBLIC}"
        elif path.name == who and not path.exists():
            path = self.folder / who
        name = _key_name(path.name.removesuffix(_PUBLIC).removesuffix(".json"))
        try:
            return Named(name, public_from_json(_read_regular(path, MAX_KEY_FILE)))
        except ValueError as error:
            raise Invalid("malformed_key", f"{path.name}: {error}") from error

    def write_public(self, named: Named) -> bool:
        """False: it lies there already. Raises Conflict where another key has the name."""
        name = f"{named.name}{_PUBLIC}"
        if name in self._names():
            if self.public(named.name).key != named.key:
                raise Conflict("name_taken", f"{name} on the stick is another key")
            return False
        self._write(name, public_to_json(named.key).encode())
        return True

    def foreign(self) -> list[str]:
        return sorted(name for name in self._names() if not _ROLE.fullmatch(name) and not _is_public(name))

    def _names(self) -> list[str]:
        try:
            names = os.listdir(self.folder)  # noqa: PTH208  # names, not paths
        except OSError as error:
            raise NotFound("no_stick", f"cannot read {self.folder}: {error.strerror}") from error
        if len(names) > MAX_FILES:
            raise Invalid("hostile_stick", f"{self.folder}: expected at most {MAX_FILES} files; got {len(names)}")
        return names

    def _read(self, name: str, limit: int) -> bytes:
        return _read_regular(self.folder / name, limit)

    def _write(self, name: str, content: bytes) -> None:
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    with suppress(OSError):  # all of it is public, and the next reader another user; FAT has no modes
                        os.fchmod(descriptor, 0o644)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.folder / name)  # noqa: PTH105  # the name is a string here
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            _sync_folder(self.folder)
        except OSError as error:
            raise Conflict("stick_failed", f"cannot write {name} to {self.folder}: {error.strerror}") from error


def _key_name(name: str) -> str:
    try:
        return check_name(name, "key name")
    except ProtocolError as error:
        raise Invalid("invalid_name", str(error)) from error


def _is_public(name: str) -> bool:
    return name.endswith(_PUBLIC) and not name.startswith(".")


def _read_regular(path: Path, limit: int) -> bytes:
    """Never follows a symlink, never waits on a pipe, never reads more than `limit` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Invalid("hostile_stick", f"{path.name}: expected a plain file")
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise NotFound("no_such_file", f"there is no {path.name} in {path.parent}") from error
    except OSError as error:
        raise Invalid("hostile_stick", f"{path.name}: expected a plain file; {error.strerror}") from error
    if len(content) > limit:
        raise Invalid("hostile_stick", f"{path.name}: expected at most {limit} bytes; it has more")
    return content


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
