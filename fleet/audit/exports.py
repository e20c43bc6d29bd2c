"""The trail as lines of JSON. The first says what stands before; so a part of the chain can be verified anywhere."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain as joined
from typing import Any

from fleet.audit import selectors
from fleet.audit.chain import START, Head, Link, canonical
from fleet.errors import Invalid

FORMAT = "fleet-audit-1"


def lines(links: Iterable[Link]) -> Iterator[str]:
    """A head line `{format, after}`, then one line for each link: `{position, hash, entry}`."""
    links = iter(links)
    first = next(links, None)
    after = selectors.before(first.position) if first else START
    yield canonical({"format": FORMAT, "after": str(after)}) + "\n"
    for link in joined([first] if first else [], links):
        yield canonical({"position": link.position, "hash": link.hash, "entry": link.entry}) + "\n"


def read(text: Iterable[str]) -> tuple[Head, Iterator[Link]]:
    """Of an export: the head before it, and its links as they are read. Raises `malformed`."""
    numbered = enumerate(text, start=1)
    _, first = next(numbered, (1, ""))
    start = _object(1, first)
    if start.get("format") != FORMAT:
        raise Invalid("malformed", f"line 1: expected the format {FORMAT}; got {start.get('format')!r:.40}")
    return Head.parse(str(start.get("after"))), (_link(number, line) for number, line in numbered)


def _link(number: int, line: str) -> Link:
    value = _object(number, line)
    entry, position = value.get("entry"), value.get("position")
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or not isinstance(position, int):
        raise Invalid("malformed", f"line {number}: expected position, hash and entry")
    return Link(position, str(value.get("hash")), entry)


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise Invalid("malformed", f"line {number}: expected a JSON object") from error
    if not isinstance(value, dict):
        raise Invalid("malformed", f"line {number}: expected a JSON object")
    return value
