"""I/O binding over swaps, and execution providers that are not there."""

import gc
import weakref

import numpy as np
import onnxruntime
import pytest

from device_sdk import InputError, ModelError, NoModelError
from device_sdk.model import Model
from device_sdk.protocol.manifest import digest
from device_sdk.runtime import RuntimeOptions, load
from device_sdk.slot import CHECK_EVERY, Slot
from tests.sdk.test_runtime import loaded, serving
from tests.sdk.world import World, failing_on_data, graph, helper, judge, manifest_of, nan_emitting, scaling

ONES = np.ones((1, 4), np.float32)


def on_cpu(data=ONES):
    def prepare(io):
        io.bind_cpu_input("x", data)
        io.bind_output("y")

    return prepare


def value(outputs):
    return float(outputs["y"].numpy()[0, 0])


def test_bound_model_answers_and_its_runs_are_counted_as_calls():
    _, model = serving(scaling(3))
    bound = model.bind(on_cpu())
    assert [value(bound.run()) for _ in range(4)] == [3.0] * 4
    stats = model.stats
    assert (stats.calls, stats.checked, stats.errors, stats.invalid) == (4, 4, 0, 0)
    assert stats.p50 > 0


def test_binding_goes_over_to_the_next_release_and_holds_no_old_one_in_memory():
    slot, model = serving(scaling(2))
    bound = model.bind(on_cpu())
    assert value(bound.run()) == 2.0
    gone = weakref.ref(slot.current)
    slot.publish(loaded(scaling(5), path="detector/2.0.0/default"))
    assert slot.drop_previous(timeout=5)  # also while the binding has not run again
    gc.collect()
    assert gone() is None
    assert value(bound.run()) == 5.0


def test_falling_back_runs_on_the_binding_that_was_there():
    slot, model = serving(scaling(2))
    calls = []
    bound = model.bind(lambda io: (calls.append(io), on_cpu()(io)))
    bound.run()
    slot.publish(loaded(scaling(5)))
    bound.run()
    slot.fall_back()
    assert value(bound.run()) == 2.0
    assert len(calls) == 2


def test_memory_of_the_applications_own_is_written_to():
    _, model = serving(scaling(4))
    result = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 4), np.float32))

    def prepare(io):
        io.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(ONES))
        io.bind_ortvalue_output("y", result)

    model.bind(prepare).run()
    np.testing.assert_array_equal(result.numpy(), ONES * 4)


def test_binding_that_does_not_fit_is_the_callers_fault_unless_its_predecessor_took_it():
    slot, model = serving(scaling(1))
    with pytest.raises(InputError, match="cannot be bound"):
        model.bind(lambda io: io.bind_cpu_input("z", ONES)).run()
    with pytest.raises(InputError, match="expected outputs y, z to be bound"):
        model.bind(on_cpu(), ["y", "z"]).run()
    assert (model.stats.rejected, model.stats.errors) == (2, 0)
    bound = model.bind(on_cpu())
    bound.run()
    renamed = graph([helper.make_node("Relu", ["x"], ["y"])]).replace(b"\x01x", b"\x01w")
    slot.publish(loaded(renamed))
    alarms = []
    slot.alarm = lambda: alarms.append(1)
    with pytest.raises(ModelError):
        bound.run()
    assert (model.stats.errors, alarms) == (1, [1])


def test_bound_run_that_fails_is_a_model_error_that_keeps_no_release():
    slot, model = serving(failing_on_data())
    bound = model.bind(on_cpu(np.full((1, 4), 9, np.float32)))
    with pytest.raises(ModelError) as caught:
        bound.run()
    assert model.stats.errors == 1
    slot.publish(loaded(scaling(1)))
    assert slot.drop_previous(timeout=2)
    assert caught.value is not None


def test_bound_runs_without_a_release_say_so():
    with pytest.raises(NoModelError):
        Model("detector", Slot()).bind(on_cpu()).run()


def test_outputs_of_bound_runs_are_looked_at_in_probation_and_rarely_after():
    slot, model = serving(nan_emitting())
    bound = model.bind(on_cpu())
    for _ in range(3):
        bound.run()
    assert (model.stats.checked, model.stats.invalid) == (3, 3)
    slot.current.check_mask = CHECK_EVERY - 1
    for _ in range(CHECK_EVERY):
        bound.run()
    assert model.stats.checked == 4


# --- execution providers ---------------------------------------------------------------------------------------------

CUDA = ("CUDAExecutionProvider", {"device_id": 0})


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


def test_provider_that_is_missing_is_told_to_the_log_the_program_and_the_server(world, caplog):
    world.server.assign(world.server.publish("detector/1.0.0/default", scaling(2)))
    with world.open(providers=[CUDA, "CPUExecutionProvider"]) as fleet:
        fleet.update_once()
        for _ in range(6):
            fleet.model("detector").run({"x": ONES})
        fleet._worker._tell_health()
        judge(fleet)
        status = fleet.status()
        assert fleet.health()["models"]["detector"]["missing_providers"] == ["CUDAExecutionProvider"]
    assert status.models["detector"].missing_providers == ("CUDAExecutionProvider",)
    assert status.models["detector"].providers == ("CPUExecutionProvider",)
    assert "asked for CUDAExecutionProvider; it runs on CPUExecutionProvider" in caplog.text
    told = [event.detail for event in world.server.events if event.kind in {"health", "committed"}]
    assert [detail["missing_providers"] for detail in told] == ["CUDAExecutionProvider"] * 2
    assert [detail["providers"] for detail in told] == ["CPUExecutionProvider"] * 2


def test_provider_that_gives_up_in_the_middle_of_its_work_is_told_too(world):
    """onnxruntime falls back by itself, and only prints it."""
    world.server.assign(world.server.publish("detector/1.0.0/default", scaling(2)))
    with world.open() as fleet:
        fleet.update_once()
        fleet.model("detector").run({"x": ONES})
        fleet._slots["detector"].current.asked = ("TensorrtExecutionProvider", "CPUExecutionProvider")
        assert fleet.health()["models"]["detector"]["missing_providers"] == ["TensorrtExecutionProvider"]


def test_nothing_is_said_where_all_is_as_asked(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        assert fleet.status().models["detector"].missing_providers == ()
    assert "missing_providers" not in world.server.events[-1].detail


def test_where_none_of_them_is_there_the_cpu_serves():
    data = scaling(2)
    signed = manifest_of("detector/1.0.0/default", data)
    found = load(
        signed, sha256=digest(signed.to_bytes()), entry=data, options=RuntimeOptions(1, ("NoSuchExecutionProvider",))
    )
    assert (found.providers, found.missing) == (("CPUExecutionProvider",), ("NoSuchExecutionProvider",))
