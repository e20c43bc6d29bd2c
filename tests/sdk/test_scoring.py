"""What an output says: the class on top, and how sure the model is."""

import numpy as np
import pytest

from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.scores import Scores
from device_sdk.scoring import ROWS, answers


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("probabilities", [[0.1, 0.7, 0.2]], [(1, 0.7)]),
        ("probabilities", [0.1, 0.7, 0.2], [(1, 0.7)]),
        ("probabilities", [[0.9], [0.2]], [(1, 0.9), (0, 0.8)]),
        ("probabilities", [[[0.1, 0.9], [0.8, 0.2]]], [(1, 0.9), (0, 0.8)]),
        ("probabilities", 0.3, [(0, 0.7)]),
        ("probabilities", [[5.0, 2.0]], [(0, 1.0)]),  # no probability: a mean must stay one
        ("logits", [[0.0, np.log(3.0)]], [(1, 0.75)]),
        ("logits", [[1000.0, -1000.0]], [(0, 1.0)]),
        ("logits", [[np.log(3.0)], [-np.log(3.0)], [-1000.0]], [(1, 0.75), (0, 0.75), (0, 1.0)]),
        ("probabilities", [[np.nan, np.nan]], [(0, 0.0)]),
        ("probabilities", np.zeros((0, 3)), []),
    ],
)
def test_class_and_confidence_are_read_off_the_last_axis(kind, value, expected):
    found = answers(kind, np.asarray(value, np.float32))
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    assert [sure for _, sure in found] == pytest.approx([sure for _, sure in expected], abs=1e-6)


def test_labels_are_classes_themselves():
    assert answers("labels", np.array([3, 1], np.int64)) == [(3, 0.0), (1, 0.0)]
    assert answers("labels", np.array([0.5], np.float32)) == []
    assert answers("probabilities", np.array([[1, 2]])) == []
    assert answers("probabilities", [{"a": 0.5}]) == []


def test_large_batch_is_looked_at_evenly_and_in_part():
    value = np.eye(100, dtype=np.float32)
    found = [kind for kind, _ in answers("probabilities", value)]
    assert len(found) <= ROWS
    assert found == list(range(0, 100, 7))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("y", Scores("y")), ("y:logits", Scores("y", "logits")), ("layer:0", Scores("layer:0")),
     ("layer:0:labels", Scores("layer:0", "labels"))],
)  # fmt: skip
def test_scores_are_written_as_name_and_kind(text, expected):
    assert Scores.from_text(text) == expected
    assert Scores.parse(expected.to_json()) == expected


@pytest.mark.parametrize(
    "value", [{"output": "y", "kind": "magic"}, {"output": "", "kind": "labels"}, {"kind": "labels"}, 5]
)
def test_scores_that_say_nothing_are_refused(value):
    with pytest.raises(ProtocolError):
        Scores.parse(value)
