"""Samples on their way to the server: taken off the caller's hands at once, redacted, then written; bounded throughout.

    <model's hash>/samples/<id>.zip    one inference each; replaced by the reservoir while they wait
    <model's hash>/batches/<id>.zip    sealed: what is uploaded, byte for byte, however often it takes
    <model's hash>/batches/<id>.json   its head; written before it, so that there is no sealed batch without one
    <model's hash>/state.json          the campaign and the reservoir's counts, for honest probabilities

Everything appears by rename. A sample may be lost in a power cut (it is one of many); a sealed batch may not.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import file_digest
from pathlib import Path
from random import random, randrange
from secrets import token_hex

from device_sdk.config import read_plainly, write_durably
from device_sdk.errors import StorageError
from device_sdk.intake import Array, Inbox, Intake, Sample
from device_sdk.packing import BATCH_BYTES, Cover, encode, pack, sample_ids
from device_sdk.protocol import limits
from device_sdk.protocol.assignment import Sampling
from device_sdk.protocol.batches import BatchHead
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import digest
from device_sdk.sampling import Reservoir

log = logging.getLogger("device_sdk")

Redact = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A batch that is ready to travel."""

    head: BatchHead
    path: Path


@dataclass
class _Lane:
    """One model's part of the spool."""

    model: str
    path: Path
    intake: Intake
    sampling: Sampling | None = None
    reservoir: Reservoir = field(default_factory=lambda: Reservoir(0))
    dropped: int = 0  # not yet told to the server
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of each waiting sample
    sealed: dict[str, Sealed] = field(default_factory=dict)

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def batches(self) -> Path:
        return self.path / "batches"

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values()) + sum(batch.head.length for batch in self.sealed.values())


class Spool:
    """All models' samples. `max_bytes` bounds everything on disk, `max_samples` what waits of one model, `batch_bytes`
    the tensors of one batch.
    """

    def __init__(
        self, directory: Path, *, device: str, max_bytes: int, max_samples: int = 100_000, redact: Redact | None = None,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:  # fmt: skip
        self._batch_bytes = min(batch_bytes, BATCH_BYTES)
        self._directory = directory
        self._device = device
        self._max_bytes = max_bytes
        self._max_samples = max_samples
        self._redact = redact
        self._inbox = Inbox()
        self._lanes: dict[str, _Lane] = {}
        self._lock = threading.RLock()
        self._idle = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # What the client calls

    def lane(self, model: str) -> Intake:
        """The intake of `model`; takes up what an earlier process left on disk."""
        with self._lock:
            if model not in self._lanes:
                with _storage_errors(f"open the spool of {model}"):
                    self._lanes[model] = self._open(model)
            return self._lanes[model].intake

    def configure(self, model: str, sampling: Sampling | None) -> Intake:
        """Obey a campaign. What was kept under another one, or at another rate, is sealed first, under its name."""
        intake = self.lane(model)
        with self._lock:
            lane = self._lanes[model]
            if sampling is not None and sampling != lane.sampling:
                if _odds(sampling) != _odds(lane.sampling):
                    self.seal(model)
                    lane.reservoir = Reservoir(min(sampling.max_samples, self._max_samples))
                lane.sampling = sampling
                self._save(lane)
            intake.rate = sampling.rate if sampling is not None and time.time() < sampling.expires else 0.0
        return intake

    def start(self) -> None:
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, name="fleet-spool", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Write what is queued, then end the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(10)
            self._thread = None
        self.drain()

    def drain(self) -> None:
        """Write whatever is queued now, in this thread."""
        while (sample := self._inbox.get(0)) is not None:
            self._keep_safely(sample)
        self._note_missed()

    def count_missed(self, missed: Mapping[str, int]) -> None:
        """Other processes of this device were asked for samples, and kept none: this one alone writes here."""
        for model, count in missed.items():
            with self._lock:
                if model in self._lanes:
                    self._lose(self._lanes[model], count)
                    with contextlib.suppress(OSError):
                        self._save(self._lanes[model])

    def sampling(self, model: str) -> Sampling | None:
        """The campaign that was obeyed last; its window holds for the batches that wait."""
        return self._lanes[model].sampling if model in self._lanes else None

    def models(self) -> list[str]:
        with self._lock:
            return sorted(self._lanes)

    def waiting(self) -> dict[str, int]:
        """Samples that wait, sealed or not, by model."""
        with self._lock:
            return {
                lane.model: len(lane.sizes) + sum(batch.head.samples for batch in lane.sealed.values())
                for lane in self._lanes.values()
            }

    def dropped(self) -> dict[str, int]:
        """Samples lost and not yet told to the server, by model."""
        with self._lock:
            return {
                lane.model: lane.dropped + sum(batch.head.dropped for batch in lane.sealed.values())
                for lane in self._lanes.values()
            }

    def size(self) -> int:
        """Bytes on disk, of samples and batches."""
        with self._lock:
            return sum(lane.bytes for lane in self._lanes.values())

    # What the uploader calls

    def seal(self, model: str) -> list[Sealed]:
        """Put all waiting samples into durable batches, and return every batch of the model, oldest first."""
        self.lane(model)
        with self._lock, _storage_errors(f"seal samples of {model}"):
            lane = self._lanes[model]
            while lane.sizes:
                self._seal_one(lane)
            lane.reservoir = replace(lane.reservoir, kept=0, seen=0, lost=0, capacity=self._capacity(lane))
            self._save(lane)
            return list(lane.sealed.values())

    def sealed(self, model: str) -> list[Sealed]:
        with self._lock:
            return list(self._lanes[model].sealed.values()) if model in self._lanes else []

    def remove(self, batch: Sealed, *, lost: bool = False) -> None:
        """Delete a batch: it was acknowledged, or (`lost`) can never be; then its samples count as dropped."""
        with self._lock, _storage_errors(f"remove batch {batch.head.id}"):
            lane = self._lanes[batch.head.model]
            if lane.sealed.pop(batch.head.id, None) is None:
                return
            if lost:
                lane.dropped += batch.head.samples + batch.head.dropped
                self._save(lane)
            batch.path.unlink(missing_ok=True)
            batch.path.with_suffix(".json").unlink(missing_ok=True)

    def is_whole(self, batch: Sealed) -> bool:
        """Whether a batch's bytes are still those that were sealed."""
        try:
            return _sha256(batch.path) == batch.head.sha256
        except OSError:
            return False

    # The thread

    def _work(self) -> None:
        while not self._stop.is_set():
            sample = self._inbox.get(0.5)
            if sample is not None:
                self._keep_safely(sample)

    def _keep_safely(self, sample: Sample) -> None:
        """A sample that cannot be redacted or written is lost, and counted; it is never written as it was."""
        with self._lock:
            self._note_missed()
            lane = self._lanes[sample.model]
            try:
                self._keep(lane, sample)
            except Exception as error:  # noqa: BLE001  the hook is the application's and may raise anything
                log.warning("a sample of %s was lost: %s", sample.model, error)
                lane.reservoir = lane.reservoir.lose()
                lane.dropped += 1
            with contextlib.suppress(OSError):
                self._save(lane)

    def _keep(self, lane: _Lane, sample: Sample) -> None:
        sampling = lane.sampling
        if sampling is None or sample.at >= sampling.expires:
            lane.intake.rate = 0.0
            return
        inputs = sample.inputs if self._redact is None else self._redact(sample.inputs)
        identifier = token_hex(16)
        data = encode(identifier, replace(sample, inputs=inputs), sampling.rate)
        if len(data) > BATCH_BYTES:
            raise StorageError(f"{len(data)} bytes do not fit into a batch", code="too_large")
        reservoir, slot = lane.reservoir.place(random())  # noqa: S311  no secret
        if slot is None:
            lane.reservoir = reservoir
            return
        replaced = list(lane.sizes)[slot : slot + 1]
        evicted, fits = self._make_room(lane, len(data), replaced)
        if fits:  # first, so that a full disk costs nothing that is kept; for a moment both are there
            _write(lane.samples / f"{identifier}.zip", data)
        for name in (*replaced, *evicted):
            self._forget(lane, name)
        if fits:
            lane.sizes[identifier] = len(data)
        lane.reservoir = reservoir
        for _ in range(len(evicted) + (not fits)):
            lane.reservoir = lane.reservoir.shrink()
            lane.dropped += 1

    def _make_room(self, lane: _Lane, size: int, replaced: list[str]) -> tuple[list[str], bool]:
        """Choose at random, the newcomer included, who has to go until the rest fits into the spool."""
        over = self.size() + size - sum(lane.sizes[name] for name in replaced) - self._max_bytes
        staying = [name for name in lane.sizes if name not in replaced]
        evicted: list[str] = []
        while over > 0:
            at = randrange(len(staying) + 1)  # noqa: S311  no secret
            if at == len(staying):
                return evicted, False
            evicted.append(staying.pop(at))
            over -= lane.sizes[evicted[-1]]
        return evicted, True

    def _note_missed(self) -> None:
        for model, count in self._inbox.take_missed().items():
            with self._lock:
                self._lose(self._lanes[model], count)

    def _lose(self, lane: _Lane, count: int) -> None:
        lane.dropped += count
        lane.reservoir = replace(lane.reservoir, seen=lane.reservoir.seen + count, lost=lane.reservoir.lost + count)

    # Sealing

    def _seal_one(self, lane: _Lane) -> None:
        rate = lane.sampling.rate if lane.sampling else 1.0
        probability = max(lane.reservoir.probability(rate), 1e-12)
        identifier = token_hex(16)
        temporary = lane.batches / f".{identifier}.tmp"
        cover = Cover(identifier, self._device, lane.model, min(probability, 1.0))
        samples = {lane.samples / f"{name}.zip": size for name, size in lane.sizes.items()}
        chosen = pack(temporary, cover, samples, limit=self._batch_bytes)
        for name in chosen.broken:
            self._forget(lane, name)
            lane.dropped += 1
        if not chosen.entries:
            temporary.unlink(missing_ok=True)
            return
        head = self._head(lane, identifier, temporary, len(chosen.entries))
        path = lane.batches / f"{identifier}.zip"
        write_durably(path.with_suffix(".json"), json.dumps(head.to_json()).encode())
        temporary.replace(path)
        _sync_directory(lane.batches)
        lane.sealed[identifier] = Sealed(head, path)
        lane.dropped = 0
        for entry in chosen.entries:
            self._forget(lane, entry.id)
        self._save(lane)

    def _head(self, lane: _Lane, identifier: str, path: Path, samples: int) -> BatchHead:
        return BatchHead(
            id=identifier,
            model=lane.model,
            sha256=_sha256(path),
            length=path.stat().st_size,
            samples=samples,
            dropped=lane.dropped,
            campaign=lane.sampling.campaign if lane.sampling else "",
        )

    def _forget(self, lane: _Lane, name: str) -> None:
        (lane.samples / f"{name}.zip").unlink(missing_ok=True)
        lane.sizes.pop(name, None)

    # Disk

    def _capacity(self, lane: _Lane) -> int:
        return min(lane.sampling.max_samples, self._max_samples) if lane.sampling else 0

    def _open(self, model: str) -> _Lane:
        path = self._directory / digest(model.encode())[:32]
        lane = _Lane(model=model, path=path, intake=Intake(model, self._inbox))
        for folder in (path, lane.samples, lane.batches):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _load_state(lane)
        _load_batches(lane)
        _load_samples(lane)
        capacity = min(lane.reservoir.capacity, self._capacity(lane))
        lane.reservoir = replace(lane.reservoir, kept=len(lane.sizes), capacity=max(capacity, len(lane.sizes)))
        return lane

    def _save(self, lane: _Lane) -> None:
        sampling = lane.sampling.to_json() if lane.sampling else None
        state = {"sampling": sampling, "reservoir": asdict(lane.reservoir), "dropped": lane.dropped}
        _write(lane.path / "state.json", json.dumps(state).encode())


def _odds(sampling: Sampling | None) -> tuple[object, ...]:
    return (sampling.campaign, sampling.rate, sampling.max_samples) if sampling else ()


def _load_state(lane: _Lane) -> None:
    """A state that does not parse costs the counts, not the samples."""
    try:
        state = json.loads(read_plainly(lane.path / "state.json", limit=limits.BATCH))
        lane.sampling = Sampling.parse(state["sampling"]) if state["sampling"] else None
        lane.reservoir = Reservoir(**state["reservoir"])
        lane.dropped = int(state["dropped"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("spool of %s: state was lost: %s", lane.model, error)


def _load_batches(lane: _Lane) -> None:
    for path in sorted(_files(lane.batches, ".json"), key=lambda path: path.stat().st_mtime_ns):
        content = path.with_suffix(".zip")
        try:
            head = BatchHead.parse(json.loads(read_plainly(path, limit=limits.BATCH)))
            if content.stat().st_size != head.length:
                raise ProtocolError("malformed", "length")
        except (OSError, ValueError):
            path.unlink(missing_ok=True)  # sealing was cut off before the batch had its name: the samples are here
            content.unlink(missing_ok=True)
            continue
        lane.sealed[head.id] = Sealed(head, content)
        for name in sample_ids(content):  # sealing was cut off before its samples were deleted
            (lane.samples / f"{name}.zip").unlink(missing_ok=True)


def _load_samples(lane: _Lane) -> None:
    for folder in (lane.samples, lane.batches, lane.path):
        for path in _files(folder, ".tmp"):
            path.unlink(missing_ok=True)
    for path in sorted(_files(lane.samples, ".zip")):
        lane.sizes[path.stem] = path.stat().st_size


def _files(folder: Path, suffix: str) -> list[Path]:
    """As `glob`, which compiles a pattern at each start of a process."""
    return [folder / name for name in os.listdir(folder) if name.endswith(suffix)]  # noqa: PTH208  for its speed


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; not synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {what}: {error.strerror or error}") from error
