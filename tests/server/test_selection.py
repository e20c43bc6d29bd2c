"""Label selectors are a small language: everything that parses has one meaning and one text, the rest is refused."""

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleet.devices import selection
from fleet.devices.selection import Requirement, Selector
from fleet.errors import Invalid

CAM = {"site": "berlin", "hw": "jetson", "note": "two words, quoted"}

labels = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True).filter(lambda name: ".." not in name)
values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
names = st.frozensets(labels, min_size=1, max_size=3)
requirements = st.builds(Requirement, labels, st.frozensets(values, max_size=3), st.booleans()) | st.builds(
    Requirement, st.just(selection.NAME), names, st.booleans()
)
selectors = st.builds(lambda found: Selector(tuple(dict.fromkeys(found))), st.lists(requirements, max_size=5))


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        ("site in (berlin, hamburg), hw=jetson, !lab", True),
        ("site=berlin", True),
        ("site==berlin", True),
        ("site = paris", False),
        ("site!=paris", True),
        ("site notin (berlin)", False),
        ("hw", True),
        ("!hw", False),
        ("lab", False),
        ("lab!=yes", True),
        ("lab notin (yes,no)", True),
        ('note="two words, quoted"', True),
        ("@name=cam-1", True),
        ("@name in (cam-2,cam-1)", True),
        ("@name!=cam-1", False),
        ("@name", True),
        ("in in (in)", False),
        ('site="berlin"', True),
        ('site=""', False),
    ],
)
def test_what_a_selector_chooses(text: str, fits: bool) -> None:
    assert selection.parse(text).matches(CAM, "cam-1") == fits


@given(selector=selectors)
@example(Selector((Requirement("in", frozenset({"in", 'a"b\\', ""})), Requirement("notin", negated=True))))
def test_the_text_of_a_selector_parses_back_to_it(selector: Selector) -> None:
    assert selection.parse(str(selector)) == selector


@given(selector=selectors, have=st.dictionaries(labels, values, max_size=4), name=labels)
def test_labels_decide_alone_unless_a_name_is_asked_for(selector: Selector, have: dict[str, str], name: str) -> None:
    known = selector.by_labels(have)
    assert known is None or known == selector.matches(have, name)
    assert (known is None) <= any(each.label == selection.NAME for each in selector.requirements)


@given(one=selectors, other=selectors, have=st.dictionaries(labels, values, max_size=4))
def test_both_is_the_devices_of_one_and_the_other(one: Selector, other: Selector, have: dict[str, str]) -> None:
    together = one.both(other).matches(have, "cam-1")
    assert together == (one.matches(have, "cam-1") and other.matches(have, "cam-1"))


@given(st.text(alphabet='ab=!(), "\\in@.\n\0é', max_size=30))
def test_any_text_parses_or_is_refused_and_never_means_every_device_by_accident(text: str) -> None:
    with suppress(Invalid):
        found = selection.parse(text)
        assert bool(found) == bool(text.strip())
        assert selection.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        ("site in berlin", 9, "expected ( and values; got 'berlin'"),
        ("site in (berlin", 16, "expected a comma or ); got the end"),
        ("site in ()", 10, "expected a value; got ')'"),
        ("site=", 6, "expected a value; got the end"),
        ("site berlin", 6, "expected =, !=, in, notin, a comma or the end; got 'berlin'"),
        ("site=berlin hw", 13, "expected a comma or the end; got 'hw'"),
        (",", 1, "expected a label; got ','"),
        ("site,", 6, "expected a label after the comma; got the end"),
        ("!", 2, "expected a label; got the end"),
        ("Site=a", 1, "label: expected 1 to 64 of a-z"),
        ("@site=a", 1, "label: expected 1 to 64 of a-z"),
        ('site="a', 6, "expected a value; got '\"a'"),
        ("site={a}", 6, "expected a value; got '{a}'"),
        ("@name=Cam", 7, "device: expected 1 to 64 of a-z"),
        ("site=" + "a" * 65, 6, "at most 64 characters"),
    ],
)
def test_a_refusal_says_where_what_was_expected_and_what_came(text: str, at: int, said: str) -> None:
    with pytest.raises(Invalid) as refused:
        selection.parse(text)
    assert f"at character {at}: " in refused.value.message
    assert said in refused.value.message


@pytest.mark.parametrize(
    "text",
    [
        "a" * (selection.TEXT_CHARS + 1),
        ",".join(f"l{number}" for number in range(selection.REQUIREMENTS + 1)),
        f"site in ({','.join(map(str, range(selection.VALUES + 1)))})",
    ],
)
def test_a_selector_is_bounded(text: str) -> None:
    with pytest.raises(Invalid, match="at most"):
        selection.parse(text)
