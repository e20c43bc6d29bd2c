"""Bring sealed batches to the server: announce, put, complete; the local copy goes only after "received".

Every step may be repeated: a batch keeps its id and its bytes. What can never be taken is counted as dropped.
Batches keep to a rate and to a daily budget, as downloads do; announcements, of some hundred bytes, are not counted.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from device_sdk.errors import DeviceError, TransferError, UnauthorizedError, is_retryable
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.polls import BATCHES
from device_sdk.sampling import upload_open
from device_sdk.spool import Sealed, Spool
from device_sdk.traffic import Traffic

log = logging.getLogger("device_sdk")

RECEIVED, ANNOUNCED = "received", "announced"
_TERMINAL = frozenset({"wrong_model", "batch_exists", "malformed", "too_large", "invalid_name", "invalid_sha256"})
_ANSWER = 64 * limits.KIB
_DEADLINE = 30.0
_PUT_DEADLINE = 600.0


class Client(Protocol):
    """The part of `transport.Transport` that is used here."""

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: Any = None,
        limit: int, deadline: float, authorise: bool = True,
    ) -> Any: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Upload:
    """Where the bytes go, by the server's word. `credential`: whether ours is to be sent along."""

    url: str
    method: str
    headers: Mapping[str, str]
    credential: bool

    @classmethod
    def parse(cls, value: object) -> "Upload":
        item = fields.as_object(value, "upload")
        headers = fields.as_object(item.get("headers", {}), "headers")
        method = fields.take_text(item, "method", limit=8, default="PUT")
        if method not in {"PUT", "POST"}:
            raise ProtocolError("malformed", f"upload: expected PUT; got {method!r}")
        return cls(
            url=fields.take_text(item, "url", limit=8_000),
            method=method,
            headers={name: fields.take_text(headers, name, limit=2_000) for name in headers},
            credential=fields.take_bool(item, "credential"),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What one round did, in batches. `lost`: the server will never take them. `failed`: kept, for another try.
    `put_off`: until the next day, for today's bytes are spent.
    """

    sent: int = 0
    samples: int = 0
    lost: int = 0
    failed: int = 0
    put_off: int = 0


class Uploader:
    """Seals and uploads. `second_of_day`: the device's local time, for the window."""

    def __init__(
        self, client: Client, spool: Spool, device: str, *, second_of_day: Callable[[], float],
        traffic: Traffic | None = None,
    ) -> None:  # fmt: skip
        self.stopping: Callable[[], bool] = lambda: False
        self._traffic = traffic or Traffic(None)
        self._client = client
        self._spool = spool
        self._device = device
        self._second_of_day = second_of_day

    def run(self, *, force: bool = False) -> Report:
        """Upload all that may travel now; `force` ignores windows, and no budget.

        Raises TransferError (no answer, 401, 429, 5xx), which ends the round; what was done stays done. A batch that
        is refused for a reason of its own does not hold up the others.
        """
        report = Report()
        for model in self._spool.models():
            if force or self._is_open(model):
                for batch in self._spool.seal(model):
                    report = self._deliver(batch, report)
        if report.put_off:
            log.info("%d batches wait for tomorrow: today's bytes are spent", report.put_off)
        return report

    def _is_open(self, model: str) -> bool:
        sampling = self._spool.sampling(model)
        return sampling is not None and upload_open(sampling, self._device, self._second_of_day())

    def _deliver(self, batch: Sealed, report: Report) -> Report:
        if not self._traffic.has_room(batch.head.length):
            return replace(report, put_off=report.put_off + 1)
        try:
            self._exchange(batch)
        except (DeviceError, OSError) as error:
            if isinstance(error, UnauthorizedError) or is_retryable(error):
                raise
            log.warning("batch %s of %s was not taken: %s", batch.head.id, batch.head.model, error)
            if not self._is_hopeless(batch, error):
                return replace(report, failed=report.failed + 1)
            self._spool.remove(batch, lost=True)
            return replace(report, lost=report.lost + 1)
        self._spool.remove(batch)
        return replace(report, sent=report.sent + 1, samples=report.samples + batch.head.samples)

    def _exchange(self, batch: Sealed) -> None:
        head = batch.head
        answer = self._post(BATCHES, fields.canonical(head.to_json()))
        if answer.get("state") == RECEIVED:
            return
        try:
            upload = Upload.parse(answer.get("upload"))
        except ProtocolError as error:
            raise TransferError(f"announcing a batch: {error}", code="bad_answer") from error
        self._put(batch, upload)
        answer = self._post(f"{BATCHES}/{head.id}/complete", b"")
        if answer.get("state") != RECEIVED:
            raise TransferError(f"expected state {RECEIVED!r}; got {answer.get('state')!r:.40}", code="bad_answer")

    def _put(self, batch: Sealed, upload: Upload) -> None:
        """At the rate; the deadline leaves twice the time that it takes."""
        length = batch.head.length
        deadline = _PUT_DEADLINE + 2 * self._traffic.seconds(length)
        self._traffic.expect(length)
        try:
            with _Counted(batch.path, self._traffic, self._go_on) as file:
                self._client.request(
                    upload.method, upload.url, headers=upload.headers, body=file,
                    limit=_ANSWER, deadline=deadline, authorise=upload.credential,
                )  # fmt: skip
        finally:
            self._traffic.settle()

    def _go_on(self) -> None:
        if self.stopping():
            raise TransferError("the device stops in the middle of an upload", code="stopped")

    def _post(self, path: str, body: bytes) -> dict[str, Any]:
        answer = self._client.request(
            "POST", path, headers={"Content-Type": "application/json"}, body=body, limit=_ANSWER, deadline=_DEADLINE
        )
        try:
            return fields.parse_object(answer.body, limit=_ANSWER, what="answer")
        except ProtocolError as error:
            raise TransferError(str(error), code="bad_answer") from error

    def _is_hopeless(self, batch: Sealed, error: Exception) -> bool:
        """Whether trying again is of no use: the server said why it never will, or our own copy is damaged."""
        code = error.code if isinstance(error, DeviceError) else "unreadable"
        return code in _TERMINAL or not self._spool.is_whole(batch)


class _Counted(FileIO):
    """A file whose bytes are counted as they are read to be sent, again too, and no faster than may be."""

    def __init__(self, path: Path, traffic: Traffic, go_on: Callable[[], None]) -> None:
        super().__init__(path, "rb")
        self._traffic = traffic
        self._go_on = go_on

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._traffic.took(len(data), self._go_on)
        return data
