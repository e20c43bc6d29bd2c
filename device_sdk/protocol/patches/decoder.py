"""Apply a patch: read it and the base, give out the target piece by piece. Nothing it makes is believed by itself.

Refuses, as `bad_patch`, whatever reads outside the base, unfolds to more than it says, or makes more or less than the
target's length, which the caller knows from what is signed. Memory: a few MiB, whatever the patch says.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from device_sdk.protocol.patches import planes
from device_sdk.protocol.patches.frames import (
    FIRST,
    FRAME_BYTES,
    HEAD_BYTES,
    MAX_FRAME,
    Frame,
    Head,
    Kind,
    Operation,
    bad,
)

if TYPE_CHECKING:
    from device_sdk.protocol.patches.arithmetic import Array

Read = Callable[[int], bytes]  # up to so many bytes, in order; less only at the end
ReadAt = Callable[[int, int], bytes]  # (offset, length); less only at the end


def apply(patch: Read, base: ReadAt, *, base_sha256: str, target_sha256: str, target_length: int) -> Iterator[bytes]:
    """The target's bytes, in pieces of at most MAX_FRAME. Raises ProtocolError `bad_patch`; what came till then is
    worth nothing. The three facts are the caller's own: a patch that says otherwise is refused unread.
    """
    head = Head.parse(_exactly(patch, HEAD_BYTES))
    if (head.base_sha256, head.target_sha256) != (base_sha256, target_sha256):
        raise bad(f"expected one from {base_sha256} to {target_sha256}; got {head.base_sha256}, {head.target_sha256}")
    if head.target_length != target_length:
        raise bad(f"expected one to {target_length} bytes; got {head.target_length}")
    return _Decoder(patch, base, head).pieces()


class _Decoder:
    def __init__(self, patch: Read, base: ReadAt, head: Head) -> None:
        self._patch, self._base, self._head = patch, base, head
        self._table: tuple[Array, Array, int] | None = None  # scales, zero points, stride
        self._scales = b""  # the same table's bytes

    def pieces(self) -> Iterator[bytes]:
        left = self._head.target_length
        while left:
            frame = Frame.parse(self._patch(FRAME_BYTES), head=self._head, left=left)
            payload = memoryview(_exactly(self._patch, frame.payload))
            if frame.operation is Operation.COPY:
                yield from self._copy(frame)
            elif frame.operation is Operation.TABLE:
                self._keep_table(frame, payload)
            else:
                yield self._make(frame, payload)
            left -= frame.adds
        if self._patch(1):
            raise bad("it goes on after the target is whole")

    def _copy(self, frame: Frame) -> Iterator[bytes]:
        for at in range(0, frame.length, MAX_FRAME):
            yield self._old(frame.offset + at, min(MAX_FRAME, frame.length - at))

    def _keep_table(self, frame: Frame, payload: memoryview) -> None:
        from device_sdk.protocol.patches import arithmetic

        (data,) = planes.unpack(payload, count=1, size=frame.length)
        self._table, self._scales = (*arithmetic.table(data), frame.offset), data

    def _make(self, frame: Frame, payload: memoryview) -> bytes:
        from device_sdk.protocol.patches import arithmetic

        if frame.operation is Operation.LITERAL:
            return planes.unpack(payload, count=1, size=frame.length)[0]
        if frame.operation is Operation.SCALES:
            if frame.offset + frame.length > len(self._scales):
                raise bad(f"SCALES: reads to {frame.offset + frame.length} of a table of {len(self._scales)}")
            return self._scales[frame.offset : frame.offset + frame.length]
        guess = self._guess(frame, payload)
        if frame.operation is Operation.QUANTISE:
            payload = payload[FIRST.size :]
        found = planes.unpack(payload, count=frame.kind.width, size=frame.length // frame.kind.width)
        items = arithmetic.join(found, frame.kind)
        if guess is None:
            return arithmetic.unturn(items, frame.kind).tobytes()
        return arithmetic.add(items, guess, frame.kind).tobytes()

    def _guess(self, frame: Frame, payload: memoryview) -> "Array | None":
        """What the values would be without the differences; None: they come as they are."""
        from device_sdk.protocol.patches import arithmetic

        if frame.operation is Operation.PLANES:
            return None
        old = self._old(frame.offset, frame.reads)
        if frame.operation is Operation.SUBTRACT:
            return arithmetic.values(old, frame.kind)
        if frame.operation is Operation.HALF:
            return arithmetic.half(old)
        if self._table is None or len(payload) < FIRST.size:
            raise bad("QUANTISE: expected a TABLE before it, and the number of its first value")
        scales, zeros, stride = self._table
        (first,) = FIRST.unpack_from(payload)
        if first > 2**62:
            raise bad(f"QUANTISE: no tensor has a value {first}")
        return arithmetic.quantise(old, Kind(frame.kind), scales, zeros, first=first, stride=stride)

    def _old(self, offset: int, length: int) -> bytes:
        data = self._base(offset, length)
        if len(data) != length:
            raise bad(f"the base ends before {offset + length}")
        return data


def _exactly(read: Read, length: int) -> bytes:
    data = read(length) if length else b""
    if len(data) != length:
        raise bad(f"it ends {length - len(data)} bytes too early")
    return data
