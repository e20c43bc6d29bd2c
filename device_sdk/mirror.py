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


class Mirrors:
    """Which mirror is asked: the one that the host program names, else the signed view's, else the provisioned one.

    `given` None: the program leaves it to the others; "": it wants none.
    """

    def __init__(self, given: str | None, provisioned: str, *, stall_seconds: float) -> None:
        """Raises SetupError where the program's address is none."""
        try:
            self._given = check_address(given, "mirror") if given else given
        except ProtocolError as error:
            raise SetupError(error.message) from error
        self._provisioned = provisioned
        self._stall_seconds = stall_seconds
        self._last: tuple[str, Mirror] | None = None

    def choose(self, signed: str) -> "Mirror | None":
        """`signed`: what the view names. The same mirror as before for the same address, with what is known of it."""
        address = (signed or self._provisioned) if self._given is None else self._given
        if not address:
            return None
        if self._last is None or self._last[0] != address:
            self._last = (address, _open(address, self._stall_seconds))
        return self._last[1]


def _open(address: str, stall_seconds: float) -> "Mirror":
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
