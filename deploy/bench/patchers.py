"""What other tools make of the same two files: zstd, `zstd --patch-from`, xdelta3, bsdiff4. Used where installed.

Debian has the first three (`apt install zstd xdelta3`), the tests' packages hold the last; nothing here needs them.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
BSDIFF_MOST = 32 * MIB  # bytes: at 90 MB it takes minutes and 1.6 GB
LONG = "--long=27"
_STARTER = """
import os, sys
_, status, used = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ), 0)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
_BSDIFF = "import sys, bsdiff4; getattr(bsdiff4, sys.argv[1])(*sys.argv[2:])"


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes on the wire; seconds of processor time; bytes resident at the peak of decoding."""

    wire: int
    encode: float
    decode: float
    peak: int


Command = Callable[[Path, Path, Path], list[str]]  # of base, what is read, what is written


@dataclass(frozen=True, slots=True)
class Tool:
    is_there: bool
    encode: Command
    decode: Command
    needs_base: bool = True
    most: int = 2**62  # bytes of a file

    def make(self, base: Path, target: Path, place: Path) -> Made | str:
        """Encode and decode, and compare; or why not."""
        if not self.is_there:
            return "not installed"
        if self.needs_base and not base.stat().st_size:
            return "-"
        if target.stat().st_size > self.most:
            return f"not tried above {self.most // MIB} MiB"
        patch, back = place / "other.patch", place / "other.back"
        encode, _ = _spent(self.encode(base, target, patch))
        decode, peak = _spent(self.decode(base, patch, back))
        if _sha256(back) != _sha256(target):
            raise RuntimeError(f"{self.encode(base, target, patch)[0]} gave other bytes")
        made = Made(patch.stat().st_size, encode, decode, peak)
        patch.unlink()
        back.unlink()
        return made


def _zstd(*options: str) -> Callable[[Path, Path, Path], list[str]]:
    return lambda base, source, out: [
        "zstd", "-q", "-f", LONG, *(option.format(base=base) for option in options), str(source), "-o", str(out)
    ]  # fmt: skip


def _xdelta(way: str) -> Command:
    return lambda base, source, out: [
        "xdelta3", way, "-f", "-9", "-B", str(max(base.stat().st_size, MIB)), "-s", str(base), str(source), str(out)
    ]  # fmt: skip


_IS_ZSTD, _IS_XDELTA = shutil.which("zstd") is not None, shutil.which("xdelta3") is not None
PATCH_FROM = "zstd --patch-from"
TOOLS: Mapping[str, Tool] = {
    "zstd": Tool(_IS_ZSTD, _zstd(), _zstd("-d"), needs_base=False),
    PATCH_FROM: Tool(_IS_ZSTD, _zstd("--patch-from={base}"), _zstd("-d", "--patch-from={base}")),
    "xdelta3": Tool(_IS_XDELTA, _xdelta("-e"), _xdelta("-d")),
    "bsdiff4": Tool(
        importlib.util.find_spec("bsdiff4") is not None,
        lambda base, source, out: [sys.executable, "-c", _BSDIFF, "file_diff", str(base), str(source), str(out)],
        lambda base, source, out: [sys.executable, "-c", _BSDIFF, "file_patch", str(base), str(out), str(source)],
        most=BSDIFF_MOST,
    ),
}


def all_make(base: Path, target: Path, place: Path) -> dict[str, Made | str]:
    return {name: tool.make(base, target, place) for name, tool in TOOLS.items()}


def _spent(command: list[str]) -> tuple[float, int]:
    """Processor seconds, and bytes resident at the peak. Started by a small process: the kernel counts into the peak
    of a new one what its parent held.
    """
    done = subprocess.run([sys.executable, "-S", "-c", _STARTER, *command], stdout=subprocess.PIPE, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak) * 1024


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
