"""Dotted versions, compared by number."""

import re

_DOTTED = re.compile(r"\d{1,18}(\.\d{1,18}){0,7}")


def older(version: str, floor: str) -> bool:
    """Whether a dotted `version` is below `floor`. An empty floor is none; a part that is no number counts as 0."""
    return bool(floor) and _numbers(version) < _numbers(floor)


def is_at_least(version: str, floor: str) -> bool:
    """Whether `version` surely is `floor` or one after it: what is not dotted numbers is only ever the same."""
    return version == floor or bool(
        _DOTTED.fullmatch(version) and _DOTTED.fullmatch(floor) and not older(version, floor)
    )


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) if part.isascii() and part.isdigit() else 0 for part in version.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
