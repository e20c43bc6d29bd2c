"""What is planted in a device's directory holds up nobody, is not written through, and stops no inference."""

import os

import pytest

from device_sdk.config import read_plainly
from device_sdk.errors import DeviceError, SetupError
from device_sdk.outbox import Outbox
from tests.sdk.world import World, answer, prove, scaling

pytestmark = pytest.mark.timeout(20)  # a pipe that nobody writes to would wait for ever
OURS = [
    "progress.json",
    "outbox/events.jsonl",
    "trust/view.json",
    "trust/floor.json",
    "store/state.json",
    "store/hashed.json",
]


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path / "device")
    world.committed("detector/1.0.0/default", scaling(2)).stop()
    return world


def plant(path, by, elsewhere):
    path.unlink()
    os.mkfifo(path) if by == "pipe" else path.symlink_to(elsewhere)


@pytest.mark.parametrize("by", ["pipe", "link"])
@pytest.mark.parametrize("name", OURS)
def test_a_device_starts_and_updates_whatever_stands_for_one_of_its_files(world, tmp_path, name, by):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"nobody's")
    plant(world.path / name, by, elsewhere)
    with world.open() as fleet:
        assert answer(fleet) == 2.0
        world.server.assign(world.server.publish("detector/1.1.0/default", scaling(5)))
        fleet.update_once()
        prove(fleet)
        assert answer(fleet) == 5.0
    assert elsewhere.read_bytes() == b"nobody's"
    assert (world.path / name).is_file()
    assert not (world.path / name).is_symlink()


@pytest.mark.parametrize("name", ["provision.json", "identity.json", "lock"])
def test_a_pipe_in_the_place_of_what_the_device_is_is_refused_and_not_waited_for(world, name):
    plant(world.path / name, "pipe", None)
    if name == "lock":
        with world.open() as fleet:
            assert answer(fleet) == 2.0
        return
    with pytest.raises(SetupError, match="not a regular file"):
        world.open()


def test_a_provision_that_is_mounted_as_a_link_is_read(world, tmp_path):
    mounted = tmp_path / "mounted.json"
    (world.path / "provision.json").rename(mounted)
    (world.path / "provision.json").symlink_to(mounted)
    with world.open() as fleet:
        assert answer(fleet) == 2.0


@pytest.mark.parametrize("name", ["trust", "store", "outbox", "store/blobs", "lock"])
def test_a_link_in_the_place_of_what_is_believed_is_refused(world, name):
    path = world.path / name
    path.rename(path.with_name("away"))
    path.symlink_to("away")
    with pytest.raises(DeviceError):
        world.open()


def test_an_outbox_that_cannot_be_read_loses_its_events_and_not_the_device(tmp_path, caplog):
    (tmp_path / "events.jsonl").mkdir()
    assert len(Outbox(tmp_path)) == 0
    assert "was lost" in caplog.text


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_plainly(path, limit=5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_plainly(path, limit=4)


def test_what_was_installed_and_is_damaged_is_named_and_the_release_before_serves(world):
    with world.open() as fleet:
        world.server.assign(world.server.publish("detector/1.1.0/default", scaling(5)))
        fleet.update_once()
        prove(fleet)
        files = fleet._store.manifest(fleet._store.state("detector").active).files
    blob = world.path / "store" / "blobs" / files[0].sha256
    blob.write_bytes(scaling(6))
    with world.open() as fleet:
        assert answer(fleet) == 2.0
        fleet.update_once()
        assert answer(fleet) == 5.0
    assert ("refused", "damaged") in [(event.kind, event.reason) for event in world.server.events]
