"""Which output of a model holds its scores, so that devices can look at confidence and class mix."""

from dataclasses import asdict
from typing import Any

from device_sdk.protocol import fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen

PROBABILITIES, LOGITS, LABELS = "probabilities", "logits", "labels"
KINDS = (PROBABILITIES, LOGITS, LABELS)


@frozen
class Scores:
    """`output`: a tensor's name. `kind`: `probabilities` or `logits` of the classes along its last axis (one alone:
    of the class 1 against 0), or `labels`: the classes themselves, as whole numbers.
    """

    output: str
    kind: str = PROBABILITIES

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, value: object) -> "Scores":
        item = fields.as_object(value, "scores")
        kind = fields.take_text(item, "kind", limit=32)
        if kind not in KINDS:
            raise ProtocolError("malformed", f"scores: expected a kind of {', '.join(KINDS)}; got {kind!r:.40}")
        output = fields.take_text(item, "output", limit=256)
        if not output:
            raise ProtocolError("malformed", "scores: expected the name of an output; got none")
        return cls(output, kind)

    @classmethod
    def from_text(cls, text: str) -> "Scores":
        """`NAME` or `NAME:KIND`, as people write it. A name may hold colons: only a known kind is taken off."""
        name, separator, kind = text.rpartition(":")
        known = bool(separator) and kind in KINDS
        return cls.parse({"output": name if known else text, "kind": kind if known else PROBABILITIES})
