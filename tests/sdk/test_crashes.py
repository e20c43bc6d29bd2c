"""The store's crash matrix, as far as it takes seconds; `make drill` runs all of it and prints it."""

from pathlib import Path

import pytest

from device_sdk import store
from device_sdk.store import FileOps
from tests.survival import disk, matrix, mutants
from tests.survival.crashes import CHANGES
from tests.survival.outcome import in_memory

EVERY = 9  # of the nested cuts: the drill tries all


@pytest.fixture
def folder():
    with in_memory() as found:
        yield found


def test_every_operation_that_changes_the_disk_can_be_cut():
    reading = {"open", "names"}
    assert {name for name in vars(FileOps) if not name.startswith("_")} == CHANGES | reading


def test_a_cut_at_any_operation_leaves_the_old_or_the_new(folder):
    for tried, names in matrix.kills(folder):
        assert tried.broken == []
        assert tried.count > len(names) > 30
        assert len(tried.outcomes) == 2  # some of the old, some of the new


def test_a_cut_in_the_recovery_of_a_cut_leaves_the_old_or_the_new(folder):
    found = list(matrix.nested(folder, every=EVERY))
    assert [tried.broken for tried in found] == [[], [], []]
    assert sum(tried.count for tried in found) > 50


def test_losing_all_that_was_not_synced_leaves_the_old_or_the_new(folder):
    found = list(matrix.losses(folder))
    assert [tried.broken for tried in found] == [[], [], [], []]
    assert sum(tried.count for tried in found) >= 300


def test_a_disk_that_fails_at_any_operation_leaves_the_old_model_and_the_update_goes_on_where_it_stood(folder):
    for tried in matrix.failures(folder, every=4):
        assert tried.broken == []
        assert tried.count > 20


def test_a_real_disk_that_is_full_or_read_only_leaves_the_old_model_and_the_update_goes_on(tmp_path):
    found, missing = disk.tried(tmp_path)
    if missing:  # a machine that lets nobody mount, as many containers: the errors injected above are what there is
        assert any(word in missing for word in ("permitted", "denied", "'mount'", "no unshare")), missing
        return
    assert [tried.broken for tried in found] == [[], []]
    full, read_only = (tried.outcomes for tried in found)
    assert sum(count for name, count in full.items() if name.startswith("refused, served")) >= 5
    assert sum(count for name, count in full.items() if name.startswith("updated")) >= 5
    assert list(read_only) == ["refused, then old release"]


def test_the_matrix_notices_each_precaution_that_is_taken_out(folder):
    """Every sync of the store's source, what is forgotten of each kind of file, and the mark of a bad release."""
    found = dict(mutants.notices(folder, enough=1))
    assert {name for name, broken in found.items() if not broken} == set()
    assert len(found) == len(mutants.syncs()) + len(mutants.FORGOTTEN) + 2
    assert len(mutants.syncs()) >= 7


def test_the_unchanged_source_breaks_no_promise(folder):
    """What is found in a mutant is the mutant's."""
    with mutants.without(0) as kind:
        found = list(matrix.losses(folder, courses=(matrix.REJECT,), kind=kind))
    assert [tried.broken for tried in found] == [[]]


def test_the_store_syncs_by_its_operations_alone():
    """The mutants are found by what the source says: a sync of another kind would go unnoticed."""
    source = Path(store.__file__).read_text()
    assert source.count("os.fsync(") == 1
    assert source.count("fsync(") == 4  # with the helper that calls it, and the two operations that call the helper
