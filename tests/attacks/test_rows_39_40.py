"""Rows 39 and 40 of the attack table: rightly signed ONNX that is broken, or made to do harm. CI's key is stolen.

The server would refuse most of these at the upload, so they come past it: in views that are forged with both keys.
"""

from collections.abc import Mapping

import pytest

from device_sdk.protocol import limits
from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.polls import BLOBS
from tests.attacks.forgery import Forger, assigning, carrying, listing, part
from tests.attacks.test_rows_24_to_28 import OCTETS, TAKEN, peak_memory, shows
from tests.attacks.world import assert_unharmed, device_of
from tests.sdk import bombs
from tests.sdk.loopback import Reply
from tests.sdk.world import INPUTS, scaling, unknown_operator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
Files = Mapping[str, bytes]
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"


def impose(device, releases: Mapping[str, Files]):
    """Sign all of these, and hand them to the device in turn. Yields the name of each once the device has looked."""
    forger, honest = Forger(device.shop), device.honest()
    manifests = {
        name: manifest(f"{device.shop.model}/66.{number}.0/default", files)
        for number, (name, files) in enumerate(releases.items())
    }
    role = forger.role(honest, lambda signed: [listing(each)(signed) for each in manifests.values()])
    version = part(honest, "timestamp").signed.version
    for files in releases.values():
        for data in files.values():
            device.proxy.attack(BLOBS + digest(data), Reply(200, data, OCTETS))
    for number, (name, each) in enumerate(manifests.items(), 1):
        view = forger.view(
            honest, version=version + number, director=assigning(device.name, each), roles={device.shop.model: role}
        )
        device.begin()
        device.says(carrying(view, each))
        assert device.poll(within=60.0) == ""  # it tries the release in a process of its own
        yield name, digest(each.to_bytes())


def manifest(path: str, files: Files) -> Manifest:
    entries = tuple(FileEntry(name, len(data), digest(data)) for name, data in files.items())
    return Manifest(ReleasePath.parse(path), entries, MODEL, INPUTS)


def heals(device) -> None:
    """CI signs twice with its own hands: once to be as new as the thief's role, once to be newer."""
    device.shop.release(device.shop.new_factor())
    device.recovers()
    device.recovers()


def never_again(device, sha: str) -> bool:
    return (device.home / "store" / "manifests" / f"{sha}.bad").exists()


def test_row_39_malformed_truncated_or_unknown_onnx_is_a_clean_error_and_the_old_model_serves(shop):
    broken = {
        "malformed": b"this is not a model at all",
        "empty": b"",
        "truncated": scaling(5)[:-20],
        "unknown operator": unknown_operator(),
        "random tail": scaling(5)[:30] + bytes(range(256)),
    }
    with device_of(shop) as device:
        with assert_unharmed(device, volatile=(*TAKEN, "store/blobs/", "trust/")):
            for name, sha in impose(device, {name: {MODEL: data} for name, data in broken.items()}):
                device.logs("is never tried again: does not load")
                shows(device, "load_failed")
                assert never_again(device, sha), name
        heals(device)


def reaching(location: str, **changes: int) -> Files:
    return {MODEL: bombs.reaching(location, **changes), WEIGHTS: bytes(48)}


HARMFUL = {
    **{name: ({MODEL: make()}, "memory_limit") for name, make in bombs.BOMBS.items()},
    "traversal": (reaching("../../../../../../../../etc/passwd"), "load_failed"),
    "traversal in a constant": (reaching("../../state.json", constant=True), "load_failed"),
    "traversal without files": ({MODEL: bombs.reaching("../../state.json")}, "load_failed"),
    "absolute path": (reaching("/etc/passwd"), "load_failed"),
    "device": (reaching("/dev/zero"), "load_failed"),
    "another release's blob": (reaching("../../blobs/" + "0" * 64), "load_failed"),
    "beyond the file": (reaching(WEIGHTS, offset=4_000), "load_failed"),
    "across its end": (reaching(WEIGHTS, offset=40), "load_failed"),
    "before the file": (reaching(WEIGHTS, offset=-16), "load_failed"),
    "at the end of the world": (reaching(WEIGHTS, offset=2**63 - 1), "load_failed"),
    "larger than the file": (reaching(WEIGHTS, length=2**40), "load_failed"),
}
SPINNING = {"spinning": ({MODEL: bombs.spinning()}, "test_timed_out")}


def refuses_all(device, harmful) -> None:
    with assert_unharmed(device, volatile=(*TAKEN, "store/blobs/", "trust/")):
        for name, sha in impose(device, {name: files for name, (files, _) in harmful.items()}):
            code = harmful[name][1]
            device.logs(f"({code})")
            assert never_again(device, sha), name
            if name in {"expanding", "spinning", "traversal"}:
                shows(device, code)


def restart(device, **options) -> None:
    device.stop()
    device.options = options
    device.start()


def test_row_40_a_memory_bomb_or_a_traversal_is_loaded_first_in_a_subprocess_and_refused(shop):
    with device_of(shop, rehearsal_bytes=512 * limits.MIB) as device:
        peak = peak_memory(device)
        refuses_all(device, HARMFUL)
        assert peak_memory(device) - peak < 64 * limits.MIB  # nothing of it was loaded here
        heals(device)


def test_row_40_a_model_that_never_answers_is_ended_in_its_subprocess(shop):
    with device_of(shop) as device:
        restart(device, rehearsal_seconds=4.0)  # for this release alone: a busy machine takes longer for good ones
        refuses_all(device, SPINNING)
        restart(device)
        heals(device)
