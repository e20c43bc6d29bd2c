"""A named model as the application sees it. A call reads one reference, and finishes on the release that it read."""

from collections.abc import Mapping, Sequence
from random import random
from time import perf_counter_ns
from typing import Any

from device_sdk.binding import Binding, Prepare
from device_sdk.counts import Counts
from device_sdk.errors import InputError, ModelError, first_line
from device_sdk.looking import look
from device_sdk.protocol.manifest import TensorSpec
from device_sdk.protocol.names import ReleasePath
from device_sdk.sampling import decide
from device_sdk.slot import Array, Loaded, Slot, Tensors


class Model:
    """A named model as the application sees it: always the release that serves now."""

    def __init__(self, name: str, slot: Slot) -> None:
        self.name = name
        self._slot = slot

    def __repr__(self) -> str:
        return f"<Model {self.name}: {self.release or 'nothing installed'}>"

    @property
    def release(self) -> ReleasePath | None:
        loaded = self._slot.now()
        return loaded.path if loaded else None

    @property
    def stats(self) -> Counts:
        """Counts of the release that serves, since it was loaded."""
        loaded = self._slot.now()
        return loaded.stats.counts() if loaded else Counts()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        loaded = self._slot.now()
        return loaded.schema.inputs if loaded else {}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        loaded = self._slot.now()
        return loaded.schema.outputs if loaded else {}

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a release is installed; a new device has none before its first update."""
        return self._slot.wait(timeout)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Infer. Arrays by tensor name, in and out; `outputs` picks some, default all.

        Raises NoModelError (nothing installed; ModelStoppedError: nothing may run), InputError (not what the model
        takes), ModelError (the model failed), and with `swap="unload-first"` HeldError (it is being swapped).
        """
        slot = self._slot  # every line from here on is paid for by each inference: no lock, one read of `current`
        loaded = slot.current
        if loaded is None and (loaded := slot.now(patient=True)) is None:
            raise slot.nothing(self.name)
        names = loaded.names if outputs is None else outputs
        try:
            values = _watched(slot, loaded, names, inputs) if loaded.due else loaded.call(names, inputs)
        except Exception as error:  # noqa: BLE001  onnxruntime has no base class
            failure = _failure(slot, loaded, inputs, outputs, error)
            del loaded, slot  # the traceback, which the caller may keep, must not keep the release in memory
            raise failure from error.with_traceback(None)
        if not loaded.ended() & loaded.check_mask:
            loaded.due = True
        results = {names[0]: values[0]} if len(values) == 1 else dict(zip(names, values, strict=True))
        sampler = slot.sampler
        if sampler is not None and decide(random(), sampler.rate):  # noqa: S311  no secret
            sampler.offer(loaded.path, inputs, results)
        return results

    def bind(self, prepare: Prepare, outputs: Sequence[str] | None = None) -> Binding:
        """Run on memory that is bound beforehand, by onnxruntime's I/O binding. See `Binding`."""
        return Binding(self.name, self._slot, prepare, outputs)

    def run_on(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> tuple[ReleasePath, dict[str, Array]]:
        """As `run`, and say which release answered: after a swap `release` may already be another."""
        self._slot.now(patient=True)
        pinned = self._slot.pinned()
        if pinned.current is None:
            raise pinned.nothing(self.name)
        path = pinned.current.path
        try:
            return path, Model(self.name, pinned).run(inputs, outputs)
        finally:
            pinned.current = pinned.previous = None  # an error that is kept must not keep the release in memory


def _watched(slot: Slot, loaded: Loaded, names: Sequence[str], inputs: Tensors) -> list[Any]:
    """A call that is timed and looked at: each one in probation, one in so many later."""
    loaded.due = not loaded.check_mask
    started = perf_counter_ns()
    values = loaded.call(names, inputs)
    look(slot, loaded, loaded.stats.cell(), names, values, perf_counter_ns() - started)
    return values


def _failure(
    slot: Slot, loaded: Loaded, inputs: Mapping[str, Any], outputs: Sequence[str] | None, error: Exception
) -> Exception:
    """Whose fault was it? Only then is the call checked against the schema: a good call pays nothing for it.

    A release on trial that refuses what its predecessor took is at fault itself.
    """
    cell = loaded.stats.cell()
    unknown = [name for name in outputs or () if name not in loaded.schema.outputs]
    complaint = loaded.schema.complaint(inputs) or (unknown and f"unknown output {unknown[0]!r}")
    previous = slot.previous
    if complaint and (previous is None or previous.schema.complaint(inputs)):
        cell.rejected += 1
        return InputError(f"{loaded.path}: {complaint}")
    loaded.ended()
    cell.errors += 1
    slot.alarm()
    return ModelError(f"{loaded.path}: {complaint or first_line(error)}")
