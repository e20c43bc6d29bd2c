"""Take the shorter way to a file, where there is one: fetch a patch, and make the file from one that is here.

The server's offers, the patch and the old file are guesses. What comes out must have the signed length and sha256, as
any download must; on any doubt the patch is thrown away, not tried again in this process, and the whole file is
fetched. Memory is bounded by the format; the disk holds the patch and at most the signed length of the new file.
"""

import contextlib
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

from device_sdk.errors import DeviceError, TransferError, UnauthorizedError, UntrustedError, is_retryable
from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import FileEntry
from device_sdk.protocol.patches.decoder import ReadAt, apply
from device_sdk.protocol.patches.frames import MAX_FRAME, NOTHING
from device_sdk.protocol.patches.offers import PatchOffer, parse_offers, patches_path
from device_sdk.protocol.polls import BLOBS
from device_sdk.store import Store

if TYPE_CHECKING:
    from device_sdk.transport import Transport

log = logging.getLogger("device_sdk")

SMALLEST = 64 * limits.KIB  # files below it are not asked about
MOST_CUTS = 5  # failures of the network after which the whole file is tried instead
_ASK_SECONDS = 30.0


class RefusedError(Exception):
    """A patch that gives nothing that may be used. `code` and message go to the server."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Patcher:
    """Remembers for the process which patches were no good. One thread at a time."""

    def __init__(self, transport: "Transport", store: Store) -> None:
        self._transport, self._store = transport, store
        self._given_up: set[str] = set()
        self._cuts: Counter[str] = Counter()
        self.on_refused: Callable[[ProtocolError | UntrustedError], None] = lambda _: None

    def best(self, file: FileEntry, *, left: int, ends: float) -> PatchOffer | None:
        """The offer with the least to fetch, if that is less than the `left` bytes of the file itself."""
        if left < SMALLEST:
            return None
        costs = {offer: self._cost(offer) for offer in self._ask(file, ends) if self._is_usable(offer, file)}
        offer = min(costs, key=lambda each: costs[each], default=None)
        if offer is None or costs[offer] >= left or self._store.free_bytes() < costs[offer] + file.length:
            return None
        return offer

    def cut(self, offer: PatchOffer, error: TransferError) -> None:
        """The network failed in the middle of a patch. Raises RefusedError where it should not be tried again."""
        self._cuts[offer.sha256] += 1
        hopeless = not is_retryable(error) or self._cuts[offer.sha256] >= MOST_CUTS
        if hopeless and not isinstance(error, UnauthorizedError):
            self._give_up(offer, error.code, str(error))

    def refuse(self, offer: PatchOffer, error: ProtocolError | UntrustedError) -> None:
        """What came is not what it should be: say so at once, for the whole file may not come either."""
        log.error("refused (%s): %s", error.code, error)
        self.on_refused(error)
        self._give_up(offer, error.code, str(error))

    def _give_up(self, offer: PatchOffer, code: str, message: str) -> None:
        """Throw a patch away for good, by RefusedError."""
        log.warning("patch %s: the whole file is fetched instead: %s", offer.sha256, message)
        self._given_up.add(offer.sha256)
        self._store.discard(offer.sha256)
        raise RefusedError(code, message)

    def make(self, offer: PatchOffer, file: FileEntry, *, go_on: Callable[[], None], ends: float) -> None:
        """Make `file` of a patch that is here, and admit it. Raises RefusedError, StorageError, TransferError."""
        self._store.discard(file.sha256)
        try:
            with self._patch(offer) as patch, self._base(offer) as base:
                self._write(file, _apply(patch, base, offer, file), go_on, ends)
            self._store.admit(file.sha256, file.length)
        except (ProtocolError, UntrustedError) as error:
            self._store.discard(file.sha256)
            self.refuse(offer, error)
        except (ImportError, MemoryError) as error:  # a device without numpy, or without a few MiB
            self._store.discard(file.sha256)
            self._give_up(offer, "no_means", f"patches cannot be applied here: {error}")
        self._store.discard(offer.sha256)

    def _write(self, file: FileEntry, pieces: Iterator[bytes], go_on: Callable[[], None], ends: float) -> None:
        waiting, size = [], 0
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= MAX_FRAME:
                go_on()
                if time.monotonic() > ends:
                    raise TransferError(f"{file.name}: the overall deadline has passed", code="deadline")
                self._store.append(file.sha256, b"".join(waiting))
                waiting, size = [], 0
        self._store.append(file.sha256, b"".join(waiting))

    def _ask(self, file: FileEntry, ends: float) -> tuple[PatchOffer, ...]:
        """What the server offers. Servers that know nothing of patches offer nothing."""
        deadline = min(_ASK_SECONDS, ends - time.monotonic())
        path = patches_path(BLOBS + file.sha256)
        try:
            answer = self._transport.request("GET", path, limit=limits.PATCH_OFFERS, deadline=deadline)
            return parse_offers(answer.body)
        except UnauthorizedError:
            raise
        except (DeviceError, ProtocolError) as error:
            log.info("%s: no patches: %s", file.name, error)
            return ()

    def _is_usable(self, offer: PatchOffer, file: FileEntry) -> bool:
        if offer.sha256 in self._given_up or offer.sha256 == file.sha256 or offer.length >= file.length:
            return False
        return offer.base == NOTHING or self._store.blob_length(offer.base) is not None

    def _cost(self, offer: PatchOffer) -> int:
        return max(offer.length - self._store.partial_length(offer.sha256), 0)

    @contextlib.contextmanager
    def _patch(self, offer: PatchOffer) -> Iterator[BinaryIO]:
        """Buffered: its frames have small heads."""
        with self._store.open_partial(offer.sha256) as file:
            yield cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", file)))

    @contextlib.contextmanager
    def _base(self, offer: PatchOffer) -> Iterator[ReadAt]:
        if offer.base == NOTHING:
            yield lambda *_: b""
            return
        with self._store.open_blob(offer.base) as file:
            yield lambda offset, length: _read_at(file, offset, length)


def _apply(patch: BinaryIO, base: ReadAt, offer: PatchOffer, file: FileEntry) -> Iterator[bytes]:
    return apply(patch.read, base, base_sha256=offer.base, target_sha256=file.sha256, target_length=file.length)


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """A base that the disk does not give is no base."""
    try:
        return os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise ProtocolError("bad_base", f"patch: the base cannot be read at {offset}: {error.strerror}") from error
