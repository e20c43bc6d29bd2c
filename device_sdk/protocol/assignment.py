"""The assignment: what the director's signed entry tells one device about one model."""

from dataclasses import asdict, dataclass, field
from typing import Any

from device_sdk.protocol import fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import ReleasePath, check_model, check_sha256

DAY_MINUTES = 24 * 60
MAX_SAMPLES = 10**7
MAX_JITTER_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Window:
    """Minutes of the device's local day, `start` included, `end` excluded; `start > end` passes over midnight."""

    start: int
    end: int

    def contains(self, minute: int) -> bool:
        if self.start == self.end:
            return True
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    @classmethod
    def parse(cls, value: object) -> "Window":
        item = fields.as_object(value, "window")
        return cls(
            start=fields.take_int(item, "start", high=DAY_MINUTES - 1),
            end=fields.take_int(item, "end", high=DAY_MINUTES - 1),
        )


ALWAYS = Window(0, 0)


@dataclass(frozen=True, slots=True)
class Probation:
    """How long a new release is watched, and what ends it. Rates are fractions of calls."""

    calls: int = 20
    seconds: float = 10.0
    max_error_rate: float = 0.0
    max_invalid_rate: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "seconds": fields.decimal(self.seconds),
            "max_error_rate": fields.decimal(self.max_error_rate),
            "max_invalid_rate": fields.decimal(self.max_invalid_rate),
        }

    @classmethod
    def parse(cls, value: object) -> "Probation":
        item = fields.as_object(value, "probation")
        return cls(
            calls=fields.take_int(item, "calls", high=10**9),
            seconds=fields.take_decimal(item, "seconds", low=0, high=30 * 86_400),
            max_error_rate=fields.take_decimal(item, "max_error_rate", low=0, high=1),
            max_invalid_rate=fields.take_decimal(item, "max_invalid_rate", low=0, high=1),
        )


@dataclass(frozen=True, slots=True)
class Sampling:
    """A campaign as the device obeys it: keep each input with probability `rate`, upload in `window`."""

    campaign: str
    rate: float
    max_samples: int
    expires: int
    window: Window = ALWAYS
    jitter_seconds: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rate": fields.decimal(self.rate)}

    @classmethod
    def parse(cls, value: object) -> "Sampling":
        item = fields.as_object(value, "sampling")
        return cls(
            campaign=fields.take_text(item, "campaign", limit=64),
            rate=fields.take_decimal(item, "rate", low=0, high=1),
            max_samples=fields.take_int(item, "max_samples", high=MAX_SAMPLES),
            expires=fields.take_int(item, "expires", high=2**40),
            window=Window.parse(item.get("window")),
            jitter_seconds=fields.take_int(item, "jitter_seconds", high=MAX_JITTER_SECONDS),
        )


@dataclass(frozen=True, slots=True)
class Assignment:
    """One model of one device. `release` None: nothing to install, keep what runs.

    `length` and `sha256` are those of the manifest; they stand in the TUF target itself, not in `custom`.
    """

    model: str
    release: ReleasePath | None = None
    length: int = 0
    sha256: str = ""
    rollout: str = ""
    urgent: bool = False
    window: Window = ALWAYS
    probation: Probation = field(default_factory=Probation)
    sampling: Sampling | None = None

    def to_custom(self) -> dict[str, Any]:
        """The TUF `custom` object. Signed, hence without fractions: they stand as text."""
        return {
            "release": str(self.release) if self.release else None,
            "rollout": self.rollout,
            "urgent": self.urgent,
            "window": asdict(self.window),
            "probation": self.probation.to_json(),
            "sampling": self.sampling.to_json() if self.sampling else None,
        }

    @classmethod
    def parse(cls, model: str, length: int, sha256: str, custom: object) -> "Assignment":
        """Read a director's entry. Raises `wrong_model` when it names a release of another model (attack 15)."""
        item = fields.as_object(custom, "custom")
        release = None if item.get("release") is None else ReleasePath.parse(item["release"])
        if release and release.model != model:
            raise ProtocolError("wrong_model", f"assignment of {model!r} names {str(release)!r}")
        sampling = item.get("sampling")
        return cls(
            model=check_model(model),
            release=release,
            length=length,
            sha256=check_sha256(sha256),
            rollout=fields.take_text(item, "rollout", limit=64, default=""),
            urgent=fields.take_bool(item, "urgent"),
            window=Window.parse(item.get("window")),
            probation=Probation.parse(item.get("probation")),
            sampling=None if sampling is None else Sampling.parse(sampling),
        )
