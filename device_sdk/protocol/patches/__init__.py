r"""Patches: one file rebuilt from another that the device has. The format, its decoder, the arithmetic of both sides.

    magic    8 bytes  "FLEETP1\n"
    base     sha256 (32 bytes), length (u64): the file that is read; nothing's sha256 and 0 for a patch that needs none
    target   sha256 (32 bytes), length (u64): the file that comes out
    frames   in the order of the target, until it is whole; then the patch ends

    frame    operation (u8), kind (u8), reserved (u16, 0), payload (u32, bytes), length (u64), offset (u64), payload

All numbers are little-endian. `length` is what the frame adds to the target, in bytes; `offset` where its base lies.
A payload is one plane for each byte of the kind: codec (u8), size (u32), then `size` bytes that decompress to exactly
`length / width of the kind` bytes, the lowest byte of every value first. Frames do not depend on each other, but for
the scales that the last TABLE set.

    COPY      `length` bytes of the base at `offset`; no payload, and the only frame above MAX_FRAME
    LITERAL   bytes as they are; kind U8
    SUBTRACT  value = base value + difference, both as integers that keep their order; differences are zig-zag
    PLANES    values, floats turned left by one bit, so that the exponent fills the highest byte
    HALF      float16 of the base's float32 at `offset`, plus a difference as in SUBTRACT; kind F16
    TABLE     adds nothing: `length` bytes of scales (f32) and as many zero points (f32); `offset`: values that lie
              between two values of one channel and its next; kind U8, one plane
    QUANTISE  clip(round(float32 / scale) + zero point) of the base's float32 at `offset`, plus a difference as in
              SUBTRACT; the payload begins with the number (u64) of the frame's first value in its tensor;
              value i has the scale (i / TABLE's offset) modulo the number of scales; kind I8 or U8
    SCALES    `length` bytes of the last TABLE at `offset`, which are in the target too; no payload

Order-keeping integers: floats have their sign bit turned where it is 0, and all bits where it is 1; integers stay as
they are. Sums and differences wrap around. float16, bfloat16 alike: they are sorted by the same rule.

Codecs: STORED; ZLIB (raw deflate); BZ2; LZMA (raw LZMA2, dictionary of at most 1 MiB); ZEROS (`size` 0); QUARTERS, for
bytes that are mostly 0, 1 and 2: two planes of other codecs, first two bits of every byte (four to a byte, the lowest
bits first, zeros after the last), in which 3 stands for a byte of the second plane, which has them in order.

A patch carries no trust: what comes out counts only when it has the length and sha256 that are signed.
"""
