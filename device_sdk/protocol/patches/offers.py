"""Which patches a server offers for a file: a hint that decides what is tried first, and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from device_sdk.protocol import fields, limits
from device_sdk.protocol.names import check_sha256


@dataclass(frozen=True, slots=True)
class PatchOffer:
    """A patch of `length` bytes, fetched as the blob `sha256`, for devices that have the blob `base`."""

    base: str
    sha256: str
    length: int

    @classmethod
    def parse(cls, value: object) -> "PatchOffer":
        item = fields.as_object(value, "patch")
        return cls(
            base=check_sha256(item.get("base"), "base"),
            sha256=check_sha256(item.get("sha256"), "patch"),
            length=fields.take_int(item, "length", low=1, high=limits.ARTIFACT),
        )


def offers_to_json(offers: Iterable[PatchOffer]) -> dict[str, Any]:
    return {"patches": [{"base": each.base, "sha256": each.sha256, "length": each.length} for each in offers]}


def parse_offers(data: bytes) -> tuple[PatchOffer, ...]:
    source = fields.parse_object(data, limit=limits.PATCH_OFFERS, what="patches")
    return tuple(PatchOffer.parse(item) for item in fields.take_list(source, "patches", limit=limits.PATCHES))


def patches_path(blob_path: str) -> str:
    """Where the offers for a blob are asked for."""
    return f"{blob_path}/patches"
