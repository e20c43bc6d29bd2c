r"""Label selectors: `site in (berlin, hamburg), hw=jetson, !lab`. Pure: text in, a value out, or `selector_malformed`.

    selector     nothing, which is every device, or requirements with commas between them: all of them must hold
    requirement  label | !label | label=value | label!=value | label in (value, ...) | label notin (value, ...)
    label        a label's name, or @name, which is the device's own
    value        a word of letters, digits and . _ - + : / @, or anything in double quotes, where \ escapes

As in Kubernetes, `!=` and `notin` hold for a device that lacks the label too. Everything is bounded; a text that does
not parse is refused with the position, what was expected and what came: it is never taken for "every device".
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_name
from fleet.errors import Invalid

TEXT_CHARS = 16_000
REQUIREMENTS = 32
VALUES = 1_000  # of one requirement: devices may be listed by name
NAME = "@name"

_TOKEN = re.compile(r'(?P<word>[\w.:/@+-]+)|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<sign>==|!=|[=!(),])')
_SPACE = re.compile(r"\s*")
_BARE = re.compile(r"[\w.:/@+-]+")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Requirement:
    """Of one label. Without values: that it is there. `negated` turns it round."""

    label: str
    values: frozenset[str] = frozenset()
    negated: bool = False

    def holds(self, value: str | None) -> bool:
        """`value` is the label's, None where the device has no such label."""
        found = value in self.values if self.values else value is not None
        return found != self.negated

    def __str__(self) -> str:
        listed = [_shown(value) for value in sorted(self.values)]
        if not listed:
            return f"!{self.label}" if self.negated else self.label
        if len(listed) == 1:
            return f"{self.label}{'!=' if self.negated else '='}{listed[0]}"
        return f"{self.label} {'notin' if self.negated else 'in'} ({', '.join(listed)})"


@dataclass(frozen=True, slots=True)
class Selector:
    """All requirements must hold; none: every device. Its text parses back to it."""

    requirements: tuple[Requirement, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.requirements)

    def __str__(self) -> str:
        return ", ".join(map(str, self.requirements))

    def matches(self, labels: Mapping[str, str], name: str) -> bool:
        return all(each.holds(name if each.label == NAME else labels.get(each.label)) for each in self.requirements)

    def by_labels(self, labels: Mapping[str, str]) -> bool | None:
        """What the labels alone say; None: it hangs on the device's name."""
        if not all(each.holds(labels.get(each.label)) for each in self.requirements if each.label != NAME):
            return False
        return None if any(each.label == NAME for each in self.requirements) else True

    def both(self, other: "Selector") -> "Selector":
        """Devices that fit both."""
        return Selector((*self.requirements, *(each for each in other.requirements if each not in self.requirements)))


EVERY = Selector()


def parse(text: str) -> Selector:
    """Raises Invalid `selector_malformed`; its detail has `at`, the position in the text, from 0."""
    if len(text) > TEXT_CHARS:
        raise Invalid("selector_malformed", f"selector: expected at most {TEXT_CHARS} characters; got {len(text)}")
    return _Reader(text).selector()


@dataclass(frozen=True, slots=True)
class _Token:
    at: int
    kind: str  # word, quoted, sign, or end
    text: str


class _Reader:
    """One pass, one token ahead, no recursion."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._end = 0
        self._next = self._scan()

    def selector(self) -> Selector:
        found: list[Requirement] = []
        while self._next.kind != "end":
            if len(found) == REQUIREMENTS:
                self._refuse(f"at most {REQUIREMENTS} requirements")
            found.append(self._requirement())
            if self._next.kind != "end":
                self._sign(",", "a comma or the end" if found[-1].values else "=, !=, in, notin, a comma or the end")
                if self._next.kind == "end":
                    self._refuse("a label after the comma")
        return Selector(tuple(dict.fromkeys(found)))

    def _requirement(self) -> Requirement:
        if self._is("!"):
            self._take()
            return Requirement(self._label(), negated=True)
        label = self._label()
        token = self._next
        if token.text in {"=", "==", "!="} and token.kind == "sign":
            self._take()
            return Requirement(label, frozenset({self._value(label)}), negated=token.text == "!=")
        if token.text in {"in", "notin"} and token.kind == "word":
            self._take()
            return Requirement(label, self._list(label), negated=token.text == "notin")
        return Requirement(label)

    def _label(self) -> str:
        token = self._next
        if token.kind != "word":
            self._refuse("a label")
        if token.text != NAME:
            self._checked(token, lambda: check_name(token.text, "label"))
        return self._take().text

    def _list(self, label: str) -> frozenset[str]:
        self._sign("(", "( and values")
        values = {self._value(label)}
        while self._is(","):
            self._take()
            if len(values) == VALUES:
                self._refuse(f"at most {VALUES} values")
            values.add(self._value(label))
        self._sign(")", "a comma or )")
        return frozenset(values)

    def _value(self, label: str) -> str:
        token = self._next
        if token.kind not in {"word", "quoted"}:
            self._refuse("a value")
        quoted = token.kind == "quoted"
        value = _ESCAPED.sub(r"\1", token.text[1:-1]) if quoted else token.text
        if label == NAME:
            self._checked(token, lambda: check_name(value, "device"))
        elif len(value) > limits.LABEL_CHARS or fields.plain(value) != value:
            self._refuse(f"a value of at most {limits.LABEL_CHARS} characters, without NUL")
        self._take()
        return value

    def _is(self, sign: str) -> bool:
        return self._next.kind == "sign" and self._next.text == sign

    def _sign(self, sign: str, expected: str) -> None:
        if not self._is(sign):
            self._refuse(expected)
        self._take()

    def _take(self) -> _Token:
        taken, self._next = self._next, self._scan()
        return taken

    def _scan(self) -> _Token:
        at = _skip(self._text, self._end)
        match = _TOKEN.match(self._text, at)
        if match is None:
            self._end = len(self._text)
            return _Token(at, "end" if at == len(self._text) else "unknown", self._text[at : at + 20])
        self._end = match.end()
        return _Token(at, str(match.lastgroup), match[0])

    def _checked(self, token: _Token, check: Callable[[], object]) -> None:
        try:
            check()
        except ProtocolError as error:
            raise _malformed(token.at, error.message) from error

    def _refuse(self, expected: str) -> NoReturn:
        came = repr(self._next.text[:20]) if self._next.kind != "end" else "the end"
        raise _malformed(self._next.at, f"expected {expected}; got {came}")


def _skip(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _malformed(at: int, message: str) -> Invalid:
    return Invalid("selector_malformed", f"selector, at character {at + 1}: {message}", {"at": at})


def _shown(value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def chosen(labels: Mapping[str, Iterable[str]]) -> Selector:
    """Each of these labels has one of its values: what a selector was before it was a text."""
    return Selector(tuple(Requirement(label, frozenset(values)) for label, values in labels.items()))
