"""SECURITY.md promises what tests show: each test, file and row that it names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "SECURITY.md").read_text()
ROWS = re.compile(r"`tests/attacks` rows? ([0-9, ]+(?:to [0-9]+)?)")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def rows(text: str) -> set[int]:
    """`1, 2, 4 to 17` as numbers."""
    found: set[int] = set()
    for part in text.split(","):
        numbers = [int(number) for number in re.findall(r"[0-9]+", part)]
        found |= set(range(numbers[0], numbers[-1] + 1)) if numbers else set()
    return found


def test_every_file_and_test_that_it_names_is_there() -> None:
    named = re.findall(r"`((?:tests|deploy|device_sdk)/[^`:]+)(?:::([a-z0-9_]+))?`", PAGE)
    assert len(named) > 15
    for path, test in named:
        assert (ROOT / path).exists(), path
        if test:
            assert test in functions(ROOT / path), f"{path}::{test}"


def test_every_row_of_the_attack_table_that_it_names_has_a_test() -> None:
    tests = {name for path in (ROOT / "tests" / "attacks").glob("*.py") for name in functions(path)}
    claimed = {row for text in ROWS.findall(PAGE) for row in rows(text)}
    assert len(claimed) > 20
    tested = {int(match[1]) for name in tests if (match := re.match(r"test_row_0*([0-9]+)_", name))}
    assert claimed <= tested


def test_every_command_that_it_names_can_be_made() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"`make ([a-z-]+)", PAGE))
    assert commands
    assert commands <= targets


def test_each_promise_names_what_shows_it() -> None:
    table = PAGE.partition("## What is promised")[2].partition("\n## ")[0]
    promises = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(promises) > 10
    assert all("`tests/" in line.split("|")[2] for line in promises)
