"""Row 39: malformed, truncated, unknown-operator ONNX, rightly signed. Expect a clean error; the old model serves."""

import pytest

from device_sdk.errors import ModelError
from device_sdk.protocol.manifest import digest
from device_sdk.runtime import RuntimeOptions, load
from tests.sdk.world import World, answer, manifest_of, scaling, unknown_operator

ATTACKS = {
    "malformed": b"this is not a model at all",
    "empty": b"",
    "truncated": scaling(5)[:-20],
    "unknown operator": unknown_operator(),
    "random tail": scaling(5)[:30] + bytes(range(256)),
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_model_that_does_not_load_is_a_clean_error(data):
    manifest = manifest_of("detector/1.1.0/default", data)
    with pytest.raises(ModelError):
        load(manifest, sha256=digest(manifest.to_bytes()), entry=data, options=RuntimeOptions(intra_op_threads=1))


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_old_model_serves_and_the_bad_one_is_reported_and_never_tried_again(tmp_path, data):
    world = World(tmp_path / "device")
    with world.committed("detector/1.0.0/default", scaling(2)) as fleet:
        before = fleet._store.state("detector")
        manifest = world.server.publish("detector/1.1.0/default", data)
        world.server.assign(manifest)
        fleet.update_once()
        assert answer(fleet) == 2.0
        assert fleet._store.state("detector") == before
        assert fleet._store.is_bad(digest(manifest.to_bytes()))
        event = world.server.events[-1]
        assert (event.kind, event.reason) == ("failed", "load_failed")
        downloads = [call for call in world.server.calls if "/blobs/" in call]
        world.server.renew()
        fleet.update_once()
        assert [call for call in world.server.calls if "/blobs/" in call] == downloads
    with world.open() as fleet:
        assert answer(fleet) == 2.0
