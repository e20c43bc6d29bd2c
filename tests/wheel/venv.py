"""The device's own world: a fresh venv with the wheel, its locked dependencies, and nothing of the server."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services import temporary_folder

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class BareVenv:
    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def script(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def run(self, *arguments: str, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
        """Its Python, isolated: neither this checkout nor the caller's PYTHONPATH is on its path."""
        done = subprocess.run(
            [self.python, "-I", *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        if check and done.returncode:
            raise AssertionError(f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done


def built_wheel() -> Iterator[Path]:
    with temporary_folder("wheel") as folder:
        _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
        (built,) = folder.glob("*.whl")
        yield built


def made(wheel: Path) -> Iterator[BareVenv]:
    with temporary_folder("device") as folder:
        venv = BareVenv(folder / "venv")
        _run(sys.executable, "-m", "venv", str(venv.folder))
        pip = (venv.python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
        _run(*pip, "--require-hashes", "-r", str(ROOT / "requirements" / "device.txt"))
        _run(*pip, "--no-deps", "--no-index", str(wheel))
        yield venv


@pytest.fixture(scope="session", name="wheel")
def _wheel() -> Iterator[Path]:
    yield from built_wheel()


@pytest.fixture(scope="session", name="bare_venv")
def _bare_venv(wheel: Path) -> Iterator[BareVenv]:
    yield from made(wheel)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
