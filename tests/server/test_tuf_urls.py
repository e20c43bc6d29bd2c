"""Stock TUF clients read a device's view by plain addresses; devices fetch files with ranges."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import Updater

from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.manifest import Manifest
from fleet.api import blobs, composition
from fleet.devices import credentials
from fleet.devices.models import Device
from fleet.releases.models import Release
from fleet.trust import keystore, selectors
from tests.registry import (
    MODEL,
    Registry,
    assignment_of,
    make_device,
    manifest_for,
    onnx_model,
    publish_token,
    set_up_trust,
)

DATA = onnx_model()
NAME = sha256(DATA).hexdigest()


@pytest.fixture
def assigned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let every device be assigned this, whatever rollouts there are."""

    def assign(item: Assignment) -> None:
        monkeypatch.setattr(composition, "assignments", lambda _device: [item])

    return assign


def stock_client(address: str, device: Device, folder: Path, key: str = "") -> Updater:
    """`tuf.ngclient` as it is: no fetcher and no configuration of ours."""
    base = f"{address}/tuf/{device.name}/{key or credentials.view_key(device)}"
    (folder / "targets").mkdir(parents=True, exist_ok=True)
    root = selectors.newest("root")
    assert root is not None
    first = selectors.RoleMetadata.objects.get(role="root", version=1).content
    return Updater(
        str(folder), f"{base}/metadata/", str(folder / "targets"), f"{base}/targets/", bootstrap=first.encode()
    )


@pytest.mark.django_db(transaction=True)
def test_a_stock_client_finds_the_assignment_and_fetches_the_release(
    live_server: Any, client: Client, own_folder: Path, assigned: Any, django_capture_on_commit_callbacks: Any
) -> None:
    registry = Registry(client, set_up_trust(), publish_token(MODEL), django_capture_on_commit_callbacks)
    assert registry.publish("1.0.0").status_code == 201
    manifest = manifest_for("1.0.0", {"model.onnx": DATA})
    device = make_device()
    assigned(assignment_of(manifest))
    keystore.renew(keystore.at(None), "root")  # the client starts from root version 1

    updater = stock_client(live_server.url, device, own_folder / "client")
    entry = updater.get_targetinfo(f"assign/{device.name}/{MODEL}")
    assert entry is not None
    assignment = Assignment.parse(MODEL, entry.length, entry.hashes["sha256"], entry.custom)
    assert str(assignment.release) == "digits/1.0.0/default"
    release = updater.get_targetinfo(str(assignment.release))
    assert release is not None
    assert (release.length, release.hashes) == (entry.length, entry.hashes)
    fetched = Path(updater.download_target(release)).read_bytes()
    assert Manifest.parse(fetched) == manifest

    registry.publish("1.1.0", {"model.onnx": onnx_model(3.0)})
    again = stock_client(live_server.url, device, own_folder / "client")
    assert again.get_targetinfo("digits/1.1.0/default") is not None
    assert again.get_targetinfo("digits/9/default") is None


@pytest.mark.django_db(transaction=True)
def test_a_stock_client_with_another_devices_key_gets_nothing(
    live_server: Any, own_folder: Path, assigned: Any
) -> None:
    set_up_trust()
    device, other = make_device(), make_device("cam-2")
    assigned(Assignment(MODEL))
    updater = stock_client(live_server.url, device, own_folder / "client", credentials.view_key(other))
    with pytest.raises(DownloadHTTPError):
        updater.refresh()


class View:
    """Plain addresses of one device."""

    def __init__(self, client: Client, device: Device) -> None:
        self.client, self.device = client, device

    def get(self, where: str, *, key: str = "", name: str = "") -> Any:
        key = key or credentials.view_key(self.device)
        return self.client.get(f"/tuf/{name or self.device.name}/{key}/{where}")


@pytest.fixture
def view(registry: Registry, assigned: Any) -> View:
    registry.publish("1.0.0")
    assigned(assignment_of(manifest_for("1.0.0", {"model.onnx": DATA})))
    return View(registry.client, make_device())


def target_of(version: str = "1.0.0", variant: str = "default", sha: str = "") -> str:
    sha = sha or assignment_of(manifest_for("1.0.0", {"model.onnx": DATA})).sha256
    return f"targets/{MODEL}/{version}/{sha}.{variant}"


def test_only_the_key_of_the_device_opens_its_view(view: View) -> None:
    assert view.get("metadata/timestamp.json").status_code == 200
    assert view.get(target_of()).status_code == 200
    make_device("cam-2")
    for answer in (
        view.get("metadata/timestamp.json", key="x" * 32),
        view.get(target_of(), key="x" * 32),
        view.get("metadata/timestamp.json", name="cam-2"),
        view.get("metadata/timestamp.json", name="nobody"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_revoked_device_has_no_view(view: View) -> None:
    Device.objects.update(state=Device.State.REVOKED)
    assert view.get("metadata/timestamp.json").status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        "root.json",
        "9.root.json",
        "1.director.json",
        "x.json",
        "1.json",
        ".json",
        "²3.root.json",
        "1.root",
        "1." + "9" * 40 + ".json",
    ],
)
def test_metadata_that_is_not_there_is_404(view: View, name: str) -> None:
    answer = view.get(f"metadata/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_metadata")


@pytest.mark.parametrize(
    "where",
    [
        target_of(version="2"),
        target_of(variant="x"),
        target_of(sha="0" * 64),
        target_of(variant=".."),
        target_of(sha="zz"),
    ],
)
def test_targets_that_are_not_there_are_404(view: View, where: str) -> None:
    answer = view.get(where)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_target")


def test_manifests_of_a_model_that_the_device_has_not_are_404(view: View) -> None:
    Device.objects.update(model_names=["other"])
    assert view.get(target_of()).status_code == 404


# --- files ---


class Files:
    def __init__(self, client: Client, device: Device) -> None:
        self.client, self.device = client, device

    def get(self, name: str = NAME, method: str = "GET", **headers: str) -> Any:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        credential = {"Authorization": f"Bearer {credentials.credential_for(self.device)}"}
        return self.client.generic(method, f"/api/device/v1/blobs/{name}", headers={**credential, **named})


@pytest.fixture
def files(registry: Registry) -> Files:
    registry.publish("1.0.0")
    return Files(registry.client, make_device())


def body(answer: Any) -> bytes:
    content: bytes = answer.getvalue() if answer.streaming else answer.content
    answer.close()
    return content


def test_a_device_fetches_a_file_whole(files: Files) -> None:
    answer = files.get()
    assert (answer.status_code, answer["Accept-Ranges"], answer["Content-Length"]) == (200, "bytes", str(len(DATA)))
    assert body(answer) == DATA


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=20-", 20, None),
        ("bytes=-7", -7, None),
        ("bytes=5-5", 5, 6),
        ("bytes=9-99999999", 9, None),
    ],
)
def test_a_range_is_answered_206(files: Files, asked: str, start: int, end: int | None) -> None:
    answer = files.get(Range=asked)
    wanted = DATA[start:end]
    first = start % len(DATA)
    assert answer.status_code == 206
    assert answer["Content-Range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(DATA)}"
    assert int(answer["Content-Length"]) == len(wanted)
    assert body(answer) == wanted


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_a_range_beyond_the_file_is_416(files: Files, asked: str) -> None:
    answer = files.get(Range=asked)
    assert (answer.status_code, answer["Content-Range"]) == (416, f"bytes */{len(DATA)}")


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "bytes=-", "bytes=9-3", "lines=1-2", "bytes=a-b", "bytes=0x1-", "bytes=٣-"]
)
def test_a_range_that_we_do_not_speak_is_answered_by_the_whole(files: Files, asked: str) -> None:
    answer = files.get(Range=asked)
    assert (answer.status_code, body(answer)) == (200, DATA)


def test_a_range_of_another_file_version_is_answered_by_the_whole(files: Files) -> None:
    assert body(files.get(Range="bytes=0-9", If_Range=f'"{NAME}"')) == DATA[:10]
    assert body(files.get(Range="bytes=0-9", If_Range='"other"')) == DATA


def test_head_says_how_long_it_is_and_sends_nothing(files: Files) -> None:
    answer = files.get(method="HEAD")
    assert (answer.status_code, answer["Content-Length"], answer.content) == (200, str(len(DATA)), b"")


def test_a_response_that_nobody_reads_closes_its_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = blobs.storage.open_object
    monkeypatch.setattr(blobs.storage, "open_object", lambda name: opened.append(real(name)) or opened[-1])
    files.get().close()
    assert opened[0].closed


def test_a_device_without_a_credential_is_401(files: Files) -> None:
    answer = files.client.get(f"/api/device/v1/blobs/{NAME}")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


@pytest.mark.parametrize("state", ["revoked", "invalid", "validating"])
def test_files_of_releases_that_are_not_valid_are_404(files: Files, state: str) -> None:
    Release.objects.update(state=state)
    answer = files.get()
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_blob")


def test_files_of_other_models_are_404(files: Files) -> None:
    Device.objects.update(model_names=["other"])
    assert files.get().status_code == 404
    assert files.get("0" * 64).status_code == 404


@pytest.mark.parametrize("name", ["x", "A" * 64, "..%2f..%2fetc%2fpasswd"])
def test_a_name_that_is_no_hash_is_refused(files: Files, name: str) -> None:
    assert files.get(name).status_code in {400, 404}


def test_a_file_that_the_store_lost_is_503(files: Files, own_folder: Path) -> None:
    (own_folder / "objects" / "blobs" / NAME).unlink()
    answer = files.get()
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_away")


def test_files_in_s3_are_answered_by_a_redirect(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs.storage, "is_local", lambda: False)
    monkeypatch.setattr(blobs.storage, "presigned_get", lambda name: f"https://s3.example/{name}?sig=1")
    answer = files.get(Range="bytes=0-9")
    assert (answer.status_code, answer["Location"]) == (307, f"https://s3.example/blobs/{NAME}?sig=1")


@given(
    header=st.text(max_size=40) | st.from_regex(r"bytes=\d{0,20}-\d{0,20}", fullmatch=True),
    length=st.integers(0, 2**40),
)
def test_a_parsed_range_lies_within_the_file(header: str, length: int) -> None:
    try:
        part = blobs.parse_range(header, length)
    except blobs.UnsatisfiableError:
        return
    assert part is None or 0 <= part[0] < part[1] <= length
