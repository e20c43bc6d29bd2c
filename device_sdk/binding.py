"""I/O binding that survives a swap: bound anew for each release, on the session that answers."""

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from device_sdk.errors import InputError, ModelError, first_line
from device_sdk.looking import look

if TYPE_CHECKING:
    from device_sdk.slot import Loaded, Slot

Prepare = Callable[[Any], object]  # gets an onnxruntime.IOBinding


class Binding:
    """Inputs and outputs of a model in memory of the application's choosing. For one thread; made by `Model.bind`.

    `prepare(io)` binds them: it is called before the first run, and again for each release that takes over, whose
    session has bindings of its own. `outputs`: the names that it binds, in its order (default: the model's own, all).
    Runs count as other calls do. Their inputs are not sampled: they may lie where this process cannot read.
    """

    def __init__(self, name: str, slot: "Slot", prepare: Prepare, outputs: Sequence[str] | None = None) -> None:
        self._name = name
        self._slot = slot
        self._prepare = prepare
        self._outputs = outputs

    def run(self, run_options: Any = None) -> dict[str, Any]:
        """Infer on what is bound. OrtValues by output name; they are overwritten by the next run, if so bound.

        Raises NoModelError, InputError (`prepare` does not fit the model), ModelError, HeldError.
        """
        slot = self._slot
        loaded = slot.current or slot.now(patient=True)
        if loaded is None:
            raise slot.nothing(self._name)
        try:
            return self._run(slot, loaded, run_options)
        except (InputError, ModelError) as error:
            failure = error.with_traceback(None)
            failure.__context__ = None
            del loaded, slot  # an error that is kept must not keep the release in memory
        raise failure

    def _run(self, slot: "Slot", loaded: "Loaded", run_options: Any) -> dict[str, Any]:
        io, cell = loaded.bound.get(self) or self._bind(slot, loaded), loaded.stats.cell()
        started = perf_counter_ns()
        try:
            loaded.session.run_with_iobinding(io, run_options)
        except Exception as error:  # noqa: BLE001  onnxruntime has no base class
            raise self._fault(slot, loaded, first_line(error)) from None
        elapsed = perf_counter_ns() - started
        names = self._outputs or loaded.names
        if not loaded.ended() & loaded.check_mask:
            look(slot, loaded, cell, names, io.copy_outputs_to_cpu(), elapsed)
        return dict(zip(names, io.get_outputs(), strict=True))

    def _bind(self, slot: "Slot", loaded: "Loaded") -> Any:
        io = loaded.session.io_binding()
        try:
            self._prepare(io)
            if len(io.get_outputs()) not in {0, len(self._outputs or loaded.names)}:
                raise ValueError(f"expected outputs {', '.join(self._outputs or loaded.names)} to be bound")
        except Exception as error:  # noqa: BLE001  of the application or of onnxruntime
            previous = slot.previous
            if previous is not None and self in previous.bound:  # its predecessor took it: the release is at fault
                raise self._fault(slot, loaded, first_line(error)) from None
            loaded.stats.cell().rejected += 1
            raise InputError(f"{loaded.path}: it cannot be bound: {first_line(error)}") from None
        loaded.bound[self] = io
        return io

    def _fault(self, slot: "Slot", loaded: "Loaded", message: str) -> ModelError:
        cell = loaded.stats.cell()
        loaded.ended()
        cell.errors += 1
        slot.alarm()
        return ModelError(f"{loaded.path}: {message}")
