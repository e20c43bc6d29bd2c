"""The attack table is whole: a test for every row, and for every row a check that was taken away to see it fail."""

import ast
from pathlib import Path

import pytest

from tests.attacks.mutants import MUTANTS, original, row_of

ROWS = range(1, 41)


def test_every_row_has_a_test_of_its_name():
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")]
    rows = {row_of(node.name) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert rows - {0} == set(ROWS)


def test_every_row_has_a_mutant():
    assert {mutant.row for mutant in MUTANTS} == set(ROWS)
    assert len({(mutant.row, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: f"{each.row}-{each.name}")
def test_what_a_mutant_replaces_stands_in_the_code_once(mutant):
    for edit in mutant.edits:
        text = original(edit.file).read_text()
        assert text.count(edit.text) == 1, edit.text
        if edit.file.endswith(".py"):
            compile(text.replace(edit.text, edit.instead), edit.file, "exec")
