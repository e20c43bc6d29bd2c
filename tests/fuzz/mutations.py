"""Strategies: valid messages, changed where it hurts. JSON by its structure, everything by its bytes."""

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Place = tuple[Any, Any]  # a container and the key or index within it


class Nested:
    """Written as that many lists within each other; json itself could not write it."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


NAMES = (
    "../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "x" * 300,
    "é",
    "A",
    "assign",
    "root",
    "-",
    "a..b",
)
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "1e999", "1e-999", "NaN", "0x10", "1_000", "٣", "\ud800", "\x00", " 1", "1\n"),
    *NAMES,
)
# The depth at which one walk of the value still fits on Python's stack, and another does not, lies in here somewhere.
DEPTHS = st.sampled_from([2, 40, 200]) | st.integers(700, 1_000) | st.just(100_000)
values = (
    st.sampled_from(SCALARS)
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.builds(Nested, DEPTHS)
    | st.sampled_from([[], {}, [[]], [{}], {"": {}}, [None] * 3])
)


def places(value: Any) -> Iterator[Place]:
    """Every place in a value where something else could stand."""
    keys: Sequence[Any] = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def replacements(seed: bytes) -> Iterator[bytes]:
    """Every place of the seed with every hostile value in turn, or with the place under a hostile name."""
    hostile = (*SCALARS, *(f"digits/{name}/default" for name in NAMES), "wine/1.0.0/default", "assign/cam-1/digits")
    for index in range(len(list(places(json.loads(seed))))):
        for item in hostile:
            value = json.loads(seed)
            container, key = list(places(value))[index]
            container[key] = item
            yield dumps(value)
        for name in NAMES:
            value = json.loads(seed)
            container, key = list(places(value))[index]
            if isinstance(container, dict):
                container[name] = container.pop(key)
                yield dumps(value)


def dumps(value: Any) -> bytes:
    marks: list[Nested] = []

    def mark(item: Nested) -> str:
        marks.append(item)
        return f"@nested{len(marks) - 1}@"

    text = json.dumps(value, default=mark)
    for index, item in enumerate(marks):
        text = text.replace(f'"@nested{index}@"', "[" * item.depth + "]" * item.depth, 1)
    return text.encode()


@st.composite
def json_mutants(draw: st.DrawFn, seed: bytes) -> bytes:
    """The seed with up to three of its places changed, gone, doubled or renamed; sometimes with its bytes hurt too."""
    value = json.loads(seed)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        _change(draw, container, key)
    data = dumps(value)
    return draw(bytes_mutants(data)) if draw(st.integers(0, 9)) == 0 else data


def _change(draw: st.DrawFn, container: Any, key: Any) -> None:
    change = draw(st.sampled_from(["replace", "replace", "delete", "wrap", "grow", "name", "name"]))
    if change == "delete":
        del container[key]
    elif change == "wrap":
        container[key] = [container[key]]
    elif change == "grow" and isinstance(container, list):
        container.extend(copy.deepcopy(container[key]) for _ in range(draw(st.sampled_from([1, 40, 300]))))
    elif change == "name" and isinstance(container, dict):
        container[draw(st.sampled_from(NAMES) | st.text(max_size=8))] = copy.deepcopy(container[key])
    else:
        container[key] = copy.deepcopy(draw(values))  # the strategy gives out one and the same list


@st.composite
def bytes_mutants(draw: st.DrawFn, seed: bytes) -> bytes:
    """The seed with some bytes flipped, cut out, doubled or put in."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.integers(1, 16))
        change = draw(st.sampled_from(["flip", "cut", "double", "insert", "end"]))
        if change == "flip" and data:
            data[at] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[at : at + size]
        elif change == "double":
            data[at:at] = data[at : at + size]
        elif change == "insert":
            data[at:at] = draw(
                st.sampled_from([b"\0", b"\xff" * 8, b"PK\x05\x06", b"\x80\x80\x80\x01"]) | st.binary(max_size=8)
            )
        elif change == "end":
            del data[at:]
    return bytes(data)


def mutants(seeds: Sequence[bytes], *, is_json: bool) -> st.SearchStrategy[bytes]:
    """One of the seeds, mutated; now and then, bytes that have nothing to do with it."""
    by_structure = st.sampled_from(seeds).flatmap(json_mutants if is_json else bytes_mutants)
    return st.one_of(
        by_structure, by_structure, by_structure, st.sampled_from(seeds).flatmap(bytes_mutants), st.binary(max_size=200)
    )
