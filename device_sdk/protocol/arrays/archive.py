"""A zip of stored members, in memory: what batches of samples and acceptance bundles travel in.

What makes reading one safe: nothing is compressed, so the length that was announced bounds what opening can cost, and
the zip's directory is measured before zipfile builds an object for each entry.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO

from device_sdk.protocol.errors import ProtocolError

MEMBERS = 65_534  # what a zip without the 64-bit extension can hold
_DIRECTORY_ENTRY = 128  # bytes; 46 and the name is what ours take
_END = struct.Struct("<4s4H2LH")  # the end-of-central-directory record
_ZIP64_LOCATOR = 20
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError, struct.error, OSError)


class Archive:
    """An open zip whose members were looked at. `sizes` in bytes, by name."""

    def __init__(self, opened: zipfile.ZipFile, length: int) -> None:
        self._zip = opened
        self.sizes: Mapping[str, int] = {info.filename: info.file_size for info in opened.infolist()}
        self._check(length)

    def read(self, name: str) -> bytes:
        return self._zip.read(name)

    def _check(self, length: int) -> None:
        infos = self._zip.infolist()
        if len(self.sizes) != len(infos):
            raise ProtocolError("bad_zip", "expected each member once; some name comes twice")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ProtocolError("bad_zip", f"expected stored members; {info.filename!r:.80} is compressed")
        total = sum(info.file_size for info in infos)
        if total > length:  # entries that overlap, so that the same bytes count many times
            raise ProtocolError("bad_zip", f"expected at most {length} bytes of members; got {total}")


@contextmanager
def opened(data: bytes) -> Iterator[Archive]:
    """Raises ProtocolError `bad_zip`, also for what goes wrong while members are read in the block."""
    _measure(data)
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            yield Archive(archive, len(data))
    except ProtocolError:
        raise
    except _ZIP_ERRORS as error:
        raise ProtocolError("bad_zip", f"expected a zip of stored members; {error}") from error


def packed(members: Mapping[str, bytes]) -> bytes:
    """One byte string for the same members in the same order: no time of day stands in it."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def _measure(data: bytes) -> None:
    """Refuse a directory that would be costly to read. zipfile would look for its end; ours is the very end."""
    if len(data) < _END.size or not data[-_END.size :].startswith(b"PK\x05\x06"):
        raise ProtocolError("bad_zip", "expected a whole zip without a comment: its end is missing")
    _, _, _, _, count, size, _, comment = _END.unpack(data[-_END.size :])
    locator = data[-_END.size - _ZIP64_LOCATOR : -_END.size]
    if comment or locator.startswith(b"PK\x06\x07") or not 0 < count <= MEMBERS:
        raise ProtocolError("bad_zip", f"expected 1 to {MEMBERS} members and no zip64; got {count}")
    if size > count * _DIRECTORY_ENTRY:
        raise ProtocolError(
            "bad_zip", f"expected at most {_DIRECTORY_ENTRY} bytes of directory a member; got {size / count:.0f}"
        )
