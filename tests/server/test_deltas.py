"""Patches as the server makes them: what they save, that they are right, who is offered them, and what goes wrong."""

import json
import subprocess
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import onnx
import pytest
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_sdk.protocol.patches.frames import NOTHING, Kind
from device_sdk.protocol.patches.offers import parse_offers
from fleet.devices import credentials
from fleet.releases import services, storage, tasks, validation
from fleet.releases.deltas import layout
from fleet.releases.deltas import services as deltas
from fleet.releases.models import Artifact, Patch, Release
from tests.deltas import applied, external, model, moved, patched, sha, weights
from tests.fleet_world import running, running_set
from tests.registry import MODEL, Registry, make_device

BASE = weights()
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def share(patch: bytes, target: bytes) -> float:
    """Percent of the full file."""
    return 100 * len(patch) / len(target)


# --- what they save ---


def test_metadata_alone_costs_next_to_nothing(tmp_path: Any) -> None:
    target = model(BASE, commit="abc", data="set 7")
    assert len(patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": target})) < 500


def test_a_new_last_layer_costs_that_layer(tmp_path: Any) -> None:
    changed = {**BASE, "w2": weights(5)["w2"]}
    patch = patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": model(changed)})
    assert share(patch, model(changed)) < 100 / 3


def test_a_small_step_of_all_weights_costs_their_low_bytes(tmp_path: Any) -> None:
    target = model(moved(BASE, 1e-7))
    assert share(patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": target}), target) < 35


def test_renamed_and_reordered_tensors_are_found_again(tmp_path: Any) -> None:
    target = model({f"renamed.{name}": value for name, value in reversed(BASE.items())})
    assert len(patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": target})) < 2_000


def test_names_that_moved_to_other_tensors_do_not_mislead(tmp_path: Any) -> None:
    """Exporters number their tensors: one more at the front, and every name means another."""
    target = model({"w0": BASE["w1"], "w1": BASE["w2"], "w2": BASE["w0"]})
    assert len(patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": target})) < 2_000


def test_float16_is_computed_from_the_float32_that_is_there(tmp_path: Any) -> None:
    target = model({name: value.astype(np.float16) for name, value in BASE.items()})
    assert share(patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": target}), target) < 2


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_int8_is_computed_from_the_float32_that_is_there(tmp_path: Any, axis: int | None) -> None:
    changed = dict[str, np.ndarray]()
    for name in ("w0", "w1", "w2"):
        over = None if axis is None else 1 - axis
        scale = np.abs(BASE[name]).max(axis=over, keepdims=axis is not None) / np.float32(127)
        changed[f"{name}_quantized"] = np.clip(np.rint(BASE[name] / scale), -127, 127).astype(np.int8)
        changed[f"{name}_scale"] = np.asarray(scale).reshape(-1)
    target = model(changed)
    assert share(patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": target}), target) < 10


def test_asymmetric_uint8_is_computed_too(tmp_path: Any) -> None:
    low, high = BASE["w0"].min(), BASE["w0"].max()
    scale = (high - low) / np.float32(255)
    zero = np.rint(-low / scale)
    values = np.clip(np.rint(BASE["w0"] / scale) + zero, 0, 255).astype(np.uint8)
    target = model({"w0_quantized": values, "w0_scale": np.asarray([scale], np.float32)})
    assert share(patched(tmp_path, {"model.onnx": model(BASE)}, {"model.onnx": target}), target) < 5


def test_int8_against_int8_costs_what_changed(tmp_path: Any) -> None:
    old = {"w": (BASE["w0"] * 100).astype(np.int8)}
    new = {"w": old["w"].copy()}
    new["w"][::9, ::9] += 1
    target = model(new)
    assert share(patched(tmp_path, {"model.onnx": model(old)}, {"model.onnx": target}), target) < 8


def test_few_small_differences_cost_little_more_than_what_is_in_them(tmp_path: Any) -> None:
    """One weight in eight moves by one: 0.67 bits a weight. Codes for whole bytes take one bit at the least."""
    random = np.random.default_rng(4)
    old = random.integers(-100, 100, 300_000, np.int8)
    new = old + (random.random(old.size) < 1 / 8) * random.choice(np.array([-1, 1], np.int8), old.size)
    target = model({"w": new})
    assert share(patched(tmp_path, {"model.onnx": model({"w": old})}, {"model.onnx": target}), target) < 9


def test_a_full_float32_download_is_less_in_planes(tmp_path: Any) -> None:
    target = model(BASE)
    assert share(patched(tmp_path, None, {"model.onnx": target}), target) < 86


def test_external_data_has_tensors_too(tmp_path: Any) -> None:
    old, new = external(BASE), external(moved(BASE, 1e-7))
    patch = patched(tmp_path, old, new, "model.onnx.data")
    assert share(patch, new["model.onnx.data"]) < 35


def test_files_that_are_no_models_are_patched_where_bytes_repeat(tmp_path: Any) -> None:
    old = np.random.default_rng(3).bytes(200_000)
    new = old[:70_000] + b"inserted" + old[70_000:]
    assert len(patched(tmp_path, {"a.bin": old}, {"a.bin": new}, "a.bin")) < 1_000


# --- that they are right ---


@QUICK
@given(data=st.data())
def test_whatever_the_arrays_the_patch_gives_the_target(tmp_path: Any, data: Any) -> None:
    """`patched` compares bit by bit; infinities, NaN and both zeros among the values."""
    kind = data.draw(st.sampled_from(["f4", "f2", "f8", "i1", "u1", "i2", "i4", "i8"]))
    count = data.draw(st.integers(1, 3_000))
    seed = data.draw(st.integers(0, 2**32))
    random = np.random.default_rng(seed)
    width = np.dtype(kind).itemsize
    old = np.frombuffer(random.bytes(count * width), kind)
    new = old.copy()
    places = random.integers(0, count, data.draw(st.integers(0, count)))
    new[places] = np.frombuffer(random.bytes(len(places) * width), kind)
    files = ({"model.onnx": model({"w": old})}, {"model.onnx": model({"w": new})})
    assert patched(tmp_path, *files)


@QUICK
@given(old=st.binary(max_size=5_000), new=st.binary(max_size=5_000), cut=st.integers(0, 5_000))
def test_whatever_the_bytes_the_patch_gives_the_target(tmp_path: Any, old: bytes, new: bytes, cut: int) -> None:
    target = old[cut:] + new + old[:cut]
    assert patched(tmp_path, {"a": old}, {"a": target}, "a") or not target


def test_special_floats_keep_their_bits_when_converted(tmp_path: Any) -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38, 65504, 65520, 6e-8] * 200, np.float32)
    with np.errstate(all="ignore"):
        half = special.astype(np.float16)
    half[::7] = 1.5  # and some that no conversion gives
    assert patched(tmp_path, {"model.onnx": model({"w": special})}, {"model.onnx": model({"w": half})})


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_a_model_that_does_not_parse_has_no_tensors_or_right_ones(tmp_path: Any, cut: int) -> None:
    whole = model(BASE)
    (tmp_path / "model.onnx").write_bytes(whole[:cut] + bytes([whole[cut] ^ 0x5A]) + whole[cut + 1 :])
    for tensor in layout.tensors(tmp_path):
        assert 0 <= tensor.offset <= tensor.end <= len(whole)


def test_the_layout_is_what_onnx_reads(tmp_path: Any) -> None:
    (tmp_path / "model.onnx").write_bytes(model(BASE))
    found = {tensor.name: tensor for tensor in layout.tensors(tmp_path)}
    read = onnx.load(tmp_path / "model.onnx")
    for tensor in read.graph.initializer:
        at = found[tensor.name]
        assert (tmp_path / "model.onnx").read_bytes()[at.offset : at.end] == tensor.raw_data
        assert (at.kind, at.shape) == (Kind.F32, tuple(tensor.dims))


# --- orders ---


def publish(registry: Registry, version: str, tensors: Any, **meta: str) -> bytes:
    data = model(tensors, **meta)
    with registry.run_on_commit(execute=True):
        assert registry.publish(version, {"model.onnx": data}).status_code == 201
    assert registry.release(version)["state"] == "valid"
    return data


def make_all() -> None:
    while due := deltas.undone():
        for pk in due:
            tasks.make_patch(pk)


def states() -> dict[str, str]:
    return {patch.base_sha256: patch.state for patch in Patch.objects.all()}


def test_a_valid_release_gets_patches_from_the_one_before_and_from_nothing(registry: Registry) -> None:
    old = publish(registry, "1.0.0", BASE)
    new = publish(registry, "1.1.0", moved(BASE, 1e-7))
    make_all()
    patch = Patch.objects.get(base_sha256=sha(old))
    assert patch.state == Patch.State.READY
    assert patch.target_id == sha(new)
    assert patch.artifact is not None
    with storage.open_object(storage.blob_name(patch.artifact.sha256)) as file:
        content = file.read()
    assert (sha(content), len(content)) == (patch.artifact.sha256, patch.artifact.length)
    assert applied(content, old, new) == new
    assert Patch.objects.filter(base_sha256=NOTHING, state=Patch.State.READY).count() == 2
    assert patch.decode_seconds is not None


@pytest.fixture
def idle(monkeypatch: Any) -> None:
    """No worker hears of orders."""
    monkeypatch.setattr(tasks.make_patch, "delay", lambda pk: None)


@pytest.mark.usefixtures("idle")
def test_orders_are_given_once(registry: Registry) -> None:
    publish(registry, "1.0.0", BASE)
    publish(registry, "1.1.0", moved(BASE))
    count = Patch.objects.count()
    assert deltas.order(release=Release.objects.get(version="1.1.0")) == 0
    assert Patch.objects.count() == count == 3


@pytest.mark.usefixtures("idle")
def test_what_devices_run_is_a_base_however_old_once_a_rollout_starts(registry: Registry, monkeypatch: Any) -> None:
    monkeypatch.setattr(deltas, "PREVIOUS", 1)
    ancient = publish(registry, "1.0.0", BASE)
    for number in (1, 2):
        publish(registry, f"1.{number}.0", moved(BASE, seed=number))
    latest = Release.objects.get(version="1.2.0")
    assert not Patch.objects.filter(base_sha256=sha(ancient), variant__release=latest).exists()
    device = make_device()
    device.runs = running_set({MODEL: "1.0.0/default"})
    device.save()
    running(latest)
    assert Patch.objects.filter(base_sha256=sha(ancient), variant__release=latest).exists()
    assert deltas.order(release=latest) == 0


def test_small_files_and_a_server_that_makes_none_order_nothing(registry: Registry, settings: Any) -> None:
    registry.publish("1.0.0")
    settings.PATCH_SECONDS = 0
    publish(registry, "1.1.0", BASE)
    assert not Patch.objects.exists()


def test_another_network_altogether_is_not_worth_a_patch(registry: Registry) -> None:
    old = publish(registry, "1.0.0", BASE)
    publish(registry, "2.0.0", {name: value * 3 for name, value in weights(9).items()})
    make_all()
    assert states()[sha(old)] == Patch.State.USELESS


# --- what goes wrong ---


def test_the_sweep_finds_an_order_whose_message_was_lost(registry: Registry, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks.make_patch, "delay", lambda pk: None)
        publish(registry, "1.0.0", BASE)
    assert states() == {NOTHING: Patch.State.PENDING}
    tasks.sweep()
    make_all()
    assert states() == {NOTHING: Patch.State.READY}


@pytest.fixture
def ordered(registry: Registry, idle: None) -> Patch:
    """One patch that nobody has begun."""
    publish(registry, "1.0.0", BASE)
    return Patch.objects.get()


def test_two_workers_do_not_make_the_same_patch(ordered: Patch) -> None:
    Patch.objects.update(claimed_at=timezone.now())
    assert deltas.make(ordered.pk) is False
    assert deltas.undone() == []
    Patch.objects.update(claimed_at=timezone.now() - timedelta(days=1))
    assert deltas.undone() == [ordered.pk]
    assert deltas.make(ordered.pk) is True
    assert deltas.make(ordered.pk) is False


def test_one_patch_is_made_at_a_time_and_calls_for_the_next(
    ordered: Patch, registry: Registry, monkeypatch: Any
) -> None:
    publish(registry, "1.1.0", moved(BASE))
    Patch.objects.filter(pk=ordered.pk).update(claimed_at=timezone.now())
    others = deltas.undone()
    assert [deltas.make(pk) for pk in others] == [False, False]
    Patch.objects.filter(pk=ordered.pk).update(claimed_at=None)
    called: list[int] = []
    monkeypatch.setattr(tasks.make_patch, "delay", called.append)
    tasks.make_patch(ordered.pk)
    assert called == others[:1]


def test_a_store_that_is_away_puts_it_off(ordered: Patch, monkeypatch: Any) -> None:
    def away(*_: Any) -> None:
        raise validation.StorageAwayError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(validation, "lay_out", away)
        assert deltas.make(ordered.pk) is False
    ordered.refresh_from_db()
    assert (ordered.state, ordered.attempts, ordered.claimed_at) == (Patch.State.PENDING, 0, None)
    assert deltas.make(ordered.pk) is True


def test_what_kills_the_worker_is_given_up(ordered: Patch) -> None:
    Patch.objects.update(attempts=deltas.MAX_ATTEMPTS)
    assert deltas.make(ordered.pk) is True
    ordered.refresh_from_db()
    assert ordered.state == Patch.State.FAILED
    assert "did not live through" in ordered.reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with code -11"),
        ('print(\'{"error": "it is odd"}\')', "it is odd"),
        ("while True: pass", "was not made within"),
    ],
)
def test_a_maker_that_fails_is_an_answer(
    ordered: Patch, script: str, reason: str, monkeypatch: Any, tmp_path: Any, settings: Any
) -> None:
    settings.PATCH_SECONDS = 1
    (tmp_path / "maker.py").write_text(script)
    monkeypatch.setattr(deltas, "MAKER", tmp_path / "maker.py")
    assert deltas.make(ordered.pk) is True
    ordered.refresh_from_db()
    assert ordered.state == Patch.State.FAILED
    assert reason in ordered.reason
    assert list(settings.INCOMING.glob("patch-*")) == []


def test_the_maker_stays_within_its_memory(ordered: Patch, settings: Any) -> None:
    settings.VALIDATION_MEMORY = 64 * 1024**2
    assert deltas.make(ordered.pk) is True
    ordered.refresh_from_db()
    assert ordered.state == Patch.State.FAILED
    assert ordered.artifact is None


def test_the_maker_imports_neither_django_nor_settings() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); import fleet.releases.deltas.encoder, fleet.releases.deltas.maker; "
        "print('django.conf' in sys.modules and __import__('django.conf').conf.settings.configured)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- who is offered them ---


def ask(registry: Registry, device: Any, path: str) -> Any:
    return registry.client.get(
        f"/api/device/v1/blobs/{path}", headers={"Authorization": f"Bearer {credentials.credential_for(device)}"}
    )


def test_a_device_is_offered_patches_to_its_models_and_may_fetch_them(registry: Registry) -> None:
    old = publish(registry, "1.0.0", BASE)
    new = publish(registry, "1.1.0", moved(BASE, 1e-7))
    make_all()
    device = make_device()
    offers = parse_offers(ask(registry, device, f"{sha(new)}/patches").content)
    assert [offer.base for offer in offers] == [sha(old), NOTHING]
    answer = ask(registry, device, offers[0].sha256)
    content = b"".join(answer.streaming_content)
    assert applied(content, old, new) == new
    stranger = make_device("cam-2", models=("other",))
    assert ask(registry, stranger, f"{sha(new)}/patches").status_code == 404
    assert ask(registry, stranger, offers[0].sha256).status_code == 404


def test_people_see_on_the_release_what_its_patches_save(registry: Registry, admin_client: Any) -> None:
    publish(registry, "1.0.0", BASE)
    publish(registry, "1.1.0", moved(BASE, 1e-7))
    make_all()
    release = Release.objects.get(version="1.1.0")
    page = admin_client.get(f"/admin/releases/release/{release.pk}/change/").content.decode()
    patch = Patch.objects.get(base_variant__isnull=False)
    assert patch.artifact is not None
    assert "1.0.0/default" in page
    assert f"{1 - patch.artifact.length / patch.target.length:.1%}" in page


def test_patches_of_a_revoked_release_are_gone(registry: Registry) -> None:
    new = publish(registry, "1.0.0", BASE)
    make_all()
    device = make_device()
    (offer,) = parse_offers(ask(registry, device, f"{sha(new)}/patches").content)
    services.revoke(release=Release.objects.get(), reason="bad")
    assert ask(registry, device, f"{sha(new)}/patches").status_code == 404
    assert ask(registry, device, offer.sha256).status_code == 404


def test_a_patch_is_no_file_that_ci_can_release_by_accident(registry: Registry) -> None:
    publish(registry, "1.0.0", BASE)
    make_all()
    patch = Patch.objects.get()
    assert Artifact.objects.get(pk=patch.artifact_id).variants.count() == 0
    assert json.loads(registry.call("GET", f"/models/{MODEL}/releases/1.0.0").content)["variants"].keys() == {"default"}
