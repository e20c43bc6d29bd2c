"""`fleet-publish --needs [VARIANT:]KEY=VALUE`: what a device must have to run a variant, as people write it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from device_sdk.errors import SetupError
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Requirements

KEYS = tuple(field.name for field in fields(Requirements))
HELP = (
    "a floor, for all variants or for one, repeated: sdk, runtime (least versions), opset, memory (bytes), arch, "
    "providers (any of a,b), release (a version to step through first), such as cuda:providers=CUDAExecutionProvider"
)


def of_variants(specs: Sequence[str], variants: Collection[str], common: Requirements) -> Mapping[str, Requirements]:
    """The floors of each variant. What is said of one variant wins over what is said of all. Raises SetupError."""
    found = dict.fromkeys(variants, common)
    for spec in sorted(specs, key=lambda spec: ":" in spec.partition("=")[0]):  # those of all first
        named, equals, text = spec.partition("=")
        variant, _, key = named.rpartition(":")
        if not equals or key not in KEYS or (variant and variant not in found):
            raise SetupError(f"--needs: expected [VARIANT:]KEY=VALUE with KEY one of {', '.join(KEYS)}; got {spec!r}")
        for name in [variant] if variant else found:
            found[name] = _with(found[name], key, text, spec)
    return found


def _with(requires: Requirements, key: str, text: str, spec: str) -> Requirements:
    read: Mapping[str, Callable[[str], Any]] = {"opset": _number, "memory": _number, "arch": _list, "providers": _list}
    try:
        return Requirements.parse({**requires.to_json(), key: read.get(key, str)(text)})
    except ProtocolError as error:
        raise SetupError(f"--needs {spec}: {error.message}") from error


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text  # what is none is refused by its parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
