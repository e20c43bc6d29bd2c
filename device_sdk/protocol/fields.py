"""Take checked values out of parsed JSON. Each taker names the field, what was expected and what came."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from device_sdk.protocol.errors import ProtocolError

Json = Mapping[str, Any]

_DECIMAL = re.compile(r"\d{1,20}(\.\d{1,20})?(e[+-]?\d{1,3})?")


def parse_object(data: bytes | str, *, limit: int, what: str) -> dict[str, Any]:
    """Parse a JSON object of at most `limit` bytes. NaN and infinities are not JSON and are refused."""
    if len(data) > limit:
        raise ProtocolError("too_large", f"{what}: expected at most {limit} bytes; got {len(data)}")
    try:
        value = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
        _check_texts(value)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("malformed", f"{what}: expected a JSON object; {error}") from error
    return as_object(value, what)


def canonical(value: object) -> bytes:
    """One byte string for one value: sorted keys, no spaces, ASCII. What hashes are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def plain(text: str) -> str:
    """`text` as every database and file can keep it: NUL and halves of surrogate pairs become question marks."""
    if text.isascii():
        return text.replace("\0", "?")
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def as_object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError("malformed", f"{what}: expected an object; got {type(value).__name__}")
    return value


def take_object(source: Json, name: str) -> dict[str, Any]:
    return as_object(source.get(name), name)


def take_list(source: Json, name: str, *, limit: int) -> list[Any]:
    value = source.get(name)
    if not isinstance(value, list) or len(value) > limit:
        raise ProtocolError("malformed", f"{name}: expected a list of at most {limit}; got {_shown(value)}")
    return value


def take_text(source: Json, name: str, *, limit: int, default: str | None = None) -> str:
    value = source.get(name, default)
    if not isinstance(value, str) or len(value) > limit:
        raise ProtocolError("malformed", f"{name}: expected text of at most {limit} characters; got {_shown(value)}")
    return value


def take_texts(source: Json, name: str, *, limit: int, chars: int) -> tuple[str, ...]:
    """At most `limit` texts of at most `chars` characters, none of them empty; none where it is left out."""
    if name not in source:
        return ()
    texts = take_list(source, name, limit=limit)
    if not all(isinstance(text, str) and 0 < len(text) <= chars for text in texts):
        raise ProtocolError("malformed", f"{name}: expected texts of 1 to {chars} characters; got {_shown(texts)}")
    return tuple(texts)


def take_int(source: Json, name: str, *, low: int = 0, high: int, default: int | None = None) -> int:
    value = source.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError("malformed", f"{name}: expected a whole number from {low} to {high}; got {_shown(value)}")
    return value


def take_number(source: Json, name: str, *, low: float, high: float, default: float | None = None) -> float:
    value = source.get(name, default)
    # Compared before it is converted: a whole number may be larger than any float. NaN is in no range.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError("malformed", f"{name}: expected a number from {low} to {high}; got {_shown(value)}")
    return float(value)


def decimal(value: float) -> str:
    """A fraction as text: what TUF signs is canonical JSON, which has no fractions."""
    return repr(float(value))


def take_decimal(source: Json, name: str, *, low: float, high: float) -> float:
    """Read what `decimal` wrote; a plain number will do."""
    value = source.get(name)
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = float(value)
    return take_number({name: value}, name, low=low, high=high)


def take_bool(source: Json, name: str, *, default: bool = False) -> bool:
    value = source.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError("malformed", f"{name}: expected true or false; got {_shown(value)}")
    return value


def _finite(text: str) -> float:
    """`1e999` is good JSON, and infinity to Python."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.20} is too large")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_texts(value: object) -> None:
    """Refuse what JSON can say but databases and files cannot keep: NUL, and halves of surrogate pairs."""
    if isinstance(value, str):
        if plain(value) != value:
            raise ValueError("text with NUL or half a character")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key)
            _check_texts(item)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"
