"""Fleet's device SDK: signed model updates, hot-swapped under load, and samples back.

    from device_sdk import Fleet

    fleet = Fleet.open("/var/lib/fleet")      # a provisioned directory; works offline
    detector = fleet.model("detector")        # its last good release
    outputs = detector.run({"image": x})      # swappable under load, sampled by policy
    fleet.start()                             # poll, update, upload in the background

Names are loaded when they are asked for: importing `device_sdk.protocol` loads neither onnxruntime nor tuf.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from device_sdk.client import Fleet
    from device_sdk.enrolment import enrol
    from device_sdk.errors import (
        DeviceError,
        HeldError,
        InputError,
        ModelError,
        ModelStoppedError,
        NoModelError,
        QueueFullError,
        SetupError,
        StorageError,
        TransferError,
        UnauthorizedError,
        UntrustedError,
    )
    from device_sdk.model import Model
    from device_sdk.options import Options
    from device_sdk.status import Status

_HOMES = {
    "Fleet": "client",
    "Options": "options",
    "Status": "status",
    "enrol": "enrolment",
    "Model": "model",
    "DeviceError": "errors",
    "HeldError": "errors",
    "InputError": "errors",
    "ModelError": "errors",
    "ModelStoppedError": "errors",
    "NoModelError": "errors",
    "QueueFullError": "errors",
    "SetupError": "errors",
    "StorageError": "errors",
    "TransferError": "errors",
    "UnauthorizedError": "errors",
    "UntrustedError": "errors",
}

__all__ = [
    "DeviceError",
    "Fleet",
    "HeldError",
    "InputError",
    "Model",
    "ModelError",
    "ModelStoppedError",
    "NoModelError",
    "Options",
    "QueueFullError",
    "SetupError",
    "Status",
    "StorageError",
    "TransferError",
    "UnauthorizedError",
    "UntrustedError",
    "__version__",
    "enrol",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'device_sdk' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"device_sdk.{_HOMES[name]}"), name)
