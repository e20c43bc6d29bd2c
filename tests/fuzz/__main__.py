"""`make fuzz SECONDS=600`: each target in turn for its share of time, each message within bounds of time and memory.

What makes a parser fail is written to `crashes/` beside this file, as `<target>.<sha256>.bin`, and printed; the exit
code is then 1. The limits: SECONDS_EACH for one message, and MEMORY beyond what the process had at its start.
"""

import argparse
import logging
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.mutations import mutants
from tests.fuzz.targets import BY_NAME, TARGETS, Target, attempt

CRASHES = Path(__file__).parent / "crashes"
SECONDS_EACH = 10.0
MEMORY = 2 * 1024**3
ROUND = 200  # messages between two looks at the clock


class TooSlowError(Exception):
    """One message took longer than SECONDS_EACH."""


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlowError


@contextmanager
def bounded() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, SECONDS_EACH)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def try_for(target: Target, seconds: float) -> tuple[int, bytes | None]:
    """How many messages were tried, and the smallest that failed."""
    ends, tried = time.monotonic() + seconds, 0
    failed: list[bytes] = []

    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(data=mutants(target.seeds(), is_json=target.is_json))
    def try_it(data: bytes) -> None:
        nonlocal tried
        tried += 1
        try:
            with bounded():
                attempt(target, data)
        except BaseException:
            failed.append(data)
            raise

    while time.monotonic() < ends:
        try:
            try_it()
        except Exception:  # noqa: BLE001  # whatever it was, the parser should have named it
            traceback.print_exc()
            return tried, min(failed, key=len)
    return tried, None


def keep(target: Target, data: bytes, folder: Path) -> Path:
    path = folder / f"{target.name}.{sha256(data).hexdigest()[:16]}.bin"
    path.write_bytes(data)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--target", action="append", choices=sorted(BY_NAME), help="may be repeated; default: all")
    parser.add_argument("--crashes", type=Path, default=CRASHES)
    given_arguments = parser.parse_args(argv)
    targets = [BY_NAME[name] for name in given_arguments.target] if given_arguments.target else list(TARGETS)
    signal.signal(signal.SIGALRM, _too_slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.WARNING)  # every refused signature has a line
    crashed = 0
    for target in targets:
        tried, data = try_for(target, given_arguments.seconds / len(targets))
        print(f"{target.name}: {tried} messages, {'no crash' if data is None else 'CRASHED'}", flush=True)  # noqa: T201
        if data is not None:
            crashed += 1
            print(f"  {keep(target, data, given_arguments.crashes)}: {data[:200]!r}", flush=True)  # noqa: T201
    return int(crashed > 0)


if __name__ == "__main__":
    sys.exit(main())
