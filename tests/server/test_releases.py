"""Uploads under trouble, and what validation finds in hostile files."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from hashlib import sha256
from io import BytesIO
from typing import Any

import onnx
import pytest
from django.utils import timezone
from onnx import TensorProto, helper

from device_sdk.protocol.manifest import TensorSpec
from fleet.errors import Conflict, TooLarge
from fleet.releases import services, storage, tasks, uploads, validation
from fleet.releases.models import Artifact, Release, Variant
from tests.registry import Registry, external_model, manifest_for, onnx_model

DATA = bytes(range(256)) * 40
NAME = sha256(DATA).hexdigest()


def reason_of(registry: Registry, files: dict[str, bytes], **extra: Any) -> str:
    """Publish it; it must come out invalid."""
    assert registry.publish("1.0.0", files, **extra).status_code == 201
    release = registry.release("1.0.0")
    assert release["state"] == "invalid"
    assert release["reason"].startswith("default: ")
    return str(release["reason"])


def stored() -> bytes:
    with storage.open_object(storage.blob_name(NAME)) as file:
        return file.read()


def bomb(elements: int) -> bytes:
    """A hundred bytes that unfold into `elements` floats when they are loaded: a sparse weight with one value."""
    values = helper.make_tensor("k", TensorProto.FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [1], [5]), [elements])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [elements])
    graph = helper.make_graph([helper.make_node("Neg", ["k"], ["y"])], "bomb", [], [y], sparse_initializer=[sparse])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


# --- validation ---


@pytest.mark.parametrize("data", [b"", b"not a model at all", b"\x00" * 500, b"PK\x03\x04" + b"x" * 300])
def test_what_is_not_onnx_is_invalid(registry: Registry, data: bytes) -> None:
    assert reason_of(registry, {"model.onnx": data}) != "default: "


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.99])
def test_truncated_onnx_is_invalid(registry: Registry, part: float) -> None:
    data = onnx_model()
    reason_of(registry, {"model.onnx": data[: int(len(data) * part)]})


def test_an_operator_that_does_not_exist_is_invalid_and_named(registry: Registry) -> None:
    model = onnx.load_model_from_string(onnx_model())
    model.graph.node[0].op_type = "Frobnicate"
    assert "Frobnicate" in reason_of(registry, {"model.onnx": model.SerializeToString()})


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/b", "..", "sub\\file"])
def test_external_data_outside_the_release_is_refused(registry: Registry, location: str) -> None:
    model, _ = external_model(location)
    assert "external data: expected the plain name" in reason_of(registry, {"model.onnx": model})


def test_external_data_that_is_missing_is_refused(registry: Registry) -> None:
    model, _ = external_model()
    assert "not among the release's files" in reason_of(registry, {"model.onnx": model})


def test_external_data_hidden_in_an_attribute_is_refused(registry: Registry) -> None:
    model = onnx.load_model_from_string(onnx_model())
    outer = onnx.load_model_from_string(external_model("../secret")[0]).graph.initializer[0]
    model.graph.ClearField("initializer")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=outer))
    assert "external data: expected the plain name" in reason_of(registry, {"model.onnx": model.SerializeToString()})


def test_a_memory_bomb_dies_in_its_subprocess_and_is_invalid(registry: Registry, settings: Any) -> None:
    settings.VALIDATION_MEMORY = 1024**3
    assert "needs more than the 1024 MiB" in reason_of(registry, {"model.onnx": bomb(400_000_000)})


def test_the_manifest_must_state_what_the_model_has(registry: Registry) -> None:
    wrong = TensorSpec("x", "int64", ("batch", 4))
    assert "inputs: the manifest states" in reason_of(registry, {"model.onnx": onnx_model()}, inputs=(wrong,))


@pytest.mark.parametrize("kind", ["float32", "float", "tensor(float)"])
def test_kinds_may_be_written_as_numpy_or_onnxruntime_do(registry: Registry, kind: str) -> None:
    registry.publish("1.0.0", inputs=(TensorSpec("x", kind, (None, 4)),))
    assert registry.release("1.0.0")["state"] == "valid"


def test_hostile_names_inside_a_model_are_kept_as_plain_text(
    registry: Registry, monkeypatch: Any, tmp_path: Any
) -> None:
    spec = {"name": "a\0b" + chr(0xD800), "dtype": "tensor(float)", "shape": ["n\0"]}
    answer = json.dumps({"inputs": [spec], "outputs": [], "opset": 17})
    probe = tmp_path / "probe.py"
    probe.write_text(f"print({answer!r})")
    monkeypatch.setattr(validation, "PROBE", probe)
    registry.publish("1.0.0")
    assert Variant.objects.get().inputs == [{"name": "a?b?", "dtype": "float32", "shape": ["n?"]}]


def test_a_loader_that_crashes_is_an_answer(registry: Registry, monkeypatch: Any, tmp_path: Any) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(validation, "PROBE", probe)
    assert "the loader crashed (SIGSEGV)" in reason_of(registry, {"model.onnx": onnx_model()})


def test_a_loader_that_is_killed_is_an_answer(registry: Registry, monkeypatch: Any, tmp_path: Any) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(validation, "PROBE", probe)
    assert "was killed, most likely because it needs more memory" in reason_of(registry, {"model.onnx": onnx_model()})


def test_a_loader_that_hangs_is_ended_and_invalid(
    registry: Registry, monkeypatch: Any, settings: Any, tmp_path: Any
) -> None:
    settings.VALIDATION_SECONDS = 1
    probe = tmp_path / "probe.py"
    probe.write_text(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    monkeypatch.setattr(validation, "PROBE", probe)
    assert "did not load within 1 s" in reason_of(registry, {"model.onnx": onnx_model()})
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_probe_gets_none_of_our_secrets_and_no_django(registry: Registry, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("FLEET_SECRET_KEY", "hush")
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import json, os; print(json.dumps({'error': 'seen ' + os.environ.get('FLEET_SECRET_KEY', 'no')}))"
    )
    monkeypatch.setattr(validation, "PROBE", probe)
    assert "seen no" in reason_of(registry, {"model.onnx": onnx_model()})
    script = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); print('django' in sys.modules)"
    command = [sys.executable, "-I", "-c", script, str(validation.__file__).replace("validation", "onnx_probe")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_nothing_is_left_of_a_validation(registry: Registry, own_folder: Any) -> None:
    registry.publish("1.0.0")
    assert list((own_folder / "incoming").iterdir()) == []


# --- when it is our fault ---


def test_a_store_that_is_away_delays_validation_and_the_sweep_finds_it(registry: Registry, monkeypatch: Any) -> None:
    def away(_: str) -> Any:
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_object", away)
        registry.publish("1.0.0")
        assert registry.release("1.0.0")["state"] == "validating"
        for _ in range(services.MAX_ATTEMPTS + 2):
            tasks.sweep()
        assert "no route to host" in Variant.objects.get().reason
    assert tasks.sweep() == 1
    assert registry.release("1.0.0")["state"] == "valid"
    assert tasks.sweep() == 0


def test_a_release_whose_task_was_lost_is_found_by_the_sweep(registry: Registry, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks.validate, "delay", lambda _: None)
        registry.publish("1.0.0")
    assert Release.objects.get().state == "validating"
    assert tasks.sweep() == 1
    assert Release.objects.get().state == "valid"


def test_a_broker_that_is_away_does_not_fail_the_publication(registry: Registry, monkeypatch: Any) -> None:
    def away(_: int) -> None:
        raise ConnectionError("broker")

    monkeypatch.setattr(tasks.validate, "delay", away)
    assert registry.publish("1.0.0").status_code == 201


def test_a_variant_that_another_worker_has_is_left_alone_until_its_lease_ends(
    registry: Registry, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tasks.validate, "delay", lambda _: None)
    registry.publish("1.0.0")
    Variant.objects.update(claimed_at=timezone.now(), attempts=1)
    assert services.unvalidated() == []
    assert services.validate_variant(Variant.objects.get()) is False
    Variant.objects.update(claimed_at=timezone.now() - timedelta(hours=1))
    assert services.unvalidated() == [Release.objects.get().pk]
    assert services.validate_variant(Variant.objects.get()) is True


def test_a_variant_that_kills_every_worker_is_invalid_in_the_end(registry: Registry, monkeypatch: Any) -> None:
    monkeypatch.setattr(tasks.validate, "delay", lambda _: None)
    registry.publish("1.0.0")
    Variant.objects.update(attempts=services.MAX_ATTEMPTS)
    services.validate_release(Release.objects.get().pk)
    assert registry.release("1.0.0")["state"] == "invalid"
    assert "did not live through validating it" in registry.release("1.0.0")["reason"]


def test_a_revoked_release_stays_revoked_when_validation_ends_late(registry: Registry, monkeypatch: Any) -> None:
    monkeypatch.setattr(tasks.validate, "delay", lambda _: None)
    registry.publish("1.0.0")
    release = Release.objects.get()
    assert services.revoke(release=release, reason="withdrawn")
    assert not services.revoke(release=release, reason="again")
    services.validate_release(release.pk)
    release.refresh_from_db()
    assert (release.state, release.reason) == ("revoked", "withdrawn")


# --- uploads ---


class Gated:
    """A body that pauses in the middle, so that another upload can be tried meanwhile."""

    def __init__(self, data: bytes) -> None:
        self.parts = [data[: len(data) // 2], data[len(data) // 2 :]]
        self.halfway, self.go_on = threading.Event(), threading.Event()

    def read(self, _: int) -> bytes:
        if len(self.parts) == 1:
            self.halfway.set()
            assert self.go_on.wait(30)
        return self.parts.pop(0) if self.parts else b""


@pytest.mark.django_db(transaction=True)
def test_two_uploads_of_one_file_at_once_do_not_corrupt_it(own_folder: Any) -> None:
    body, outcome = Gated(DATA), []

    def first() -> None:
        outcome.append(uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=body))

    thread = threading.Thread(target=first)
    thread.start()
    assert body.halfway.wait(30)
    with pytest.raises(Conflict) as caught:
        uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=BytesIO(DATA))
    body.go_on.set()
    thread.join(30)
    assert caught.value.code == "upload_busy"
    assert outcome == [uploads.Progress(len(DATA), complete=True)]
    assert stored() == DATA
    assert uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=BytesIO(b"ignored")).complete


def test_an_upload_whose_line_breaks_keeps_what_came(db: None, own_folder: Any) -> None:
    class Broken:
        parts = [DATA[:1000]]

        def read(self, _: int) -> bytes:
            if self.parts:
                return self.parts.pop()
            raise ConnectionResetError

    assert uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=Broken()).offset == 1000
    rest = BytesIO(DATA[1000:])
    assert uploads.receive(sha256=NAME, length=len(DATA), offset=1000, source=rest).complete
    assert stored() == DATA


def test_a_full_disk_is_not_taken_for_a_broken_line(db: None, own_folder: Any) -> None:
    class Full:
        def read(self, _: int) -> bytes:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=Full())


def test_a_crash_between_the_last_byte_and_the_store_is_mended_by_an_empty_piece(db: None, own_folder: Any) -> None:
    (own_folder / "incoming").mkdir()
    (own_folder / "incoming" / f"{NAME}.part").write_bytes(DATA)
    assert uploads.receive(sha256=NAME, length=len(DATA), offset=len(DATA), source=BytesIO()).complete


def test_an_object_that_the_store_lost_can_be_uploaded_again(db: None, own_folder: Any) -> None:
    uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=BytesIO(DATA))
    storage.delete(storage.blob_name(NAME))
    assert uploads.progress(NAME) == uploads.Progress(0, complete=False)
    assert uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=BytesIO(DATA)).complete


def test_too_many_bytes_leave_what_came_before_whole(db: None, own_folder: Any) -> None:
    uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=BytesIO(DATA[:10]))
    with pytest.raises(TooLarge):
        uploads.receive(sha256=NAME, length=len(DATA), offset=10, source=BytesIO(DATA))
    assert uploads.progress(NAME).offset == 10


def test_abandoned_uploads_are_removed_but_for_those_in_use(db: None, own_folder: Any) -> None:
    folder = own_folder / "incoming"
    folder.mkdir()
    for name in ("old", "used", "new"):
        (folder / f"{name}.part").write_bytes(b"x")
    for name in ("old", "used"):
        os.utime(folder / f"{name}.part", (0, 0))
    with (folder / "used.part").open() as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        assert uploads.remove_abandoned() == 1
    assert sorted(path.name for path in folder.iterdir()) == ["new.part", "used.part"]


def test_the_copies_of_a_killed_validation_are_removed_by_the_sweep(db: None, own_folder: Any) -> None:
    for name in ("validate-old", "validate-new", "kept"):
        folder = own_folder / "incoming" / name
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"x")
    for name in ("validate-old", "kept"):
        os.utime(own_folder / "incoming" / name, (0, 0))
    tasks.sweep()
    assert sorted(path.name for path in (own_folder / "incoming").iterdir()) == ["kept", "validate-new"]


def test_an_object_moves_across_file_systems_whole(db: None, own_folder: Any, monkeypatch: Any) -> None:
    real = type(own_folder).replace

    def across(self: Any, target: Any) -> Any:
        if self.suffix == ".part":
            raise OSError(18, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(type(own_folder), "replace", across)
    uploads.receive(sha256=NAME, length=len(DATA), offset=0, source=BytesIO(DATA))
    assert stored() == DATA
    assert list((own_folder / "incoming").iterdir()) == []
    assert [path.name for path in (own_folder / "objects" / "blobs").iterdir()] == [NAME]


def test_files_of_the_same_bytes_are_one_artifact(registry: Registry) -> None:
    registry.publish("1.0.0")
    registry.publish("1.0.1")
    assert Artifact.objects.count() == 1
    assert manifest_for("1", {"a": b""}).length == 0
