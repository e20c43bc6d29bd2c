"""What failed beside the others runs once more, alone: `python -m tests.again STATUS`, after a run of the suite.

The suite starts hundreds of processes on two cores, and what waits for one of them can wait too long. Such a failure
says nothing of the product, and must not hide one that does. So: few tests, each once, nothing beside them, and their
names are printed either way, for whoever mends them. A fault of the product fails alone too.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAST_FAILED = ".pytest_cache/v/cache/lastfailed"
FAILED = 1  # pytest's exit status; others mean that it could not run them all
MOST = 3  # more than this is no coincidence


def failed(root: Path = ROOT) -> list[str]:
    path = root / LAST_FAILED
    return sorted(json.loads(path.read_text())) if path.exists() else []


def run_alone(names: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *names]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main(status: int, names: list[str]) -> int:
    if status != FAILED or not names or len(names) > MOST:
        return status
    print(f"\n{len(names)} failed beside the others; once more, alone:", *names, sep="\n  ", flush=True)  # noqa: T201
    status = run_alone(names)
    if not status:
        print("\nPassed alone. A test that needs to be alone wants mending:", *names, sep="\n  ", flush=True)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), failed()))
