"""Who may import whom, what stays pure, and what never enters the repository."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DECIDING = ("policy", "facts", "variants", "stages", "explaining", "guards", "quality", "betting")  # of rollouts
PURE = [
    *sorted((ROOT / "device_sdk" / "protocol").rglob("*.py")),
    ROOT / "device_sdk" / "updater.py",
    ROOT / "device_sdk" / "counts.py",
    ROOT / "device_sdk" / "comparison.py",
    ROOT / "device_sdk" / "sampling.py",
    *(ROOT / "fleet" / "rollouts" / f"{name}.py" for name in DECIDING),
    ROOT / "fleet" / "devices" / "selection.py",
    ROOT / "fleet" / "devices" / "mirrors.py",
]
# What decides without IO, clock, chance or Django may be made of these. Typing aside, `datetime` gives types only.
INNOCENT = {
    "__future__", "base64", "binascii", "bisect", "bz2", "collections", "collections.abc", "dataclasses", "datetime",
    "contextlib", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "hmac", "io", "ipaddress",
    "itertools", "json", "lzma", "math", "numbers", "numpy", "numpy.lib", "numpy.typing", "operator", "random", "re",
    "statistics", "string", "struct", "tokenize", "types", "typing", "unicodedata", "urllib.parse", "uuid", "zipfile",
    "zlib",
}  # fmt: skip
PURE_OURS = (
    "device_sdk.protocol", "device_sdk.updater", "device_sdk.counts", "device_sdk.comparison", "device_sdk.sampling",
    "fleet.devices.selection", "fleet.devices.mirrors", "fleet.errors",
    *(f"fleet.rollouts.{name}" for name in DECIDING),
)  # fmt: skip
# Names that reach the clock, the disk or global chance even from an innocent module.
IMPURE_CALLS = {
    "open", "print", "input", "exec", "eval", "__import__", "datetime.now", "datetime.utcnow", "datetime.today",
    "date.today", "uuid.uuid1", "uuid.uuid4", "random.random", "random.randint", "random.choice", "random.choices",
    "random.shuffle", "random.sample", "random.uniform", "random.seed", "random.randrange", "random.getrandbits",
    "random.SystemRandom", "np.random", "numpy.random", "bz2.open", "bz2.BZ2File", "lzma.open", "lzma.LZMAFile",
    "io.open", "io.FileIO", "tokenize.open", "zipfile.Path", "np.load", "np.save", "np.savez", "np.fromfile",
    "np.memmap",
}  # fmt: skip
CHECKING = re.compile(r"(^|\.)_?(assert|expect|check|verify|raises|warns|deprecated_call|fail)(_\w*|[a-z]*)?$")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository: what git knows, and what it would add."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns)
    assert listed.returncode == 0, listed.stderr
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_the_rooms_import_each_other_only_as_the_contracts_allow():
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_importing_the_protocol_loads_nothing_heavy():
    names = sorted(path.stem for path in (ROOT / "device_sdk" / "protocol").glob("*.py") if path.stem != "__init__")
    imports = "".join(f"import device_sdk.protocol.{name}\n" for name in names)
    done = run(sys.executable, "-c", f"{imports}import json, sys; print(json.dumps(sorted(sys.modules)))")

    assert done.returncode == 0, done.stderr
    roots = {name.partition(".")[0] for name in json.loads(done.stdout)}
    heavy = {"onnxruntime", "onnx", "numpy", "tuf", "securesystemslib", "cryptography", "requests", "django", "fleet"}
    assert roots & heavy == set()


def test_importing_the_sdk_alone_loads_nothing_heavy():
    done = run(sys.executable, "-c", "import device_sdk, json, sys; print(json.dumps(sorted(sys.modules)))")

    assert done.returncode == 0, done.stderr
    roots = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert roots & {"onnxruntime", "numpy", "tuf", "requests", "django"} == set()


def test_a_web_process_loads_what_only_workers_need_when_it_is_needed():
    setup = "import django, json, sys; django.setup(); import fleet.urls; print(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "fleet.settings"}
    done = subprocess.run(
        [sys.executable, "-c", setup], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    roots = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert roots & {"pyarrow", "onnx", "onnxruntime"} == set()  # pages count devices and read guards with numpy


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_decides_is_pure(path: Path):
    tree = ast.parse(path.read_text())

    assert [name for name in imported(tree) if not innocent(name)] == []
    assert sorted(set(called(tree)) & IMPURE_CALLS) == []


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def innocent(name: str) -> bool:
    return name in INNOCENT or name.rpartition(".")[0] in INNOCENT or name.startswith(PURE_OURS)


def called(tree: ast.AST) -> Iterator[str]:
    """Every called name, with each of its leading parts: `np.random.rand` gives `np.random` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts = ast.unparse(node.func).split(".")
            yield from (".".join(parts[: length + 1]) for length in range(len(parts)))
            yield ".".join(parts[-2:])


def test_the_check_of_purity_finds_a_clock_a_file_and_a_die():
    tree = ast.parse("import os, time\nfrom django.db import models\nnow = datetime.datetime.now()\nrandom.random()\n")

    assert [name for name in imported(tree) if not innocent(name)] == ["os", "time", "django.db.models"]
    assert set(called(tree)) & IMPURE_CALLS == {"datetime.now", "random.random"}


def test_no_registry_and_no_path_of_one_machine_is_in_the_repository():
    forbidden = re.compile(
        "|".join([r"pypi\." + "org", "python" + "hosted", "registry" + r"\.npmjs", "/op" + "t/(wheels|pypi)",
                  "/wor" + "k/", "/roo" + "t/", r"/hom" + r"e/[a-z]", "index" + "-url http"])
    )  # fmt: skip
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path.suffix not in {".png", ".woff2", ".ico", ".jpg"}
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert found == []


def test_the_smaller_locks_hold_what_the_test_lock_holds():
    """One venv serves the demonstration and the tests, and the device is tested with what is locked for it."""
    whole = pins("test")
    for name in ("server", "demo", "device"):
        assert pins(name).items() <= whole.items(), name


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return dict(line.split(" ")[0].split("==") for line in lines if re.match(r"[a-z0-9]", line))


def test_every_locked_file_is_locked_by_hash():
    for path in (ROOT / "requirements").glob("*.txt"):
        entries = re.split(r"\n(?=[a-z0-9])", path.read_text())[1:]
        assert entries, path
        assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_every_test_checks_something():
    trees = {path: ast.parse(path.read_text()) for path in tracked("tests/**.py")}
    helpers = set().union(*(checking(tree) for tree in trees.values()))
    idle = [
        f"{path.relative_to(ROOT)}::{name}"
        for path, tree in trees.items()
        if path.name.startswith("test_")
        for name in idle_tests(tree, helpers)
    ]
    assert idle == []


def idle_tests(tree: ast.AST, helpers: set[str]) -> list[str]:
    """Tests that neither assert, nor expect an error, nor call a helper that does."""
    tests = [function for function in functions(tree) if function.name.startswith("test_")]
    return [test.name for test in tests if not checks(test, helpers)]


def checking(tree: ast.AST) -> set[str]:
    return {function.name for function in functions(tree) if checks(function, set())}


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def checks(function: ast.FunctionDef, helpers: set[str]) -> bool:
    return any(isinstance(node, ast.Assert | ast.Raise) or is_check(node, helpers) for node in ast.walk(function))


def is_check(node: ast.AST, helpers: set[str]) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    return bool(CHECKING.search(name)) or name.rpartition(".")[2] in helpers


def test_a_test_without_assertion_is_noticed():
    source = """
def test_idle(): f()
def test_error():
    with pytest.raises(E): f()
def must_hold(): assert f()
def test_helped(): must_hold()
"""
    tree = ast.parse(source)
    assert idle_tests(tree, checking(tree)) == ["test_idle"]
