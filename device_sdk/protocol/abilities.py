"""What a device can run, as it tells the server: by it releases and their variants are chosen."""

from dataclasses import dataclass
from typing import Any

from device_sdk.protocol import fields, limits


@dataclass(frozen=True, slots=True)
class Abilities:
    """Empty text, 0 and none: the device does not say. Older devices say nothing at all.

    `runtime`: onnxruntime's version; `opset`: the newest that it supports; `memory`: bytes that the process may use
    at most; `arch`: as `uname -m` says; `providers`: the execution providers that models are opened with, by rank.
    """

    runtime: str = ""
    opset: int = 0
    memory: int = 0
    arch: str = ""
    providers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Only what is said."""
        said = {"runtime": self.runtime, "opset": self.opset, "memory": self.memory, "arch": self.arch}
        return {name: value for name, value in (said | {"providers": list(self.providers)}).items() if value}

    @classmethod
    def parse(cls, value: object) -> "Abilities":
        item = fields.as_object(value, "abilities")
        return cls(
            runtime=fields.take_text(item, "runtime", limit=32, default=""),
            opset=fields.take_int(item, "opset", high=10_000, default=0),
            memory=fields.take_int(item, "memory", high=2**50, default=0),
            arch=fields.take_text(item, "arch", limit=32, default=""),
            providers=fields.take_texts(item, "providers", limit=limits.PROVIDERS, chars=64),
        )


UNSAID = Abilities()
