"""The SDK's own tests against the wheel: `python -m tests.wheel [arguments of pytest]`.

In a fresh venv with the wheel and its locked dependencies. Of this checkout the tests are there, as copies, and beside
them, by links, what runs them and makes their models: neither the server, nor the SDK's source, nor Django.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.wheel import venv

TOOLS = (
    "pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest-timeout", "hypothesis", "sortedcontainers",
    "onnx", "protobuf", "ml-dtypes", "typing-extensions",
)  # fmt: skip
TESTS = ("__init__.py", "simulator.py", "sdk", "survival")
NEEDS_THE_SERVER = (
    "test_patching.py",
)  # by its encoder of patches; the decoder's golden patches are in tests/protocol
FOREIGN = "import importlib.util as u, sys; sys.exit(any(u.find_spec(name) for name in ('django', 'fleet', 'deploy')))"


def main(arguments: Sequence[str]) -> int:
    with contextmanager(venv.built_wheel)() as wheel, contextmanager(venv.made)(wheel) as bare:
        return run(bare, arguments or ("-q", "tests/sdk")).returncode


def run(bare: venv.BareVenv, arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """pytest, in a folder beside the venv. Raises CalledProcessError where the server can be found there."""
    with TemporaryDirectory(dir=bare.folder.parent) as name:
        folder = Path(name)
        _copy(folder / "tests")
        (folder / "pytest.ini").write_text("[pytest]\ntimeout = 180\nfilterwarnings = error\n")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, _link(folder / "tools"))))}
        subprocess.run([bare.python, "-c", FOREIGN], cwd=folder, env=environment, check=True)
        command = [bare.python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False, text=True, **options)


def _copy(folder: Path) -> None:
    source = venv.ROOT / "tests"
    folder.mkdir(parents=True)
    for name in TESTS:
        if (source / name).is_dir():
            shutil.copytree(
                source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", *NEEDS_THE_SERVER)
            )
        else:
            shutil.copy(source / name, folder / name)


def _link(folder: Path) -> Path:
    folder.mkdir()
    for name in TOOLS:
        found = distribution(name)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in {"..", "__pycache__"}}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
