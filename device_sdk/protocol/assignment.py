"""The assignment: what the director's signed entry tells one device about one model."""

from dataclasses import asdict, field
from typing import Any

from device_sdk.protocol import fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.frozen import frozen
from device_sdk.protocol.names import ReleasePath, check_model, check_sha256

DAY_MINUTES = 24 * 60
MAX_SAMPLES = 10**7
MAX_JITTER_SECONDS = 86_400
MAX_BYTES = 2**50
LONGEST_HOLD = 365 * 86_400  # seconds
MAX_HOLD = 86_400  # seconds for which a program may put off an activation, where the assignment says nothing


@frozen
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


@frozen
class Conditions:
    """What an update waits for beside its window, and what it may use; zero and False ask for nothing.

    `free_disk`: bytes that must be free when the release is here; `free_memory`: bytes free when it begins. `rate`:
    bytes a second, `daily`: bytes in one of the device's days, of downloads. A device heeds the conditions it knows.
    """

    unmetered: bool = False  # the network is not paid for by the byte
    charging: bool = False  # or on mains
    idle: bool = False  # the host has little else to do
    free_disk: int = 0
    free_memory: int = 0
    rate: int = 0
    daily: int = 0

    def to_json(self) -> dict[str, Any]:
        """Only what is asked for."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def parse(cls, value: object) -> "Conditions":
        item = fields.as_object(value, "conditions")
        flags: dict[str, Any] = {name: fields.take_bool(item, name) for name in CONDITION_FLAGS}
        sizes: dict[str, Any] = {
            name: fields.take_int(item, name, high=MAX_BYTES, default=0) for name in CONDITION_SIZES
        }
        return cls(**flags, **sizes)


NO_CONDITIONS = Conditions()
CONDITION_FLAGS = ("unmetered", "charging", "idle")
CONDITION_SIZES = ("free_disk", "free_memory", "rate", "daily")


@frozen
class Probation:
    """How long a new release is watched, and what ends it. Rates are fractions of calls.

    The last three compare it with the release before it on the same device; None: that is not looked at.
    `max_slowdown`: median latency, as a multiple of what it was. `max_confidence_drop`: of the mean top score, 0 to 1.
    `max_class_shift`: total variation distance of the class mix, 0 to 1.
    """

    calls: int = 20
    seconds: float = 10.0
    max_error_rate: float = 0.0
    max_invalid_rate: float = 0.0
    max_slowdown: float | None = None
    max_confidence_drop: float | None = None
    max_class_shift: float | None = None

    def to_json(self) -> dict[str, Any]:
        asked = {name: getattr(self, name) for name in COMPARED}
        return {
            "calls": self.calls,
            "seconds": fields.decimal(self.seconds),
            "max_error_rate": fields.decimal(self.max_error_rate),
            "max_invalid_rate": fields.decimal(self.max_invalid_rate),
            **{name: fields.decimal(value) for name, value in asked.items() if value is not None},
        }

    @classmethod
    def parse(cls, value: object) -> "Probation":
        item = fields.as_object(value, "probation")
        return cls(
            calls=fields.take_int(item, "calls", high=10**9),
            seconds=fields.take_decimal(item, "seconds", low=0, high=30 * 86_400),
            max_error_rate=fields.take_decimal(item, "max_error_rate", low=0, high=1),
            max_invalid_rate=fields.take_decimal(item, "max_invalid_rate", low=0, high=1),
            **{
                name: fields.take_decimal(item, name, low=low, high=high)
                for name, (low, high) in COMPARED.items()
                if item.get(name) is not None
            },
        )


COMPARED = {"max_slowdown": (1.0, 1_000.0), "max_confidence_drop": (0.0, 1.0), "max_class_shift": (0.0, 1.0)}


@frozen
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


@frozen
class Assignment:
    """One model of one device. `release` None: nothing to install, keep what runs; with `stop`, run nothing.

    `stop` is the model's policy for when nothing may run. Beside a release it is heeded where that one cannot run here
    and CI no longer lists what does. `forgive`: a device that quarantined the release under another rollout tries it
    once more. `mirror`: a cache to ask for the release's files first, which is believed in nothing. `length` and
    `sha256` are those of the manifest; they stand in the TUF target itself, not in `custom`.
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
    stop: bool = False
    conditions: Conditions = NO_CONDITIONS
    max_hold: int = MAX_HOLD
    forgive: bool = False
    mirror: str = ""

    def to_custom(self) -> dict[str, Any]:
        """The TUF `custom` object. Signed, hence without fractions: they stand as text."""
        custom = {
            "release": str(self.release) if self.release else None,
            "rollout": self.rollout,
            "urgent": self.urgent,
            "window": asdict(self.window),
            "probation": self.probation.to_json(),
            "sampling": self.sampling.to_json() if self.sampling else None,
        }
        optional: dict[str, Any] = {"stop": True} if self.stop else {}
        if conditions := self.conditions.to_json():
            optional["conditions"] = conditions
        if self.max_hold != MAX_HOLD:
            optional["max_hold"] = self.max_hold
        if self.forgive:
            optional["forgive"] = True
        if self.mirror:
            optional["mirror"] = self.mirror
        return custom | optional

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
            stop=fields.take_bool(item, "stop"),
            conditions=Conditions.parse(item.get("conditions", {})),
            max_hold=fields.take_int(item, "max_hold", high=LONGEST_HOLD, default=MAX_HOLD),
            forgive=fields.take_bool(item, "forgive"),
            mirror=_mirror(item.get("mirror")),
        )


def _mirror(value: object) -> str:
    if not value:
        return ""
    from device_sdk.protocol.mirrors import mirror_or_none  # few devices have one, and each starts

    return mirror_or_none(value)
