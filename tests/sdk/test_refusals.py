"""Rows of the attack table in TRUST.md against one part each, in memory; against whole processes: `tests/attacks/`.

Each attack must leave the view, the model in use and every byte on disk as they were, name itself by its code, and
leave the device able to take the next honest view.
"""

import itertools
import json
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from tuf.api.metadata import TargetFile

from device_sdk.download import fetch
from device_sdk.errors import StorageError, UntrustedError, is_retryable
from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from device_sdk.protocol.names import ReleasePath, assign_path
from device_sdk.protocol.polls import BLOBS, POLL, Bundle
from device_sdk.store import CHUNK, FileOps, Store
from device_sdk.transport import Transport
from device_sdk.trust import Trust
from tests.sdk.loopback import Reply, blob_route, loopback
from tests.simulator import DAY, Simulator, digest_of, signer, unsigned

HEALED = {"floor.json", "roots.json", "view.json"}


class World:
    """A device that runs detector 1.0.0 under an accepted view, and a repository where 1.1.0 waits."""

    def __init__(self, home):
        self.home = home
        self.sim = Simulator(models=("detector", "digits"))
        self.old = self.sim.publish("detector/1.0.0/default")
        self.new = self.sim.publish("detector/1.1.0/default")
        self.digits = self.sim.publish("digits/1.0.0/default")
        self.sim.assign(self.old)
        self.store = Store(home / "store")
        self.trust = self.reopened()
        self.first = self.sim.bundle()
        self.view = self.trust.accept(self.first, self.sim.now)
        self.install(self.old)

    def reopened(self, **changes):
        settings = {"device": "cam-1", "models": self.sim.models, "root": self.sim.pinned_root(), "clock_floor": 0}
        return Trust(self.home / "trust", **{**settings, **changes})

    def install(self, manifest):
        for file in manifest.files:
            self.store.append(file.sha256, self.sim.blobs[file.sha256])
            self.store.admit(file.sha256, file.length)
        self.store.begin_trial(manifest.path.model, self.store.add_manifest(manifest.to_bytes()))
        self.store.commit(manifest.path.model)

    def on_disk(self):
        return {path: path.read_bytes() for path in self.home.rglob("*") if path.is_file()}

    @contextmanager
    def unchanged(self):
        before, state = self.on_disk(), self.store.state("detector")
        yield
        assert self.trust.view() == self.view == self.reopened().view()
        assert self.store.state("detector") == state
        assert self.store.current("detector") == digest(self.old.to_bytes())
        with self.store.open(state.active) as files:
            assert files.entry_bytes == self.sim.blobs[self.old.files[0].sha256]
        assert self.on_disk() == before

    def refuses(self, bundle, code, *, now=None):
        with self.unchanged(), pytest.raises(UntrustedError) as caught:
            self.trust.accept(bundle, now or self.sim.now)
        assert caught.value.code == code
        assert not is_retryable(caught.value)

    def recovers(self):
        """The next honest view, with the new release, is accepted."""
        self.sim.assign(self.new)
        view = self.trust.accept(self.sim.bundle(root=self.trust.root_version), self.sim.now)
        assert view.assignments["detector"].manifest == self.new
        assert self.trust.view() == self.reopened().view() == view


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def server():
    with loopback() as server:
        yield server


@pytest.fixture
def transport(server):
    with closing(Transport(server.url, [], "7.1.k1.mac")) as transport:
        yield transport


def changed(bundle, **files):
    """A bundle with some files replaced, by the end of their names: `director=...` replaces `<v>.director.json`."""
    metadata = dict(bundle.metadata)
    for role, text in files.items():
        metadata[name_of(bundle, role)] = text
    return replace(bundle, metadata=metadata)


def name_of(bundle, role):
    return next(name for name in bundle.metadata if name == f"{role}.json" or name.endswith(f".{role}.json"))


def text_of(bundle, role):
    return bundle.metadata[name_of(bundle, role)]


def test_row_1_an_older_full_view_replayed_is_refused(world):
    world.sim.assign(world.new)
    world.view = world.trust.accept(world.sim.bundle(), world.sim.now)
    world.refuses(world.first, "replayed")
    world.recovers()


def test_row_2_an_expired_timestamp_is_refused_and_the_model_keeps_serving(world):
    world.sim.assign(world.new)
    late = world.sim.bundle()
    world.refuses(late, "expired", now=world.sim.now + DAY + 1)
    world.recovers()


def test_row_4_another_devices_view_is_refused_by_a_fresh_device(world, tmp_path):
    other = world.sim.bundle(device="cam-2")
    fresh = Trust(tmp_path / "fresh", "cam-1", world.sim.models, world.sim.pinned_root(), clock_floor=0)
    with pytest.raises(UntrustedError) as caught:
        fresh.accept(other, world.sim.now)
    assert caught.value.code == "wrong_device"
    assert fresh.view() is None
    assert list((tmp_path / "fresh").iterdir()) == []
    assert fresh.accept(world.sim.bundle(), world.sim.now).assignments["detector"].manifest == world.old


def test_row_5_another_devices_newer_view_is_refused_and_the_honest_older_one_accepted(world):
    other = world.sim.copy()
    other.now += 1000
    world.refuses(other.bundle(device="cam-2"), "wrong_device")
    world.recovers()
    assert world.trust.view().version < other.version


def test_row_6_an_old_director_with_a_new_snapshot_is_refused(world):
    world.sim.assign(world.new)
    new = world.sim.bundle()
    world.refuses(changed(new, director=text_of(world.first, "director")), "hash_mismatch")
    world.recovers()


def test_row_7_another_devices_snapshot_is_refused(world):
    world.sim.assign(world.new)
    version = world.sim.now + 50
    other = world.sim.bundle(device="cam-2", version=version)
    mine = world.sim.bundle(version=version)
    stolen = changed(mine, snapshot=text_of(other, "snapshot"), director=text_of(other, "director"))
    world.refuses(stolen, "hash_mismatch")
    world.recovers()


def test_row_8_an_empty_director_is_refused_and_the_models_kept(world):
    world.refuses(world.sim.bundle(director_targets={}), "empty_director")
    world.recovers()


def test_row_8_a_director_that_leaves_out_a_model_is_refused(world):
    entries = {"assign/cam-1/digits": TargetFile(0, {"sha256": digest(b"")}, "assign/cam-1/digits", {"custom": {}})}
    world.refuses(world.sim.bundle(director_targets=entries), "missing_model")
    world.recovers()


def test_row_9_the_same_version_with_new_content_is_ignored(world):
    world.sim.assign(world.new)
    again = world.sim.bundle(version=world.view.version)
    with world.unchanged():
        assert world.trust.accept(again, world.sim.now) == world.view
    world.recovers()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "director"])
def test_row_10_metadata_signed_by_a_wrong_key_is_refused(world, role):
    world.sim.assign(world.new)
    world.refuses(world.sim.bundle(**{f"{role}_key": "mallory"}), "bad_signature")
    world.recovers()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "director", "detector", "targets"])
def test_row_10_unsigned_metadata_is_refused(world, role):
    world.sim.assign(world.new)
    world.sim.publish("detector/1.2.0/default")
    world.sim.sign_targets()
    bundle = world.sim.bundle(edit=lambda name, text: unsigned(text) if name == role else text)
    world.refuses(bundle, "bad_signature")
    world.recovers()


def test_row_12_a_role_signed_by_the_wrong_models_ci_key_is_refused(world):
    thief = world.sim.copy()
    thief.assign(thief.publish("detector/6.6.6/default", key="ci-digits"))
    world.refuses(thief.bundle(), "bad_signature")
    world.recovers()


def test_row_12_a_role_that_lists_another_models_release_is_not_asked_for_it(world):
    """CI of `digits` may write what it likes into its own role: for `detector` nobody looks there."""
    thief = world.sim.copy()
    evil, _ = thief.release("detector/6.6.6/default")
    thief.list_release(evil, role="digits")
    thief.assign(evil)
    world.refuses(thief.bundle(), "unlisted_release")
    world.recovers()


def test_row_13_a_release_that_ci_never_listed_is_refused(world):
    thief = world.sim.copy()
    evil, _ = thief.release("detector/6.6.6/default")
    thief.manifests[digest_of(evil)] = evil.to_bytes()
    thief.assign(evil)
    world.refuses(thief.bundle(), "unlisted_release")
    world.recovers()


def test_row_13_an_unreleased_hash_under_a_listed_release_is_refused(world):
    thief = world.sim.copy()
    evil, _ = thief.release("detector/1.1.0/default", {"model.onnx": b"evil"})
    thief.manifests[digest_of(evil)] = evil.to_bytes()
    thief.assign(evil)
    world.refuses(thief.bundle(), "disagreement")
    world.recovers()


@pytest.mark.parametrize("field", ["length", "sha256"])
def test_row_14_a_director_that_differs_from_the_release_in_length_or_hash_is_refused(world, field):
    honest = world.sim.assign(world.new)
    wrong = {"length": honest.length + 1, "sha256": world.sim.assign(world.old).sha256}[field]
    world.sim.assign(world.new, **{field: wrong})
    world.refuses(world.sim.bundle(), "disagreement")
    world.recovers()


def test_row_15_an_assignment_that_names_another_models_release_is_refused(world):
    world.sim.assign(world.digits, model="detector")
    world.refuses(world.sim.bundle(), "wrong_model")
    world.recovers()


def test_row_16_a_release_that_ci_removed_is_refused_when_assigned(world):
    world.sim.assign(world.new)
    thief = world.sim.copy()
    thief.withdraw("detector/1.1.0/default")
    world.refuses(thief.bundle(), "unlisted_release")
    world.recovers()


def test_row_16_the_role_that_still_listed_it_cannot_be_brought_back(world):
    withdrawn = world.sim.copy()
    withdrawn.withdraw("detector/1.1.0/default")
    world.view = world.trust.accept(withdrawn.bundle(), withdrawn.now)
    world.sim.assign(world.new)
    world.sim.now = withdrawn.now
    world.refuses(world.sim.bundle(), "replayed")


def test_row_17_a_role_rolled_back_in_the_snapshot_is_refused(world):
    world.refuses(world.sim.bundle(snapshot_versions={"detector": 1}), "replayed")
    world.recovers()


def test_row_18_after_a_fast_forward_a_root_rotation_brings_recovery(world):
    thief = world.sim.copy()
    world.view = world.trust.accept(thief.bundle(version=2**31), thief.now)
    world.refuses(world.sim.bundle(), "replayed")
    world.sim.rotate_root(online="online-2")
    world.recovers()


def test_row_20_a_gap_in_the_roots_is_refused(world):
    world.sim.rotate_root(online="online-2")
    world.sim.rotate_root()
    bundle = world.sim.bundle()
    metadata = {name: text for name, text in bundle.metadata.items() if name != "2.root.json"}
    world.refuses(replace(bundle, metadata=metadata), "bad_signature")
    world.recovers()


def test_row_21_ten_root_rotations_while_offline_are_caught_up_with(world):
    for number in range(10):
        world.sim.rotate_root(keys=(f"root-{number}a", f"root-{number}b"), online=f"online-{number}")
    world.recovers()
    assert world.reopened().root_version == 11


def test_row_22_a_stolen_online_key_is_worth_nothing_after_its_rotation(world):
    thief = world.sim.copy()
    world.sim.rotate_root(online="online-2")
    world.view = world.trust.accept(world.sim.bundle(), world.sim.now)
    thief.now = world.sim.now + 100
    thief.assign(world.new)
    world.refuses(thief.bundle(), "bad_signature")
    (world.home / "trust" / "roots.json").unlink()
    world.trust = world.reopened()
    with pytest.raises(UntrustedError) as caught:
        world.trust.accept(thief.bundle(), thief.now)
    assert caught.value.code == "replayed"
    assert world.trust.root_version == 1
    world.recovers()


def download(world, transport, **changes):
    fetch(transport, world.store, world.new, **{"deadline": 10, **changes})


def test_row_23_a_swapped_blob_of_the_same_length_is_refused_and_the_partial_deleted(world, server, transport):
    file = world.new.files[0]
    server.on(BLOBS + file.sha256, blob_route(b"x" * file.length))
    with world.unchanged(), pytest.raises(UntrustedError) as caught:
        download(world, transport)
    assert caught.value.code == "hash_mismatch"
    server.on(BLOBS + file.sha256, blob_route(world.sim.blobs[file.sha256]))
    download(world, transport)
    assert world.store.has_blob(file)


def test_row_25_a_resumption_that_returns_other_bytes_is_refused(world, server, transport):
    file = world.new.files[0]
    world.store.append(file.sha256, world.sim.blobs[file.sha256][:5])
    server.on(BLOBS + file.sha256, blob_route(b"x" * file.length))
    with pytest.raises(UntrustedError) as caught:
        download(world, transport)
    assert caught.value.code == "hash_mismatch"
    assert world.store.partial_length(file.sha256) == 0
    assert not world.store.has_blob(file)


def test_row_26_an_endless_blob_is_stopped_within_a_chunk_of_its_signed_length(world, server, transport):
    file = world.new.files[0]
    served = itertools.count()
    server.on(BLOBS + file.sha256, lambda _: Reply(200, (b"x" * 65_536 for _ in served)))
    with world.unchanged(), pytest.raises(UntrustedError) as caught:
        download(world, transport)
    assert caught.value.code == "too_large"


def test_row_26_endless_metadata_is_stopped_within_a_chunk_of_the_limit(world, server, transport):
    sent = []

    def flood():
        for _ in range(4096):
            sent.append(65_536)
            yield b"x" * 65_536

    server.on(POLL, lambda _: Reply(200, flood()))
    with world.unchanged(), pytest.raises(UntrustedError) as caught:
        transport.request("GET", POLL, limit=limits.MIB, deadline=30)
    assert caught.value.code == "too_large"
    assert sum(sent) < limits.MIB + 64 * CHUNK  # the rest filled the buffers of the loopback


def test_row_26_metadata_over_the_cap_is_refused_even_inside_a_bundle(world):
    bundle = changed(world.sim.bundle(), timestamp=" " * (limits.METADATA + 1))
    world.refuses(bundle, "too_large")
    world.recovers()


@pytest.mark.parametrize("target", ["http://{other}/y", "//{other}/y", "https://{other}/y", "http://127.0.0.1:1/y"])
def test_row_31_a_redirect_to_another_host_is_refused_and_no_credential_sent(world, server, transport, target):
    file = world.new.files[0]
    with loopback() as other:
        other.on("/y", Reply(200, world.sim.blobs[file.sha256]))
        server.on(BLOBS + file.sha256, Reply(307, b"", {"Location": target.format(other=other.host)}))
        with world.unchanged(), pytest.raises(UntrustedError) as caught:
            download(world, transport)
        assert caught.value.code == "redirect"
        assert other.asked == []


def test_row_31_a_pinned_blob_host_is_asked_without_the_credential(world, server):
    file = world.new.files[0]
    with loopback() as other, closing(Transport(server.url, [other.host], "7.1.k1.mac")) as transport:
        other.on("/y", blob_route(world.sim.blobs[file.sha256]))
        server.on(BLOBS + file.sha256, Reply(307, b"", {"Location": f"{other.url}/y"}))
        download(world, transport)
        assert "Authorization" not in other.asked[0].headers
        assert server.asked[0].headers["Authorization"] == "Bearer 7.1.k1.mac"


@pytest.mark.parametrize("name", ["..", "../../etc", "/etc/passwd", "a/b", "1\0", "", "A", "."])
def test_row_32_a_hostile_release_name_in_an_assignment_is_refused(world, name):
    world.sim.assign(world.new, release=ReleasePath("detector", name, "default"))
    world.refuses(world.sim.bundle(), "invalid_name")
    world.recovers()


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/model.onnx", "a\0b", "..", "", ".hidden"])
def test_row_32_a_hostile_file_name_in_a_manifest_is_refused_even_signed_by_ci(world, name):
    thief = world.sim.copy()
    entry = FileEntry(name, 4, digest(b"evil"))
    evil = Manifest(path=ReleasePath.parse("detector/6.6.6/default"), files=(entry,), entry=name)
    thief.list_release(evil)
    thief.assign(evil)
    world.refuses(thief.bundle(), "bad_manifest")
    with world.unchanged(), pytest.raises(UntrustedError):
        world.store.add_manifest(evil.to_bytes())


@pytest.mark.parametrize("name", ["../root.json", "/etc/passwd.json", "a/b.json", "a\0.json", "..json", "root.json/"])
def test_row_32_a_hostile_name_in_a_bundle_is_refused(world, name):
    data = Bundle(metadata={name: "{}"}).to_bytes()
    with world.unchanged(), pytest.raises(ProtocolError):
        Bundle.parse(data)


def test_row_33_a_link_planted_in_the_model_directory_is_not_followed(world, tmp_path_factory):
    file, outside = world.new.files[0], tmp_path_factory.mktemp("outside") / "file"
    outside.write_bytes(world.sim.blobs[file.sha256])
    (world.home / "store" / "blobs" / file.sha256).symlink_to(outside)
    sha = world.store.add_manifest(world.new.to_bytes())
    assert not world.store.has(sha)
    with pytest.raises(StorageError):
        world.store.begin_trial("detector", sha)
    with pytest.raises(StorageError):
        world.store.open(sha)


def test_row_34_a_blob_changed_after_verification_is_never_loaded(world):
    world.install(world.new)
    blob = world.home / "store" / "blobs" / world.new.files[0].sha256
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(UntrustedError) as caught:
        world.store.open(digest_of(world.new))
    assert caught.value.code == "hash_mismatch"
    assert world.store.current("detector") == digest_of(world.old)


@pytest.mark.parametrize("name", sorted(HEALED))
@pytest.mark.parametrize("damage", ["deleted", "emptied", "truncated", "changed"])
def test_row_36_damaged_local_metadata_heals_and_the_floor_holds(world, name, damage):
    world.sim.rotate_root()
    world.sim.assign(world.new)
    old = world.sim.bundle()
    world.trust.accept(old, world.sim.now)
    newest = world.sim.bundle(root=world.trust.root_version)
    world.view = world.trust.accept(newest, world.sim.now)
    path = world.home / "trust" / name
    data = path.read_bytes()
    path.write_bytes(
        {"deleted": b"", "emptied": b"", "truncated": data[:-9], "changed": data.replace(b"1", b"2")}[damage]
    )
    if damage == "deleted":
        path.unlink()
    world.trust = world.reopened()
    with pytest.raises(UntrustedError) as caught:
        world.trust.accept(old, world.sim.now)
    assert caught.value.code == "replayed"
    world.recovers()
    assert {entry.name for entry in (world.home / "trust").iterdir()} == HEALED


def test_row_36_all_but_the_floor_lost_is_still_no_rollback(world):
    world.sim.assign(world.new)
    newest = world.sim.bundle()
    world.trust.accept(newest, world.sim.now)
    (world.home / "trust" / "view.json").unlink()
    world.trust = world.reopened()
    assert world.trust.view() is None
    with pytest.raises(UntrustedError) as caught:
        world.trust.accept(world.first, world.sim.now)
    assert caught.value.code == "replayed"
    assert world.trust.accept(newest, world.sim.now).assignments["detector"].manifest == world.new


def test_row_37_a_disk_full_in_mid_download_leaves_the_old_model_and_resumes(world, server, transport):
    class Full(FileOps):
        def append(self, path, data):
            super().append(path, data[:7])
            raise OSError(28, "No space left on device")

    file = world.new.files[0]
    server.on(BLOBS + file.sha256, blob_route(world.sim.blobs[file.sha256]))
    with pytest.raises(StorageError) as caught:
        fetch(transport, Store(world.home / "store", Full()), world.new, deadline=10)
    assert caught.value.code == "disk_full"
    assert world.store.current("detector") == digest_of(world.old)
    download(world, transport)
    assert server.asked[-1].headers["Range"] == "bytes=7-"
    assert world.store.has_blob(file)


def test_row_38_a_clock_at_1970_uses_the_floor_and_still_installs(world):
    world.sim.assign(world.new)
    assert world.trust.accept(world.sim.bundle(), 0.0).assignments["detector"].manifest == world.new


def test_row_38_a_clock_set_back_does_not_revive_an_expired_view(world):
    world.view = world.trust.accept(world.sim.bundle(tick=DAY), world.sim.now)
    world.sim.assign(world.new)
    world.sim.lifetime = -100
    world.refuses(world.sim.bundle(), "expired", now=1.0)
    world.trust = world.reopened()
    world.refuses(world.sim.bundle(), "expired", now=1.0)
    world.sim.lifetime = DAY
    world.recovers()


@pytest.mark.parametrize("days", [400, 10_000_000])
def test_row_38_a_clock_far_ahead_fails_closed_and_says_so(world, days):
    world.sim.assign(world.new)
    bundle = world.sim.bundle()
    with world.unchanged(), pytest.raises(UntrustedError, match="by this device's clock") as caught:
        world.trust.accept(bundle, world.sim.now + days * DAY)
    assert caught.value.code == "expired"
    world.recovers()


def test_row_11_one_key_signing_twice_does_not_make_two(world):
    world.sim.threshold["detector"] = 2
    world.sim.sign_targets()
    thief = world.sim.copy()
    thief.assign(thief.publish("detector/6.6.6/default"))
    bundle = thief.bundle(edit=lambda name, text: doubled(text) if name == "detector" else text)
    world.refuses(bundle, "malformed")  # python-tuf refuses a repeated key id before it counts


def test_row_11_one_signature_of_two_is_not_enough(world):
    world.sim.threshold["detector"] = 2
    world.sim.sign_targets()
    world.sim.assign(world.sim.publish("detector/6.6.6/default"))
    world.refuses(world.sim.bundle(), "bad_signature")


def doubled(text):
    """Repeat the only signature in the list of signatures."""
    value = json.loads(text)
    value["signatures"] *= 2
    return json.dumps(value)


@pytest.mark.parametrize("keys", [("root-1",), ("mallory", "mallory-2"), ("root-1", "mallory")])
def test_row_19_a_root_below_the_old_threshold_is_not_taken(world, keys):
    thief = world.sim.copy()
    thief.rotate_root(online="mallory", signed_by=keys)
    thief.assign(world.new)
    world.refuses(thief.bundle(), "bad_signature")
    assert world.trust.root_version == 1
    world.recovers()


def test_an_entry_is_looked_up_under_this_devices_own_name_only(world):
    other = assign_path("cam-2", "detector")
    entry = TargetFile(0, {"sha256": digest(b"")}, other, {"custom": {}})
    world.refuses(world.sim.bundle(director_targets={other: entry}), "missing_model")


def test_signers_are_distinct():
    assert len({signer(name).public_key.keyid for name in ("online", "mallory", "ci-detector", "ci-digits")}) == 4
