"""Who updates a directory: one process at a time."""

import fcntl
import json
import os
import stat
from pathlib import Path

from device_sdk.errors import SetupError

_LENGTH = 32


class Lock:
    """Who updates a directory. Held by an open file: it ends with the process, however that ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> "Lock | None":
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SetupError(f"cannot lock {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            if status.st_size > _LENGTH:
                os.truncate(descriptor, 0)
            # Always as long: to cut a file off takes ext4 up to 4 ms, at each start of the program.
            os.pwrite(descriptor, json.dumps({"pid": os.getpid()}).ljust(_LENGTH).encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        os.close(self._descriptor)
