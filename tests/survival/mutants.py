"""Stores with one precaution taken out: a matrix that does not notice them would prove nothing."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from device_sdk import store
from device_sdk.store import Store
from tests.survival import matrix
from tests.survival.matrix import FIRST, FORGIVE, REJECT, UPDATE, Course
from tests.survival.outcome import Step, Tried

SYNCS = frozenset({"sync", "sync_directory"})
# What one store forgets to sync: the end of a file's name, or a folder.
FORGOTTEN = {
    ".part": UPDATE, ".json.tmp": UPDATE, ".state.json.tmp": UPDATE, ".bad.tmp": REJECT,
    "blobs/": UPDATE, "manifests/": UPDATE, "store/": UPDATE,
}  # fmt: skip
ALL = (FORGIVE, FIRST, UPDATE, REJECT)  # the short one first: a mutant needs one that notices it
_SOURCE = Path(store.__file__)


def syncs() -> list[tuple[int, str]]:
    """Every statement of the store that syncs: its line, and what it says."""
    return [(node.lineno, ast.unparse(node)) for node in ast.walk(_tree()) if _is_sync(node)]


@contextmanager
def without(line: int) -> Iterator[type[Store]]:
    """The store without the statement at this line of its source."""
    tree = _tree()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [ast.Pass() if getattr(each, "lineno", 0) == line else each for each in body]  # type: ignore[attr-defined]
    with _made(tree) as kind:
        yield kind


@contextmanager
def marking_last() -> Iterator[type[Store]]:
    """The store that switches back from a bad release first and marks it then."""
    tree = _tree()
    (reject,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "reject"]
    (block,) = [node for node in reject.body if isinstance(node, ast.With)]
    at = next(index for index, each in enumerate(block.body) if "_write_durably" in ast.unparse(each))
    block.body.append(block.body.pop(at))
    with _made(tree) as kind:
        yield kind


def marking() -> int:
    """The line that marks a bad release."""
    lines = [node.lineno for node in ast.walk(_tree()) if isinstance(node, ast.Expr) and "(mark," in ast.unparse(node)]
    (line,) = lines
    return line


def notices(folder: Path, *, enough: int = 0, step: Step = lambda _: None) -> Iterator[tuple[str, int]]:
    """Each mutant, and how many promises the matrix saw it break. `enough`: stop at so many."""
    for line, text in syncs():
        step(f"without line {line}, {text}")
        with without(line) as kind:
            yield f"store.py:{line} {text}", _lost(folder / f"sync-{line}", ALL, enough, kind=kind)
    for name, course in FORGOTTEN.items():
        step(f"forgets to sync {name}")
        yield f"forgets to sync {name}", _lost(folder / name.strip("/"), (course,), enough, forgets=name)
    for name, broken in (
        ("switches back before the mark", marking_last()),
        ("switches back, no mark", without(marking())),
    ):
        step(name)
        with broken as kind:
            yield name, _killed(folder / name, kind)


def _lost(folder: Path, courses: tuple[Course, ...], enough: int, **how: object) -> int:
    broken = 0
    for tried in matrix.losses(folder, courses=courses, enough=enough, **how):  # type: ignore[arg-type]
        broken += len(tried.broken)
        if enough and broken >= enough:
            break
    return broken


def _killed(folder: Path, kind: type[Store]) -> int:
    """Broken promises of the rollback, cut before each operation."""
    tried = Tried("rollback")
    names = matrix.operations(REJECT, folder / "count" / matrix.STORE)
    for cut in range(len(names) + 1):
        home = folder / str(cut) / matrix.STORE
        told, _ = REJECT.run(home, matrix.CountingOps(cut_at=cut), kind)
        tried.note(str(cut), matrix.verdict(REJECT, home, told))
    return len(tried.broken)


def _tree() -> ast.Module:
    return ast.parse(_SOURCE.read_text())


def _is_sync(node: ast.AST) -> bool:
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return is_call and ast.unparse(node.value.func) in {f"self._ops.{name}" for name in SYNCS}  # type: ignore[attr-defined]


@contextmanager
def _made(tree: ast.Module) -> Iterator[type[Store]]:
    module = ModuleType("mutant_store")
    sys.modules[module.__name__] = module  # where dataclasses look up their annotations
    try:
        exec(compile(ast.fix_missing_locations(tree), str(_SOURCE), "exec"), module.__dict__)
        yield module.Store
    finally:
        del sys.modules[module.__name__]
