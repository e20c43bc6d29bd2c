"""A cache near the device, which is asked for files before the server is. Owns when it is asked, and what it is told.

A mirror is a stranger: it never gets the credential, may redirect nowhere, must be quick, and its bytes count for
nothing before they are hashed. It learns which files this device fetches; it cannot make the device run another.
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from device_sdk.config import check_address
from device_sdk.deferred import Deferred
from device_sdk.errors import DeviceError, SetupError, TransferError, UntrustedError
from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError

if TYPE_CHECKING:
    from device_sdk.transport import Transport

log = logging.getLogger("device_sdk")

BAD_MIRROR = "bad_mirror"
SHUN_FAILING = 900.0  # seconds
SHUN_LYING = 86_400.0
STALL_SECONDS = 10.0  # it is near: whoever is slower than this is no help
SLOWEST = 16 * limits.KIB  # bytes a second


def open_mirror(address: str, *, stall_seconds: float) -> "Mirror":
    """Raises SetupError where the address is none."""
    try:
        check_address(address, "mirror")
    except ProtocolError as error:
        raise SetupError(error.message) from error

    def make() -> Any:
        from device_sdk.transport import Transport

        return Transport(address, (), "", stall_seconds=min(stall_seconds, STALL_SECONDS), slowest=SLOWEST)

    return Mirror(Deferred(make))  # type: ignore[arg-type]  # a Transport when it is used


class Mirror:
    """One mirror, as this process knows it. One thread at a time."""

    def __init__(self, transport: "Transport", *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.transport = transport
        self.on_bad: Callable[[UntrustedError], None] = lambda _: None
        self._monotonic = monotonic
        self._shunned_until = 0.0
        self._without: set[str] = set()  # files that it does not have

    def is_asked_for(self, sha: str) -> bool:
        """Whether to ask it for a file."""
        return sha not in self._without and self._monotonic() >= self._shunned_until

    def failed(self, sha: str, error: DeviceError) -> None:
        """It gave nothing, or an answer that is none. One that only lacks the file is asked for others."""
        if isinstance(error, TransferError) and error.status in {404, 416}:
            log.info("the mirror does not have %s", sha)
            self._without.add(sha)
        elif isinstance(error, UntrustedError):
            self._shun(SHUN_LYING, error)
        else:
            self._shun(SHUN_FAILING, error)

    def lied(self, sha: str) -> None:
        self._shun(SHUN_LYING, UntrustedError(f"the mirror gave other bytes than {sha}", code="hash_mismatch"))

    def _shun(self, seconds: float, error: DeviceError) -> None:
        log.warning("the mirror is not asked for %.0f s: %s", seconds, error)
        self._shunned_until = self._monotonic() + seconds
        self._without.clear()
        if isinstance(error, UntrustedError):
            self.on_bad(error)
