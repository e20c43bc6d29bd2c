"""Bills of materials and free provenance, honest and hostile."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import Invalid
from fleet.releases.bom import CHARS, SHOWN, read_bom, read_free

BOM: dict[str, Any] = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "metadata": {
        "component": {
            "type": "machine-learning-model",
            "name": "digits",
            "version": "1.0.0",
            "licenses": [{"license": {"id": "Apache-2.0"}}],
            "modelCard": {"modelParameters": {"datasets": [{"type": "dataset", "name": "MNIST"}, {"ref": "own-2026"}]}},
        }
    },
    "components": [
        {"type": "library", "name": "scikit-learn", "version": "1.7", "licenses": [{"expression": "BSD-3-Clause"}]},
        {"type": "data", "name": "street numbers"},
    ],
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def test_a_bom_is_told_in_short() -> None:
    said = read_bom(json.dumps(BOM).encode())
    assert (said["name"], said["version"], said["spec"], said["licences"]) == ("digits", "1.0.0", "1.6", ["Apache-2.0"])
    assert said["datasets"] == ["MNIST", "own-2026", "street numbers"]
    assert said["components"][0] == {
        "type": "library", "name": "scikit-learn", "version": "1.7", "licences": ["BSD-3-Clause"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<bom/>",
        b"[]",
        b"{}",
        b'{"bomFormat": "SPDX", "specVersion": "1.6"}',
        b'{"bomFormat": "CycloneDX", "specVersion": 1.6}',
        b"[" * 500_000,
        b'{"bomFormat":"CycloneDX","specVersion":"1","a":' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"bomFormat":"CycloneDX","specVersion":"1","a":' + b'{"a":' * 100 + b"1" + b"}" * 101,
        b'{"bomFormat":"CycloneDX","specVersion":"1","a":' + b"9" * 10_000 + b"}",
        b'{"bomFormat":"CycloneDX","specVersion":"1","a":"' + b"x" * 1_048_576 + b'"}',
        b'{"bomFormat":"CycloneDX","specVersion":"1","a":"\\u0000"}',
    ],
    ids=lambda content: f"{content[:40]!r}",
)
def test_what_is_no_bom_or_out_of_bounds_is_refused(content: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        read_bom(content)
    assert caught.value.code == "bad_bom"


def test_a_wide_bom_is_shown_in_part_and_counted() -> None:
    parts = [{"name": "n" * 5_000}] * 100
    said = read_bom(json.dumps({**BOM, "components": parts}).encode())
    assert (len(said["components"]), said["components_total"]) == (SHOWN, 100)
    assert len(said["components"][0]["name"]) == CHARS


@given(st.fixed_dictionaries({}, optional={"metadata": ANYTHING, "components": ANYTHING, "licenses": ANYTHING}))
def test_wrong_types_within_are_left_out(wrong: dict[str, Any]) -> None:
    try:
        said = read_bom(json.dumps({**BOM, **wrong}).encode())
    except Invalid:
        return  # text that no database can keep
    assert all(isinstance(part["name"], str) for part in said["components"])


@given(st.sampled_from(["type", "name", "version", "licenses", "modelCard"]), ANYTHING)
def test_wrong_types_of_a_component_are_left_out(name: str, wrong: Any) -> None:
    try:
        said = read_bom(json.dumps({**BOM, "components": [{**BOM["components"][0], name: wrong}]}).encode())
    except Invalid:
        return  # text that no database can keep
    assert {type(value) for value in said["components"][0].values()} <= {str, list}
    assert all(isinstance(text, str) for text in [*said["components"][0]["licences"], *said["datasets"]])


def test_free_provenance_shows_its_plain_values() -> None:
    said = read_free(b'{"commit": "1f3c", "accuracy": 0.97, "nested": {"a": 1}, "empty": ""}')
    assert said == {"values": {"commit": "1f3c", "accuracy": "0.97"}}


@pytest.mark.parametrize("content", [b"\x00\xff", b"just text", b"[1]", b"[" * 500_000, b""])
def test_free_provenance_of_another_form_is_kept_and_not_shown(content: bytes) -> None:
    assert read_free(content) == {}
