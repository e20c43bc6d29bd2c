"""Load, check, run and swap: real onnxruntime sessions."""

import gc
import logging
import threading
import time
import weakref

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from device_sdk import runtime
from device_sdk.errors import InputError, ModelError, NoModelError
from device_sdk.looking import is_valid
from device_sdk.model import Model
from device_sdk.protocol.manifest import FileEntry, Manifest, TensorSpec, digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.runtime import RuntimeOptions, load
from device_sdk.slot import CHECK_EVERY, Slot, retire
from device_sdk.stats import Stats
from tests.sdk.world import X, failing_on_data, graph, manifest_of, nan_emitting, scaling

ONE_THREAD = RuntimeOptions(intra_op_threads=1)


def loaded(data, path="detector/1.0.0/default", inputs=()):
    manifest = manifest_of(path, data, inputs)
    return load(manifest, sha256=digest(manifest.to_bytes()), entry=data, options=ONE_THREAD)


def serving(data, **options):
    slot = Slot()
    slot.publish(loaded(data, **options))
    return slot, Model("detector", slot)


def test_model_without_a_release_says_so():
    with pytest.raises(NoModelError):
        Model("detector", Slot()).run(X)


def test_outputs_come_by_name():
    _, model = serving(scaling(3))
    outputs = model.run(X)
    np.testing.assert_array_equal(outputs["y"], X["x"] * 3)


def test_release_with_external_data_loads_from_its_path(tmp_path):
    weights = np.arange(4096, dtype=np.float32).reshape(4, 1024)
    model = onnx.load_from_string(graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights}))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    files = {name: (tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx.data")}
    entries = tuple(FileEntry(name, len(data), digest(data)) for name, data in files.items())
    manifest = Manifest(ReleasePath("detector", "1.0.0", "default"), entries, "model.onnx")
    release = load(manifest, sha256="0" * 64, entry=tmp_path / "model.onnx", options=ONE_THREAD)
    slot = Slot()
    slot.publish(release)
    for name in files:
        (tmp_path / name).unlink()  # the store takes its links away once the session is made
    np.testing.assert_allclose(Model("detector", slot).run(X)["y"], X["x"] @ weights)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"z": X["x"]}, "unknown input 'z'; the model takes x: float32 [n, 4]"),
        ({}, "input 'x' is missing"),
        ({"x": X["x"].astype(np.float64)}, "expected x: float32 [n, 4]; got float64 [1, 4]"),
        ({"x": X["x"][0]}, "expected x: float32 [n, 4]; got float32 [4]"),
        ({"x": np.zeros((1, 5), np.float32)}, "got float32 [1, 5]"),
        ({"x": "text"}, "expected a numpy array"),
    ],
)
def test_wrong_inputs_are_explained_and_not_counted_as_the_models_errors(inputs, message):
    _, model = serving(scaling(1))
    with pytest.raises(InputError) as caught:
        model.run(inputs)
    assert message in str(caught.value)
    assert (model.stats.calls, model.stats.errors, model.stats.rejected) == (0, 0, 1)


def test_unknown_output_is_the_callers_fault_too():
    _, model = serving(scaling(1))
    with pytest.raises(InputError, match="unknown output 'z'"):
        model.run(X, ["z"])


def test_release_on_trial_that_refuses_what_its_predecessor_took_is_at_fault():
    slot, model = serving(scaling(1))
    wide = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    ).SerializeToString()
    slot.publish(loaded(wide, path="detector/1.1.0/default"))
    with pytest.raises(ModelError):
        model.run(X)
    assert (model.stats.errors, model.stats.rejected) == (1, 0)


def test_failure_inside_the_model_is_a_model_error_and_raises_the_alarm():
    slot, model = serving(failing_on_data())
    alarms = []
    slot.alarm = lambda: alarms.append(1)
    with pytest.raises(ModelError, match=r"detector/1\.0\.0/default"):
        model.run({"x": np.full((1, 4), 9, np.float32)})
    assert (model.stats.calls, model.stats.errors) == (1, 1)
    assert alarms == [1]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [10, 10_000])
def test_nan_and_infinity_are_found_wherever_they_are(kind, value, size):
    array = np.ones(size, kind)
    assert is_valid(array)
    array[size // 2] = value
    assert not is_valid(array)


def test_large_finite_outputs_are_valid_though_their_square_overflows():
    assert is_valid(np.full(10, 3e38, np.float32))
    assert is_valid(np.full(10, 6e4, np.float16))


def test_empty_and_missing_outputs_are_invalid():
    assert not is_valid(np.zeros((0, 4), np.float32))
    assert not is_valid([])
    assert not is_valid(None)
    assert is_valid([{0: 0.5}])


def test_every_output_is_looked_at_in_probation_and_one_in_so_many_after():
    slot, model = serving(nan_emitting())
    for _ in range(32):
        model.run(X)
    assert (model.stats.checked, model.stats.invalid) == (32, 32)
    slot.publish(loaded(nan_emitting()))
    slot.current.check_mask = CHECK_EVERY - 1
    for _ in range(2 * CHECK_EVERY):
        model.run(X)
    assert (model.stats.calls, model.stats.checked, model.stats.invalid) == (2 * CHECK_EVERY, 2, 2)


@pytest.mark.parametrize(
    "inputs",
    [
        (TensorSpec("z", "float32", ("n", 4)),),
        (TensorSpec("x", "float64", ("n", 4)),),
        (TensorSpec("x", "float32", ("n", 4, 1)),),
    ],
)
def test_model_that_differs_from_its_signed_schema_is_refused(inputs):
    with pytest.raises(ModelError) as caught:
        loaded(scaling(1), inputs=inputs)
    assert caught.value.code == "schema"


@pytest.mark.parametrize("dtype", ["float32", "float", "tensor(float)"])
def test_signed_types_may_be_written_as_numpy_onnx_or_onnxruntime_do(dtype):
    assert loaded(scaling(1), inputs=(TensorSpec("x", dtype, ("n", 4)),)).names == ["y"]


def test_model_that_cannot_answer_zeros_of_its_signed_shape_is_refused():
    broken = graph([helper.make_node("Reshape", ["x", "s"], ["y"])], {"s": np.array([7, 7], np.int64)})
    with pytest.raises(ModelError) as caught:
        loaded(broken)
    assert caught.value.code == "test_failed"


def test_open_shape_that_no_invented_size_fits_is_a_warning_not_a_refusal(caplog):
    body = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.array([7, 7], np.int64), "s")],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with caplog.at_level(logging.WARNING, "device_sdk"):
        loaded(model.SerializeToString())
    assert "invented sizes" in caplog.text


def test_old_onnxruntime_is_warned_about(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "RUNTIME", "1.30.2")
    with caplog.at_level(logging.WARNING, "device_sdk"):
        loaded(scaling(1))
    assert "onnxruntime 1.30.2 holds the GIL" in caplog.text
    caplog.clear()
    monkeypatch.setattr(runtime, "RUNTIME", "1.31.0")
    with caplog.at_level(logging.WARNING, "device_sdk"):
        loaded(scaling(1))
    assert caplog.text == ""


def test_hot_swaps_under_load_lose_no_call_and_tear_none():
    slot, model = serving(scaling(0))
    go_on, counts, problems = threading.Event(), [], []
    go_on.set()

    def call():
        done = 0
        ones = {"x": np.ones((1, 4), np.float32)}
        while go_on.is_set():
            try:
                release, outputs = model.run_on(ones)
                if float(outputs["y"][0, 0]) != float(release.version):
                    problems.append(f"{release} answered {outputs}")
            except Exception as error:  # noqa: BLE001  any failure fails the test
                problems.append(repr(error))
            done += 1
        counts.append(done)

    callers = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    slot.current.path = ReleasePath("detector", "0", "default")
    for caller in callers:
        caller.start()
    stats, gone, clean = [slot.current.stats], [], []
    try:
        for number in range(1, 21):
            release = loaded(scaling(number), path=f"detector/{number}/default")
            gone.append(weakref.ref(slot.current))
            slot.publish(release)
            stats.append(release.stats)
            del release
            clean.append(slot.drop_previous(timeout=20))
    finally:
        go_on.clear()
    for caller in callers:
        caller.join(20)
    assert all(clean)
    assert problems == []
    assert sum(counts) > 100
    assert sum(each.counts().calls for each in stats) == sum(counts)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 20


def test_slow_call_keeps_its_release_and_retiring_gives_up_waiting_in_time(caplog):
    slot, model = serving(scaling(2))
    entered, go_on, results = threading.Event(), threading.Event(), []
    original = slot.current.call

    def slow(*arguments):
        entered.set()
        go_on.wait(10)
        return original(*arguments)

    slot.current.call = slow
    caller = threading.Thread(target=lambda: results.append(model.run(X)), daemon=True)
    caller.start()
    entered.wait(10)
    slot.publish(loaded(scaling(5)))
    began = time.monotonic()
    assert not slot.drop_previous(timeout=0.05)
    assert time.monotonic() - began < 5
    go_on.set()
    caller.join(10)
    np.testing.assert_array_equal(results[0]["y"], X["x"] * 2)


@pytest.mark.parametrize("method", ["run", "run_on"])
def test_failed_call_whose_error_is_kept_does_not_keep_the_release(method):
    slot, model = serving(failing_on_data())
    with pytest.raises(ModelError) as caught:
        getattr(model, method)({"x": np.full((1, 4), 9, np.float32)})
    slot.publish(loaded(scaling(1)))
    assert slot.drop_previous(timeout=2)
    assert caught.value is not None


def test_falling_back_serves_the_previous_session_itself():
    slot, model = serving(scaling(2))
    first = slot.current
    slot.publish(loaded(scaling(5)))
    assert slot.fall_back()
    assert slot.current is first
    assert float(model.run(X)["y"][0, 1]) == 2.0


def test_retiring_frees_a_release_that_nobody_uses():
    holder = [loaded(scaling(1))]
    gone = weakref.ref(holder[0])
    assert retire(holder, timeout=5)
    assert gone() is None


def test_counts_are_exact_over_threads_that_come_and_go():
    stats = Stats()

    def count():
        for _ in range(100):
            stats.ended()
            stats.cell().checked += 1

    for turn in range(50):
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = stats.counts()  # to read them counts for nothing
        assert counts.calls == counts.checked == (turn + 1) * 4 * 100
    assert len(stats._cells) <= 70


def test_latency_is_reported_over_recent_calls():
    _, model = serving(scaling(1))
    for _ in range(100):
        model.run(X)
    assert 0 < model.stats.p50 <= model.stats.p95


def test_application_may_wait_for_the_first_release():
    slot = Slot()
    model = Model("detector", slot)
    assert not model.wait(0)
    threading.Timer(0.01, slot.publish, [loaded(scaling(1))]).start()
    assert model.wait(10)


def test_wrapper_costs_little_beside_the_call_it_wraps():
    """The bar is 0.5 us; measured by `make bench`. Here only: no blunder of a whole order of magnitude."""
    slot, model = serving(scaling(1))
    slot.current.check_mask = CHECK_EVERY - 1
    session = slot.current.session

    def best(call):
        times = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(500):
                call()
            times.append((time.perf_counter() - began) / 500 * 1e6)
        return min(times)

    assert best(lambda: model.run(X)) - best(lambda: session.run(["y"], X)) < 5.0
