"""Rows 33, 34, 35 and 37 of the attack table: what is planted or changed on the disk, power cuts, and a full disk."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from device_sdk.protocol.manifest import digest
from device_sdk.protocol.polls import BLOBS
from tests.attacks.test_rows_24_to_28 import TAKEN, heavy, partial, shows
from tests.attacks.world import assert_unharmed, attacked, device_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
STRANGE = b"not to be read, nor written to"


def replaced(path: Path, *, by: str, where: Path) -> None:
    if path.is_dir():
        path.rename(path.with_name(f"{path.name}.away"))
        path.symlink_to(f"{path.name}.away")
        return
    path.unlink(missing_ok=True)
    os.mkfifo(path) if by == "pipe" else path.symlink_to(where)


def test_row_33_links_and_pipes_planted_in_the_model_directory_are_refused(shop, tmp_path):
    with device_of(shop) as device:
        factor = shop.new_factor()
        data = heavy(factor)
        shop.release(factor, data)
        store, sha = device.home / "store", digest(data)
        victim, evil = tmp_path / "victim", tmp_path / "evil"
        victim.write_bytes(STRANGE)
        evil.write_bytes(bytes(len(data)))
        device.catches_up()  # the new release stands in every view
        with assert_unharmed(device, volatile=("store/blobs", "store/incoming", "store/.state")):
            (store / "incoming" / f"{sha}.part").symlink_to(victim)
            (store / "blobs" / sha).symlink_to(evil)
            (store / ".state.json.tmp").symlink_to(victim)
            assert device.poll() == ""
        shop.roll_out(factor)
        device.runs(factor)  # what was planted is in nobody's way
        assert victim.read_bytes() == STRANGE
        assert (store / "blobs" / sha).read_bytes() == data
        assert not (store / "blobs" / sha).is_symlink()

        device.stop()
        other = tmp_path / "other"
        other.write_bytes(heavy(66.0))
        for by in ("link", "pipe"):
            replaced(store / "blobs" / sha, by=by, where=other)
            device.begin()
            device.start()
            assert device.facts().answer == 2.0  # the release before it
            device.logs("refused (damaged)")
            device.retry()
            shows(device, "damaged")
            device.runs(factor)  # fetched again
            device.stop()
        for name in ("progress.json", "outbox/events.jsonl", "trust/view.json", "trust/floor.json"):
            for by in ("link", "pipe"):
                replaced(device.home / name, by=by, where=victim)
        device.start()
        assert device.facts().answer in {2.0, factor}
        assert victim.read_bytes() == STRANGE
        device.stop()

        for name in ("trust", "store", "store/blobs"):
            folder = device.home / name
            replaced(folder, by="link", where=folder)
            said = device_ends(device)
            assert "expected a directory of our own, not a link" in said
            folder.unlink()
            folder.with_name(f"{folder.name}.away").rename(folder)
        device.start()
        device.recovers(3.0)


def device_ends(device) -> str:
    """A start that is refused: what the process said."""
    command = [sys.executable, "-m", "tests.attacks.host", str(device.home), device.shop.model]
    done = subprocess.run(
        command, cwd=attacked(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    return done.stderr


def test_row_34_a_blob_that_is_changed_after_it_was_verified_is_never_loaded(shop):
    with device_of(shop) as device:
        factor = shop.new_factor()
        data = heavy(factor)
        shop.release(factor, data)
        shop.roll_out(factor)
        device.runs(factor)
        blob = device.home / "store" / "blobs" / digest(data)
        evil = heavy(66.0)[: len(data)].ljust(len(data), b"\0")
        with assert_unharmed(device, volatile=("store/blobs/",)):
            change(blob, evil)  # under the running process
            assert device.poll() == ""
        device.stop()
        device.begin()
        device.start()
        assert device.facts().answer == 2.0
        device.logs("refused (damaged)")
        device.retry()
        shows(device, "damaged")
        device.runs(factor)
        assert blob.read_bytes() == data


def change(path: Path, data: bytes) -> None:
    """In place, and with the times that it had."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_row_35_a_power_cut_at_each_step_leaves_the_old_or_the_new(shop):
    with device_of(shop) as device:
        old = device.active()
        factor = shop.new_factor()
        shop.release(factor)
        device.stop()
        shop.roll_out(factor)
        done = subprocess.run(
            [sys.executable, "-m", "tests.survival.lives", str(device.home), shop.model, "2"],
            cwd=attacked(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        *found, end = [json.loads(line) for line in done.stdout.splitlines()]
        assert end["over"] == 2 * len(found) > 60  # every other doing; `make drill` tries all
        for each in found:
            assert each["whole"], each
            assert each["answer"] in {2.0, factor}, each
            assert (each["after"], each["state"]) == (factor, "committed"), each
            assert each["answer"] == factor or not each["committed"], each  # what was acknowledged survives
        answers = [each["answer"] for each in found]
        assert answers == sorted(answers, key=[2.0, factor].index)  # from one step on, the new
        assert {2.0, factor} == set(answers)
        assert {each["active"] for each in found} > {old}
        device.start()
        device.runs(factor)
        assert f"{factor:.0f}.0.0/default" in device.page()


def test_row_37_a_disk_that_is_full_in_mid_download_leaves_the_old_model_serving(shop):
    with device_of(shop) as device:
        factor = shop.new_factor()
        data = heavy(factor)
        shop.release(factor, data)
        no_limit = resource.prlimit(device.pid, resource.RLIMIT_FSIZE)
        with assert_unharmed(device, volatile=TAKEN):
            resource.prlimit(device.pid, resource.RLIMIT_FSIZE, (400_000, no_limit[1]))  # the kernel refuses the rest
            shop.roll_out(factor)
            assert device.poll() == ""
            device.logs("cannot write")
            shows(device, "disk: disk_full")
            assert partial(device, data) == 400_000
            device.retry()
            assert partial(device, data) == 400_000
        resource.prlimit(device.pid, resource.RLIMIT_FSIZE, no_limit)
        device.retry()
        asked = [each.headers.get("Range") for each in device.proxy.asked if each.path == BLOBS + digest(data)]
        assert asked[-1] == "bytes=400000-"
        device.runs(factor)
