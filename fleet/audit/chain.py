"""The chain as values: what is hashed, and what is wrong with a row of links. No database: exports use it too."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from fleet.audit.models import ZERO
from fleet.errors import Invalid


@dataclass(frozen=True, slots=True)
class Head:
    """The newest link: written down elsewhere, it pins everything before it."""

    position: int
    hash: str

    def __str__(self) -> str:
        return f"{self.position}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        position, _, digest = text.strip().partition(":")
        if not (position.isascii() and position.isdecimal() and len(digest) == 64):
            raise Invalid("malformed", f"head: expected POSITION:HASH as `audit head` prints it; got {text!r:.90}")
        return cls(int(position), digest.lower())


START = Head(0, ZERO)


@dataclass(frozen=True, slots=True)
class Link:
    position: int
    hash: str
    entry: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Broken:
    """The first position at which the chain does not hold, and why."""

    position: int
    why: str


def canonical(value: Any) -> str:
    """One text for one value: sorted names, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def next_hash(before: str, entry: Mapping[str, Any]) -> str:
    return sha256(f"{before}\n{canonical(entry)}".encode()).hexdigest()


def check(links: Iterable[Link], *, start: Head = START, known: Head | None = None) -> Iterator[Head | Broken]:
    """Walk the links, yielding each head that holds; the last value is `Broken` if one does not.

    `known`: a head written down earlier, which must be on the way.
    """
    head = start
    seen: set[int] = set()
    for link in links:
        fault = _fault(head, link, seen) or _unlike_known(link, known)
        if fault:
            yield Broken(min(link.position, head.position + 1), fault)
            return
        seen.add(int(link.entry["id"]))
        head = Head(link.position, link.hash)
        yield head
    if known is not None and known.position > head.position:
        yield Broken(
            head.position + 1,
            f"truncated: the chain ends at position {head.position}, but position {known.position} was known",
        )


def _fault(head: Head, link: Link, seen: set[int]) -> str:
    expected = head.position + 1
    if link.position > expected:
        return f"missing: position {expected} is followed by {link.position}"
    if link.position < expected:
        return f"reordered: position {link.position} comes after {head.position}"
    if int(link.entry["id"]) in seen:
        return f"repeated: entry {link.entry['id']} stands at an earlier position too"
    computed = next_hash(head.hash, link.entry)
    if link.hash != computed:
        return f"changed: entry {link.entry['id']} or its place; expected hash {computed}, found {link.hash}"
    return ""


def _unlike_known(link: Link, known: Head | None) -> str:
    if known is None or link.position != known.position or link.hash == known.hash:
        return ""
    return f"rewritten: the hash known for this position is {known.hash}, found {link.hash}"
