"""Find out what this process can run: its runtime, memory, architecture and execution providers. Said to the server."""

import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

from device_sdk.protocol import fields, limits
from device_sdk.protocol.abilities import Abilities

# A model without a node, of an opset that there will not be for long: the runtime refuses it, and says what it knows.
_FAR_AHEAD = bytes.fromhex("08083a03120167420310" + "8f4e")
_SUPPORTED = re.compile(r"official support for domain ai\.onnx is till opset (\d{1,4})")
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def detect(providers: Sequence[Any] = ()) -> Abilities:
    """`providers` as models are opened with; those that this runtime has not are left out."""
    named = [str(each[0] if isinstance(each, (list, tuple)) else each) for each in providers]
    here = onnxruntime.get_available_providers()
    return Abilities(
        runtime=str(onnxruntime.__version__)[:32],
        opset=newest_opset(),
        memory=memory(),
        arch=fields.plain(platform.machine().lower())[:32],
        providers=tuple(name for name in named if name in here)[: limits.PROVIDERS],
    )


@cache
def newest_opset() -> int:
    """The newest that the runtime supports, by its own word; 0 where it does not say. Takes some 10 ms, once."""
    try:
        onnxruntime.InferenceSession(_FAR_AHEAD, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # it has errors of its own, one for each status
        found = _SUPPORTED.search(str(error))
        return int(found[1]) if found else 0
    return 0


def memory(cgroups: Sequence[Path] = _CGROUPS) -> int:
    """Bytes that the process may use at most: the machine's, or less where a control group says so. 0: not known."""
    known = []
    with suppress(ValueError, OSError, AttributeError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in cgroups:
        with suppress(ValueError, OSError):  # "max" is no number: no limit
            known.append(int(file.read_text(encoding="ascii")))
    return min((value for value in known if value > 0), default=0)
