"""Bring sealed batches to the server: announce, put, complete; the local copy goes only after "received".

Every step may be repeated: a batch keeps its id and its bytes. What can never be taken is counted as dropped.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from device_sdk.errors import DeviceError, StorageError, TransferError, UnauthorizedError, is_retryable
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.polls import BATCHES
from device_sdk.sampling import upload_open
from device_sdk.spool import Sealed, Spool

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
    """What one round did, in batches. `lost`: those that the server will never take."""

    sent: int = 0
    samples: int = 0
    lost: int = 0


class Uploader:
    """Seals and uploads. `second_of_day`: the device's local time, for the window."""

    def __init__(self, client: Client, spool: Spool, device: str, *, second_of_day: Callable[[], float]) -> None:
        self._client = client
        self._spool = spool
        self._device = device
        self._second_of_day = second_of_day

    def run(self, *, force: bool = False) -> Report:
        """Upload all that may travel now; `force` ignores windows. One failure ends the round: it raises after it.

        Raises TransferError (UnauthorizedError included) with what was done so far already done for good.
        """
        sent = samples = lost = 0
        for model in self._spool.models():
            if not force and not self._is_open(model):
                continue
            for batch in self._spool.seal(model):
                if self._deliver(batch):
                    sent, samples = sent + 1, samples + batch.head.samples
                else:
                    lost += 1
        return Report(sent=sent, samples=samples, lost=lost)

    def _is_open(self, model: str) -> bool:
        sampling = self._spool.sampling(model)
        return sampling is not None and upload_open(sampling, self._device, self._second_of_day())

    def _deliver(self, batch: Sealed) -> bool:
        """True: the server has it. False: it never will, and the samples were counted as dropped."""
        try:
            self._exchange(batch)
        except (TransferError, StorageError) as error:
            if not self._is_hopeless(batch, error):
                raise
            log.error("batch %s of %s is given up: %s", batch.head.id, batch.head.model, error)  # noqa: TRY400
            self._spool.remove(batch, lost=True)
            return False
        self._spool.remove(batch)
        return True

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
        try:
            with batch.path.open("rb") as file:
                self._client.request(
                    upload.method, upload.url, headers=upload.headers, body=file,
                    limit=_ANSWER, deadline=_PUT_DEADLINE, authorise=upload.credential,
                )  # fmt: skip
        except OSError as error:
            raise StorageError(f"cannot read batch {batch.head.id}: {error.strerror}", code="missing") from error

    def _post(self, path: str, body: bytes) -> dict[str, Any]:
        answer = self._client.request(
            "POST", path, headers={"Content-Type": "application/json"}, body=body, limit=_ANSWER, deadline=_DEADLINE
        )
        try:
            return fields.parse_object(answer.body, limit=_ANSWER, what="answer")
        except ProtocolError as error:
            raise TransferError(str(error), code="bad_answer") from error

    def _is_hopeless(self, batch: Sealed, error: DeviceError) -> bool:
        """Whether trying again is of no use: the server said why it never will, or our own copy is damaged."""
        if isinstance(error, StorageError):
            return True
        if isinstance(error, UnauthorizedError) or is_retryable(error):
            return False
        return error.code in _TERMINAL or (error.code == "hash_mismatch" and not self._spool.is_whole(batch))


def local_second_of_day() -> float:
    """Seconds since midnight by the device's local clock."""
    now = time.localtime()
    return now.tm_hour * 3600.0 + now.tm_min * 60.0 + now.tm_sec
