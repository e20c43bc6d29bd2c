"""What can go wrong on the device, in two families by fault, and one predicate that decides about trying again."""


class DeviceError(Exception):
    """Base. `code` is stable and is what the server is told."""

    code = "device_error"

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code or self.code


class UntrustedError(DeviceError):
    """Signature, hash, expiry, downgrade, binding or agreement: what came must not be used. Never retried as it is."""

    code = "untrusted"


class TransferError(DeviceError):
    """The network or the server failed. `status` is 0 where no answer came; `retry_after` in seconds."""

    code = "transfer"

    def __init__(self, message: str, *, code: str = "", status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.retry_after = retry_after


class UnauthorizedError(TransferError):
    """401: the credential is unknown or revoked. Polling pauses, loudly; inference goes on."""

    code = "unauthorized"


class ModelError(DeviceError):
    """A release that was verified does not load, does not answer, or does not match its manifest."""

    code = "model"


class InputError(DeviceError, ValueError):
    """A call's inputs are not what the model takes: the caller's fault, no evidence against the release."""

    code = "input"


class NoModelError(DeviceError):
    """Nothing is installed for this model yet."""

    code = "no_model"


class ModelStoppedError(NoModelError):
    """The server's signed word: nothing of this model may run now. It serves again with the next release."""

    code = "stopped"


class HeldError(DeviceError):
    """The model is being swapped on a device that has no room for two, and it takes longer than a call may wait."""

    code = "held"


class QueueFullError(HeldError):
    """As before; and too many calls wait already."""

    code = "queue_full"


class StorageError(DeviceError):
    """The disk is full, read-only or broken."""

    code = "storage"


class ShortageError(DeviceError):
    """The device has too little memory free just now to try a release. Tried again later."""

    code = "memory"


class RehearsalError(DeviceError):
    """The process in which a new release is tried could not be started. The release is not to blame, nor loaded."""

    code = "no_rehearsal"


class SetupError(DeviceError):
    """The directory is not provisioned or not enrolled, or its files do not parse."""

    code = "setup"


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, 408, 425, 429, and 5xx."""
    if not isinstance(error, TransferError) or isinstance(error, UnauthorizedError):
        return False
    return error.status in {0, 408, 425, 429} or error.status >= 500


def first_line(error: Exception) -> str:
    """The gist of a foreign error, in at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
