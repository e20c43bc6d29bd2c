"""The kinds of notices that there are: each room that tells something names its own when the server starts."""

from collections.abc import Iterable

TEST = "test"
KNOWN: set[str] = set()


def register(kinds: Iterable[str]) -> None:
    KNOWN.update(kinds)
