"""Rows 23, 31, 32, 36 and 38 of the attack table: swapped artifacts, redirects, names, lost metadata, wrong clocks."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from device_sdk.protocol.manifest import FileEntry, digest
from device_sdk.protocol.polls import BLOBS, POLL, Bundle
from tests.attacks.forgery import Forger, assigning, carrying, in_days, listing
from tests.attacks.world import assert_unharmed, certificate_of, device_of, proxy_to
from tests.sdk.loopback import Reply, loopback
from tests.sdk.world import manifest_of, scaling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
DAY = 86_400.0
# An honest view of a release whose artifact is attacked: the view is taken, and the manifest lies ready.
TAKEN = ("trust/view.json", "trust/floor.json", "store/manifests/")


@pytest.fixture(scope="module")
def forger(shop):
    return Forger(shop)


def test_row_23_a_swapped_blob_of_the_same_length_is_refused_and_the_partial_deleted(device):
    factor = device.shop.new_factor()
    device.shop.release(factor)

    def swap(asked, honest):
        answer = honest()
        return replace(answer, body=bytes(len(answer.body)))

    with assert_unharmed(device, volatile=TAKEN):
        device.proxy.attack(BLOBS, swap)
        device.hears_last_of(factor)
        device.refuses("hash_mismatch", polled="")
        assert list((device.home / "store" / "incoming").iterdir()) == []
    device.recovers()


def test_row_31_a_redirect_to_another_host_or_into_the_clear_is_refused(device, shop, tmp_path, monkeypatch):
    check_redirects_to_another_host(device)
    check_redirects_into_the_clear(shop, tmp_path, monkeypatch)


def check_redirects_to_another_host(device):
    with loopback() as thief:
        elsewhere = Reply(307, b"", {"Location": f"{thief.url}/anything"})
        with assert_unharmed(device):
            device.proxy.attack(POLL, elsewhere)
            device.poll()
            assert [asked.headers.get("Authorization") for asked in thief.asked] == []
            device.refuses("redirect")
        device.recovers()
        factor = device.shop.new_factor()
        device.shop.release(factor)
        with assert_unharmed(device, volatile=TAKEN):
            device.proxy.attack(BLOBS, elsewhere)
            device.hears_last_of(factor)
            device.refuses("redirect", polled="")
        assert thief.asked == []
    device.recovers()


def check_redirects_into_the_clear(shop, tmp_path, monkeypatch):
    """The attacker's proxy speaks TLS under a certificate that the device trusts, and lures it into the clear."""
    certificate = certificate_of("127.0.0.1", tmp_path)
    with proxy_to(shop.server.url, certificate) as proxy, loopback() as clear:
        monkeypatch.setenv(
            "REQUESTS_CA_BUNDLE", str(certificate)
        )  # for the enrolment here, and for the device's process
        with device_of(shop, proxy=proxy) as device:
            with assert_unharmed(device):
                proxy.attack(POLL, Reply(307, b"", {"Location": f"{clear.url}{POLL}"}))
                device.refuses("redirect")
                proxy.attack(POLL, Reply(302, b"", {"Location": proxy.url.replace("https:", "http:") + POLL}))
                assert device.poll() == "redirect"
            assert clear.asked == []
            device.recovers()


def test_row_32_names_with_dots_slashes_or_nul_are_refused(device, forger):
    honest, model = device.honest(), device.shop.model
    evil = manifest_of(f"{model}/6.6.6/default", scaling(666.0))
    outside = names_around(device)
    with assert_unharmed(device):
        for number, name in enumerate(["../../../etc", "/etc/passwd", "1\0", "..", "a/b/c"]):
            custom = {"release": f"{model}/{name}/default"}
            device.says(forger.view(honest, director=assigning(device.name, evil, custom=custom)))
            if number == 0:
                device.refuses("invalid_name")
            assert device.poll() == "invalid_name"
        for number, name in enumerate(["../../../etc/evil.onnx", "/tmp/evil.onnx", "a\0.onnx", ".."]):
            entry = FileEntry(name, 4, digest(b"evil"))
            rooted = replace(evil, files=(entry,), entry=name)
            role = forger.role(honest, listing(rooted))
            view = forger.view(honest, director=assigning(device.name, rooted), roles={model: role})
            device.says(carrying(view, rooted))
            if number == 0:
                device.refuses("bad_manifest")
            assert device.poll() == "bad_manifest"
        for name in ("../../provision.json", "/etc/passwd.json", "a\0.json", "..json"):
            device.says(Bundle({**honest.metadata, name: "{}"}, honest.manifests))
            assert device.poll() == ("malformed" if "\0" in name else "invalid_name")  # NUL does not get past JSON
    assert names_around(device) == outside
    device.recovers()


def names_around(device):
    """Every name in the device's directory and beside it, but for what comes and goes."""
    folder: Path = device.home.parent
    return {str(path) for path in folder.rglob("*") if not {"scratch", "loading"} & set(path.parts)}


def test_row_36_corrupted_or_deleted_local_metadata_heals_and_the_floor_holds(shop):
    with device_of(shop) as device:
        recorded = device.honest()
        device.recovers()
        for damage, *names in DAMAGES:
            device.stop(kill=True)
            for name in names:
                damage(device.home / "trust" / name)
            device.says(recorded)
            device.begin()
            device.start()
            with assert_unharmed(device, begins=False):  # a refusal is told once, and may have been already
                device.refuses("replayed")
            device.proxy.relent()
            assert device.poll() == ""
            assert {"view.json", "floor.json"} <= {path.name for path in (device.home / "trust").iterdir()}
        device.recovers()


def deleted(path: Path) -> None:
    path.unlink(missing_ok=True)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbled(path: Path) -> None:
    data = path.read_bytes() if path.exists() else b"{}"
    path.write_bytes(data[: len(data) // 2] + b"\0" + data[len(data) // 2 :])


DAMAGES = (
    (deleted, "floor.json"),
    (emptied, "view.json"),
    (garbled, "view.json", "roots.json"),
)


def test_row_38_a_clock_at_1970_still_installs_and_one_400_days_ahead_fails_closed(device, forger):
    device.set_clock(-time.time() + 60)
    with assert_unharmed(device):
        device.says(forger.view(device.honest(), timestamp=lambda it: setattr(it, "expires", in_days(-1))))
        device.refuses("expired")
    device.recovers()
    device.set_clock(400 * DAY)
    with assert_unharmed(device):
        device.shop.roll_out(device.shop.new_factor())
        device.refuses("expired")
        device.logs("by this device's clock")
    device.set_clock(0)
    device.recovers()
