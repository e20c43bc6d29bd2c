"""`frozen` beside the standard library's own: whatever one does with a value comes out the same."""

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, asdict, astuple, dataclass, field, fields, replace

import pytest

from device_sdk.protocol.frozen import frozen


@frozen
class Ours:
    name: str
    size: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Theirs:
    name: str
    size: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    secret: str = field(default="", repr=False)


@frozen
class Point:
    x: int
    y: int = 0


@frozen
class Loose:
    """Equal by its own rule."""

    name: str

    def __eq__(self, other):
        return self.name.lower() == other.name.lower()

    __hash__ = None


USES = [
    repr,
    asdict,
    astuple,
    lambda made: [each.name for each in fields(made)],
    lambda made: str(inspect.signature(type(made))),
    lambda made: repr(replace(made, size=7)),
    lambda made: repr(copy.deepcopy(made)),
    lambda made: made == type(made)("a", 1, {"k": "v"}, "s"),
    lambda made: made == type(made)("a", 2, {"k": "v"}, "s"),
    lambda made: (made == ("a", 1, {"k": "v"}, "s"), made != 3),
    lambda made: type(made).__match_args__,
    lambda made: type(made)("a").labels is type(made)("a").labels,
    lambda made: hasattr(made, "__dict__"),
]


@pytest.mark.parametrize("use", USES)
def test_a_value_of_ours_behaves_as_one_of_the_standard_library(use):
    ours, theirs = (use(kind("a", 1, {"k": "v"}, "s")) for kind in (Ours, Theirs))
    assert ours == (theirs.replace("Theirs", "Ours") if isinstance(theirs, str) else theirs)


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_neither_can_be_changed(kind):
    made = kind("a")
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'name'"):
        made.name = "b"
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'name'"):
        del made.name
    with pytest.raises((AttributeError, TypeError)):
        made.other = 1
    assert made == kind("a")


@pytest.mark.parametrize("given", [{}, {"name": "a", "colour": 1}])
def test_both_refuse_what_is_missing_or_unknown_with_the_same_words(given):
    def said(kind):
        with pytest.raises(TypeError) as raised:
            kind(**given)
        return str(raised.value).replace(kind.__name__, "")

    assert said(Ours) == said(Theirs)


def test_equal_values_are_one_key_and_survive_pickling():
    assert len({Point(1), Point(1, 0), Point(1, 2)}) == 2
    assert pickle.loads(pickle.dumps(Point(1, 2))) == Point(1, 2)
    assert Point(1) != Ours(1)


def test_what_a_class_defines_itself_stays():
    assert Loose("A") == Loose("a")
    with pytest.raises(TypeError):
        hash(Loose("a"))
