"""Numbers that add up: the histogram, the sums over processes, and what an event says of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_sdk.counts import CLASSES, OTHER, Counts, added, bucket, classes_text, detail, ordered, quantile
from device_sdk.ledger import Done, Ledger
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.events import DETAIL_CHARS
from device_sdk.stats import Cell

A, B = "a" * 64, "b" * 64


def timed(nanoseconds):
    cell = Cell()
    for each in nanoseconds:
        cell.took(int(each))
    cell.checked = len(nanoseconds)
    return replace(cell.counts(), calls=len(nanoseconds))


@given(st.integers(0, 10**12))
def test_bucket_of_a_latency_is_narrow_and_rises(nanoseconds):
    middle = quantile(((bucket(nanoseconds), 1),), 0.5) * 1e3
    assert abs(middle - nanoseconds) <= max(nanoseconds / 30, 1)
    assert bucket(nanoseconds) <= bucket(nanoseconds + 1) <= bucket(nanoseconds) + 1


def test_latencies_of_processes_are_merged_as_if_one_had_made_all_calls():
    """Not the slowest process's: one that was called twice, and slowly, does not speak for the device."""
    random = np.random.default_rng(1)
    fast, slow = random.normal(1e6, 5e4, 2_000), random.normal(9e6, 5e5, 20)
    merged = added([timed(fast), timed(slow)])
    whole = np.concatenate([fast, slow])
    assert merged.p50 == pytest.approx(np.quantile(whole, 0.50) / 1e3, rel=0.03)
    assert merged.p95 == pytest.approx(np.quantile(whole, 0.95) / 1e3, rel=0.03)
    assert merged.calls == 2_020


def test_quantiles_of_nothing_are_zero():
    assert (Counts().p50, Counts().p95, Counts().mean_confidence) == (0.0, 0.0, 0.0)


def test_sum_of_counts_weighs_each_answer_the_same():
    one = Counts(calls=1, scored=1, confidence=0.5, classes=((3, 1),))
    many = Counts(calls=9, scored=9, confidence=9.0, classes=((2, 4), (3, 5)), changes=2)
    both = added([one, many])
    assert (both.mean_confidence, both.classes, both.changes) == (0.95, ((2, 4), (3, 6)), 2)
    assert added([]) == Counts()


def test_class_changes_and_the_rest_beyond_the_bound_are_counted():
    cell = Cell()
    for kind in (1, 1, 2, 1):
        cell.answered(kind, 0.5)
    assert (cell.changes, cell.counts().classes) == (2, ((1, 3), (2, 1)))
    for kind in range(10 * CLASSES):
        cell.answered(kind, 0.5)
    classes = dict(cell.counts().classes)
    assert len(classes) == CLASSES + 1
    assert classes[OTHER] == 10 * CLASSES - CLASSES
    assert sum(classes.values()) == cell.scored


def test_event_names_the_most_frequent_classes_and_stays_short():
    assert classes_text(ordered({5: 3, 1: 9, OTHER: 2})) == "1:9 5:3 other:2"
    long = classes_text(ordered({10**17 + n: 10**17 for n in range(40)}))
    assert len(long) <= DETAIL_CHARS
    told = detail(Counts(calls=4, scored=2, confidence=1.5, classes=((0, 2),)), load="0a1b2c3d", seconds=2)
    assert (told["load"], told["confidence"], told["classes"], told["scored"]) == ("0a1b2c3d", 0.75, "0:2", 2)
    assert not {"scored", "confidence", "classes"} & detail(Counts(calls=4)).keys()


def test_counts_survive_a_file():
    counts = Counts(calls=3, times=((200, 3),), scored=2, confidence=1.25, classes=((OTHER, 1), (4, 1)), changes=1)
    assert Counts.parse(json.loads(json.dumps(counts.to_json()))) == counts
    for broken in ({"times": [[1]]}, {"classes": [[1, -2]]}, {"times": [[True, 1]]}, {"calls": -1}, {"times": 5}, []):
        with pytest.raises(ProtocolError):
            Counts.parse(broken)


def test_ledger_survives_a_restart_and_forgets_what_is_not_kept(tmp_path, caplog):
    path = tmp_path / "ledger.json"
    ledger = Ledger(path)
    ledger.keep("m", A, Done(Counts(calls=5), 9.0), kept={A})
    ledger.keep("m", B, Done(Counts(calls=2), 1.0), kept={A, B})
    again = Ledger(path)
    assert (again.get("m", A), again.get("m", B).counts.calls) == (Done(Counts(calls=5), 9.0), 2)
    again.keep("m", B, Done(Counts(calls=3)), kept={B})
    assert Ledger(path).get("m", A) == Done()
    path.write_text('{"m": {"nonsense": {}}}')
    assert Ledger(path).get("m", B) == Done()
    assert "was lost" in caplog.text
