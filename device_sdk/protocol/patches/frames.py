"""The head of a patch and the heads of its frames: bytes in, checked values out. No arithmetic, no IO."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256

from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError

MAGIC = b"FLEETP1\n"
NOTHING = sha256(b"").hexdigest()  # the base of a patch that every device can use
MAX_FRAME = limits.MIB  # bytes that one frame may add, read of the base, or carry; copies are cut by the decoder

_HEAD = struct.Struct("<8s32sQ32sQ")
_FRAME = struct.Struct("<BBHIQQ")
HEAD_BYTES, FRAME_BYTES = _HEAD.size, _FRAME.size


class Operation(IntEnum):
    COPY = 0
    LITERAL = 1
    SUBTRACT = 2
    PLANES = 3
    HALF = 4
    TABLE = 5
    QUANTISE = 6
    SCALES = 7


class Kind(IntEnum):
    """What the values are. bfloat16 goes as F16: only their order matters."""

    U8 = 0
    I8 = 1
    I16 = 2
    I32 = 3
    I64 = 4
    F16 = 5
    F32 = 6
    F64 = 7

    @property
    def width(self) -> int:
        return (1, 1, 2, 4, 8, 2, 4, 8)[self]

    @property
    def is_float(self) -> bool:
        return self >= Kind.F16


_KINDS = {
    Operation.COPY: {Kind.U8},
    Operation.LITERAL: {Kind.U8},
    Operation.SUBTRACT: set(Kind),
    Operation.PLANES: set(Kind),
    Operation.HALF: {Kind.F16},
    Operation.TABLE: {Kind.U8},
    Operation.QUANTISE: {Kind.U8, Kind.I8},
    Operation.SCALES: {Kind.U8},
}
_READS = {Operation.COPY: 1, Operation.SUBTRACT: 1, Operation.HALF: 2, Operation.QUANTISE: 4}  # base bytes a byte made
FIRST = struct.Struct("<Q")  # of QUANTISE's payload
TABLE_ENTRY = 8


def bad(message: str) -> ProtocolError:
    return ProtocolError("bad_patch", f"patch: {message}")


@dataclass(frozen=True, slots=True)
class Head:
    """Which file becomes which. Lengths in bytes."""

    base_sha256: str
    base_length: int
    target_sha256: str
    target_length: int

    def to_bytes(self) -> bytes:
        return _HEAD.pack(
            MAGIC, bytes.fromhex(self.base_sha256), self.base_length, bytes.fromhex(self.target_sha256),
            self.target_length,
        )  # fmt: skip

    @classmethod
    def parse(cls, data: bytes) -> "Head":
        if len(data) != HEAD_BYTES:
            raise bad(f"expected a head of {HEAD_BYTES} bytes; it ends after {len(data)}")
        magic, base, base_length, target, target_length = _HEAD.unpack(data)
        if magic != MAGIC:
            raise bad(f"expected {MAGIC!r}; got {magic!r}")
        if max(base_length, target_length) > limits.ARTIFACT:
            raise bad(f"expected files of at most {limits.ARTIFACT} bytes; got {max(base_length, target_length)}")
        return cls(base.hex(), base_length, target.hex(), target_length)


@dataclass(frozen=True, slots=True)
class Frame:
    operation: Operation
    kind: Kind
    payload: int
    length: int
    offset: int

    @property
    def reads(self) -> int:
        """Bytes of the base."""
        return self.length * _READS.get(self.operation, 0)

    @property
    def adds(self) -> int:
        """Bytes of the target."""
        return 0 if self.operation is Operation.TABLE else self.length

    def to_bytes(self) -> bytes:
        return _FRAME.pack(self.operation, self.kind, 0, self.payload, self.length, self.offset)

    @classmethod
    def parse(cls, data: bytes, *, head: Head, left: int) -> "Frame":
        """Check a frame's head. `left`: bytes that the target still lacks. What passes is bounded in every way."""
        if len(data) != FRAME_BYTES:
            raise bad(f"expected the head of a frame; it ends {left} bytes before the target is whole")
        number, kind, reserved, payload, length, offset = _FRAME.unpack(data)
        try:
            frame = cls(Operation(number), Kind(kind), payload, length, offset)
        except ValueError as error:
            raise bad(str(error)) from error
        if reserved or frame.kind not in _KINDS[frame.operation]:
            raise bad(f"{frame.operation.name} of kind {frame.kind.name} is not defined")
        frame._check(head, left)
        return frame

    def _check(self, head: Head, left: int) -> None:
        if self.length == 0 or self.length % self.kind.width or self.adds > left:
            raise bad(f"{self.operation.name}: expected 1 to {left} bytes, whole values; got {self.length}")
        if self.operation in {Operation.COPY, Operation.SCALES} and self.payload:
            raise bad(f"{self.operation.name} carries nothing")
        if self.operation is not Operation.COPY and max(self.length, self.reads, self.payload - 64) > MAX_FRAME:
            raise bad(f"{self.operation.name}: expected at most {MAX_FRAME} bytes; got {self.length}, {self.payload}")
        if self.reads and self.offset + self.reads > head.base_length:
            raise bad(f"{self.operation.name}: reads to {self.offset + self.reads} of a base of {head.base_length}")
        if self.operation is Operation.TABLE and (self.length % TABLE_ENTRY or self.offset == 0):
            raise bad(f"TABLE: expected pairs and a stride; got {self.length} bytes, stride {self.offset}")
