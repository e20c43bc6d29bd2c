"""Read what a bill of materials or a free provenance file says, for a page. Pure, bounded, and believing nothing.

Only the outline is required (a CycloneDX BOM says that it is one). What else is not of the expected type is left out:
the file itself can be downloaded.
"""

from collections.abc import Iterator
from typing import Any

from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from fleet.errors import Invalid

DEPTH = 64
SHOWN = 50  # rows of each kind
CHARS = 200


def read_bom(content: bytes) -> dict[str, Any]:
    """The outline of a CycloneDX BOM in JSON. Raises `bad_bom`."""
    try:
        bom = parse(content)
    except ProtocolError as error:
        raise Invalid("bad_bom", f"ml-bom: {error.message}") from error
    if bom.get("bomFormat") != "CycloneDX" or not isinstance(bom.get("specVersion"), str):
        raise Invalid("bad_bom", "ml-bom: expected CycloneDX as JSON, with bomFormat and specVersion")
    about = _object(_object(bom.get("metadata")).get("component"))
    components = [_object(item) for item in _items(bom.get("components"))]
    data = [item for component in [about, *components] for item in _datasets(component)]
    return {
        "spec": _text(bom.get("specVersion")),
        "name": _text(about.get("name")),
        "version": _text(about.get("version")),
        "licences": _licences(about),
        "components": [_component(item) for item in components[:SHOWN]],
        "components_total": len(components),
        "datasets": list(dict.fromkeys(name for name in data if name))[:SHOWN],
    }


def read_free(content: bytes) -> dict[str, Any]:
    """The plain values at the top of a JSON object; nothing of any other file."""
    try:
        source = parse(content)
    except ProtocolError:
        return {}
    shown = {_text(key): _plain(value) for key, value in list(source.items())[:SHOWN]}
    return {"values": {key: value for key, value in shown.items() if key and value}}


def parse(content: bytes) -> dict[str, Any]:
    """A JSON object within bounds of size and depth. Raises ProtocolError."""
    source = fields.parse_object(content, limit=limits.ATTACHMENT, what="file")
    level: list[Any] = [source]
    for _ in range(DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return source
    raise ProtocolError("malformed", f"file: expected at most {DEPTH} levels of JSON")


def _children(item: Any) -> Iterator[Any]:
    children = item.values() if isinstance(item, dict) else item
    return (child for child in children if isinstance(child, (dict, list)))


def _component(item: dict[str, Any]) -> dict[str, Any]:
    texts = {name: _text(item.get(name)) for name in ("type", "name", "version")}
    return {**texts, "licences": _licences(item)}


def _licences(item: dict[str, Any]) -> list[str]:
    found = []
    for choice in map(_object, _items(item.get("licenses"))[:SHOWN]):
        named = _object(choice.get("license"))
        found.append(_text(named.get("id")) or _text(named.get("name")) or _text(choice.get("expression")))
    return [text for text in found if text]


def _datasets(component: dict[str, Any]) -> Iterator[str]:
    """By name: components that are data, and those that a model card names or refers to."""
    if component.get("type") == "data":
        yield _text(component.get("name"))
    card = _object(_object(component.get("modelCard")).get("modelParameters"))
    for item in map(_object, _items(card.get("datasets"))[:SHOWN]):
        yield _text(item.get("name")) or _text(item.get("ref"))


def _plain(value: object) -> str:
    return _text(str(value) if isinstance(value, (int, float)) else value)


def _text(value: object) -> str:
    return " ".join(value.split())[:CHARS] if isinstance(value, str) else ""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
