"""Trust by itself: what it accepts, what it keeps, how it says no. The attack table is in tests/attacks."""

import json
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

import pytest

from device_sdk import trust as trust_module
from device_sdk.errors import SetupError, StorageError, UntrustedError
from device_sdk.protocol.assignment import Probation, Sampling, Window
from device_sdk.protocol.polls import Bundle
from device_sdk.trust import Trust
from tests.simulator import DAY, START, Simulator, digest_of, resigned, signer


@pytest.fixture
def sim():
    sim = Simulator(models=("detector", "digits"))
    sim.assign(sim.publish("detector/1.0.0/default"))
    return sim


@pytest.fixture
def home(tmp_path):
    return tmp_path / "trust"


@pytest.fixture
def opened(sim, home):
    def opened(**changes):
        settings = {"device": "cam-1", "models": sim.models, "root": sim.pinned_root(), "clock_floor": 0}
        return Trust(home, **{**settings, **changes})

    return opened


@contextmanager
def refused(code):
    with pytest.raises(UntrustedError) as caught:
        yield
    assert caught.value.code == code


def test_a_fresh_device_has_no_view_and_its_pinned_root(opened):
    trust = opened()
    assert trust.view() is None
    assert trust.root_version == 1


def test_an_accepted_view_says_what_to_run_and_until_when(sim, opened):
    manifest = sim.publish("detector/1.1.0/int8")
    sampling = Sampling("night-1", 1 / 3, 100, START + DAY, Window(60, 120), 600)
    sim.assign(manifest, rollout="r-7", urgent=True, probation=Probation(5, 0.25, 0.001, 1e-7), sampling=sampling)
    view = opened().accept(sim.bundle(), sim.now)
    verified = view.assignments["detector"]
    assert verified.assignment == sim.assigned["detector"]
    assert (verified.manifest, verified.manifest_bytes) == (manifest, manifest.to_bytes())
    assert (view.version, view.expires) == (sim.now, sim.now + DAY)


def test_a_model_with_nothing_assigned_is_in_the_view_without_a_manifest(sim, opened):
    verified = opened().accept(sim.bundle(), sim.now).assignments["digits"]
    assert (verified.assignment.release, verified.manifest, verified.manifest_bytes) == (None, None, b"")


def test_a_bundle_survives_the_wire(sim, opened):
    assert opened().accept(Bundle.parse(sim.bundle().to_bytes()), sim.now)


def test_the_view_is_there_after_a_restart_without_network_and_after_its_expiry(sim, opened):
    view = opened().accept(sim.bundle(), sim.now)
    assert opened().view() == view


def test_what_is_kept_is_private_and_holds_nothing_of_the_scratch(sim, opened, home):
    opened().accept(sim.bundle(), sim.now)
    assert {path.name for path in home.iterdir()} == {"floor.json", "view.json"}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in [home, *home.iterdir()])


def test_manifests_of_releases_no_longer_assigned_are_not_kept_for_ever(sim, opened, home):
    trust = opened()
    trust.accept(sim.bundle(), sim.now)
    sim.assign(sim.publish("detector/1.1.0/default"))
    trust.accept(sim.bundle(), sim.now)
    body = json.loads(json.loads((home / "view.json").read_text())["body"])
    assert list(body["manifests"]) == [sim.assigned["detector"].sha256]


def test_a_manifest_that_the_device_has_need_not_come_again(sim, opened):
    trust = opened()
    trust.accept(sim.bundle(), sim.now)
    view = trust.accept(replace(sim.bundle(), manifests={}), sim.now)
    assert view.assignments["detector"].manifest is not None


def test_reference_time_is_ours(sim, opened):
    """ngclient's own clock says 2026 or later; the simulator lives where we say."""
    sim.now = int(datetime(2019, 5, 1, tzinfo=UTC).timestamp())
    past = Simulator(now=sim.now)
    trust = opened(models=past.models, root=past.pinned_root())
    assert trust.accept(past.bundle(), past.now).version == past.now
    with refused("expired"):
        trust.accept(past.bundle(), past.now + 2 * DAY)


@pytest.mark.parametrize("now", [-1e18, 1e18, float("inf"), float("-inf")])
def test_no_clock_can_crash_it(sim, opened, now):
    trust = opened()
    try:
        trust.accept(sim.bundle(), now)
    except UntrustedError as error:
        assert error.code == "expired"  # noqa: PT017  one of two fates, by the sign


def test_a_clock_set_ahead_once_does_no_lasting_harm(sim, opened):
    trust = opened()
    trust.accept(sim.bundle(), sim.now + DAY - 10)
    sim.lifetime = DAY // 2
    assert trust.accept(sim.bundle(), sim.now)


def test_a_clock_floor_from_the_build_is_used(sim, opened):
    with refused("expired"):
        opened(clock_floor=sim.now + 2 * DAY).accept(sim.bundle(), 0.0)


def test_a_newer_root_stays_even_where_the_view_with_it_is_refused(sim, opened):
    trust = opened()
    sim.rotate_root(online="online-2")
    with refused("empty_director"):
        trust.accept(sim.bundle(director_targets={}), sim.now)
    assert trust.root_version == opened().root_version == 2
    assert opened().accept(sim.bundle(root=2), sim.now)


def test_a_device_with_a_newer_pinned_root_goes_on(sim, opened):
    sim.rotate_root()
    sim.rotate_root()
    view = opened().accept(sim.bundle(), sim.now)
    trust = opened(root=sim.roots[1].to_bytes())
    assert trust.root_version == 3
    assert trust.view() == view
    assert trust.accept(sim.bundle(root=3), sim.now).version > view.version
    assert opened(root=sim.roots[2].to_bytes()).root_version == 3


def test_the_view_of_another_repository_is_no_view(sim, opened):
    opened().accept(sim.bundle(), sim.now)
    stranger = Simulator(models=sim.models, root_keys=("foreign-1", "foreign-2"), online="foreign")
    assert opened(root=stranger.pinned_root()).view() is None


def test_a_model_pinned_anew_makes_the_old_view_void_and_the_next_one_count(sim, opened):
    opened(models=["detector"]).accept(sim.bundle(), sim.now)
    sim.assign(sim.publish("digits/1.0.0/default"))
    trust = opened()
    trust.accept(sim.bundle(), sim.now)
    assert set(trust.view().assignments) == {"detector", "digits"}


def test_a_pinned_root_that_does_not_parse_is_a_mistake_of_the_set_up(opened):
    with pytest.raises(SetupError):
        opened(root=b"{}")


@pytest.mark.parametrize("missing", ["timestamp", "snapshot", "targets", "director", "detector"])
def test_a_bundle_that_lacks_a_file_is_incomplete(sim, opened, missing):
    bundle = sim.bundle()
    metadata = {name: text for name, text in bundle.metadata.items() if missing not in name}
    with refused("incomplete"):
        opened().accept(replace(bundle, metadata=metadata), sim.now)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"signed": 1}',
        '{"signed": {"x-device": "cam-1"}}',
        '{"signed": {"x-device": "cam-1"}, "signatures": 5}',
        '{"signed": {"x-device": "cam-1", "_type": "timestamp"}, "signatures": []}',
        "[" * 100_000,
        '{"signed": {"x-device": "cam-1", "version": ' + "9" * 5000 + "}}",
        '{"signed": {"x-device": "cam-1"}, "signatures": [{"keyid": "\\ud800", "sig": ""}]}',
        "\ud800",
    ],
)
def test_garbage_for_a_timestamp_is_refused_and_leaves_nothing(sim, opened, home, text):
    bundle = sim.bundle()
    trust = opened()
    with pytest.raises(UntrustedError) as caught:
        trust.accept(replace(bundle, metadata={**bundle.metadata, "timestamp.json": text}), sim.now)
    assert caught.value.code in {"malformed", "wrong_device"}
    assert list(home.iterdir()) == []
    assert trust.accept(bundle, sim.now)


@pytest.mark.parametrize("role", ["snapshot", "targets", "director", "detector"])
@pytest.mark.parametrize(
    "changes", [{"version": "1"}, {"expires": "never"}, {"_type": "root"}, {"spec_version": "9.9"}, {"_type": None}]
)
def test_correctly_hashed_but_malformed_metadata_is_refused(sim, opened, role, changes):
    def edit(name, text):
        if name != role:
            return text
        value = json.loads(text)
        value["signed"] |= changes
        return json.dumps(value)

    trust = opened()
    with pytest.raises(UntrustedError) as caught:
        trust.accept(sim.bundle(edit=edit), sim.now)
    assert caught.value.code in {"malformed", "inconsistent", "bad_signature"}
    assert trust.view() is None


@pytest.mark.parametrize(
    "custom", [None, [], {"release": 5}, {"release": "detector"}, {"release": None, "window": {"start": -1, "end": 0}}]
)
def test_an_assignment_that_does_not_parse_is_refused(sim, opened, custom):
    entries = sim._director_targets("cam-1")
    entries["assign/cam-1/detector"].unrecognized_fields["custom"] = custom
    with pytest.raises(UntrustedError) as caught:
        opened().accept(sim.bundle(director_targets=entries), sim.now)
    assert caught.value.code in {"malformed", "invalid_name"}


@pytest.mark.parametrize(("old", "new"), [('"length":', '"length":1'), ('"metadata":{}', '"metadata":{} ')])
def test_a_manifest_whose_bytes_are_not_those_signed_is_refused(sim, opened, old, new):
    bundle = sim.bundle()
    manifests = {sha: text.replace(old, new) for sha, text in bundle.manifests.items()}
    assert manifests != bundle.manifests
    with refused("bad_manifest"):
        opened().accept(replace(bundle, manifests=manifests), sim.now)


def test_a_manifest_that_is_missing_is_refused(sim, opened):
    with refused("bad_manifest"):
        opened().accept(replace(sim.bundle(), manifests={}), sim.now)


def test_a_manifest_listed_under_another_release_is_refused(sim, opened):
    older = sim.publish("detector/0.9.0/default")
    sim.list_release(older, path="detector/2.0.0/default")
    sim.assign(older, release=replace(older.path, version="2.0.0"))
    with refused("bad_manifest"):
        opened().accept(sim.bundle(), sim.now)


def test_an_expired_role_of_ci_stops_updates(sim, opened):
    sim.now += 181 * DAY
    with refused("expired"):
        opened().accept(sim.bundle(), sim.now)


def two_models(sim):
    """Both run something; then the detector's CI forgets to renew its role, and digits gets a new release."""
    sim.assign(sim.publish("digits/1.0.0/default"))
    sim.now += 100 * DAY
    sim.sign_targets()
    sim.assign(sim.publish("digits/1.1.0/default"))
    sim.now += 81 * DAY


def test_an_expired_role_of_one_model_does_not_hold_up_the_others(sim, opened):
    trust = opened()
    trust.accept(sim.bundle(), sim.now)
    two_models(sim)
    sampling = Sampling("night", 0.5, 10, sim.now + DAY)
    sim.assigned["detector"] = replace(sim.assigned["detector"], sampling=sampling)
    view = trust.accept(sim.bundle(), sim.now)
    assert {model: error.code for model, error in view.refused.items()} == {"detector": "expired"}
    detector, digits = view.assignments["detector"], view.assignments["digits"]
    assert (detector.assignment.release, detector.manifest, detector.assignment.sampling) == (None, None, sampling)
    assert str(digits.assignment.release) == "digits/1.1.0/default"
    assert digits.manifest is not None


def test_a_model_refused_for_its_expired_role_is_so_after_a_restart(sim, opened):
    two_models(sim)
    trust = opened()
    view = trust.accept(sim.bundle(), sim.now)
    again = opened().view()
    assert (again.version, again.assignments) == (view.version, view.assignments)
    assert {model: error.code for model, error in again.refused.items()} == {"detector": "expired"}


def test_a_model_whose_role_was_renewed_is_taken_again(sim, opened):
    two_models(sim)
    trust = opened()
    trust.accept(sim.bundle(), sim.now)
    sim.publish("detector/1.1.0/default")
    view = opened().accept(sim.bundle(), sim.now)
    assert view.refused == {}
    assert str(view.assignments["detector"].assignment.release) == "detector/1.0.0/default"


def test_a_role_that_expired_when_nothing_is_left_refuses_the_view_and_keeps_the_last(sim, opened):
    sim.assign(sim.publish("digits/1.0.0/default"))
    trust = opened()
    before = trust.accept(sim.bundle(), sim.now)
    sim.now += 181 * DAY
    with refused("expired"):
        trust.accept(sim.bundle(), sim.now)
    assert opened().view() == before


@pytest.mark.parametrize("role", ["director", "targets", "snapshot"])
def test_any_other_expired_role_refuses_the_whole_view(sim, opened, role):
    two_models(sim)
    if role == "targets":
        sim.targets.signed.expires = sim.at(-1)
        sim.targets.sign(signer("targets"))
        bundle = sim.bundle()
    else:
        bundle = sim.bundle(edit=lambda name, text: expired(sim, text) if name == role else text)
    with refused("expired"):
        opened().accept(bundle, sim.now)


def expired(sim, text):
    return resigned(text, "online", expires=sim.at(-1))


def test_a_role_that_is_missing_is_no_expired_one(sim, opened):
    two_models(sim)
    bundle = sim.bundle()
    kept = {name: text for name, text in bundle.metadata.items() if not name.endswith("detector.json")}
    with refused("incomplete"):
        opened().accept(replace(bundle, metadata=kept), sim.now)


def test_a_signed_timestamp_without_a_binding_is_refused(sim, opened):
    bundle = sim.bundle()
    text = resigned(bundle.metadata["timestamp.json"], "online", unrecognized_fields={})
    with refused("wrong_device"):
        opened().accept(replace(bundle, metadata={**bundle.metadata, "timestamp.json": text}), sim.now)


def test_ngclient_sees_no_byte_of_another_devices_timestamp(sim, opened, monkeypatch):
    seen = []

    class Spy(trust_module.TrustedMetadataSet):
        def update_timestamp(self, data):
            seen.append(data)
            return super().update_timestamp(data)

    monkeypatch.setattr("tuf.ngclient.updater.TrustedMetadataSet", Spy)
    trust = opened()
    with refused("wrong_device"):
        trust.accept(sim.bundle(device="cam-2"), sim.now)
    assert seen == []
    trust.accept(sim.bundle(), sim.now)
    assert len(seen) == 1


def test_any_surprise_of_ngclient_comes_out_as_a_refusal(sim, opened, monkeypatch):
    for surprise in (KeyError("x"), RecursionError(), RuntimeError("x"), ValueError("x"), AttributeError("x")):

        def fail(*_, surprise=surprise):
            raise surprise

        monkeypatch.setattr(trust_module.Updater, "refresh", fail)
        with refused("malformed"):
            opened().accept(sim.bundle(), sim.now)


def test_a_full_disk_is_no_refusal_and_keeps_the_view(sim, opened, monkeypatch):
    trust = opened()
    view = trust.accept(sim.bundle(), sim.now)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    sim.assign(sim.publish("detector/1.1.0/default"))
    bundle = sim.bundle()
    with monkeypatch.context() as patched:
        patched.setattr(trust_module, "write_durably", full)
        with pytest.raises(StorageError):
            trust.accept(bundle, sim.now)
    with monkeypatch.context() as patched:
        patched.setattr(trust_module.Updater, "_persist_file", full)
        with pytest.raises(StorageError):
            trust.accept(bundle, sim.now)
    assert trust.view() == opened().view() == view
    assert trust.accept(bundle, sim.now).version > view.version


@pytest.mark.parametrize("cut", ["floor.json", "view.json"])
def test_a_power_cut_while_keeping_a_view_leaves_the_old_or_the_new(sim, opened, monkeypatch, cut):
    class PowerCut(BaseException):
        pass

    def write(path, data):
        if path.name == cut:
            raise PowerCut
        trust_module_write(path, data)

    trust_module_write = trust_module.write_durably
    old = opened().accept(sim.bundle(), sim.now)
    first = sim.copy().bundle()
    sim.assign(sim.publish("detector/1.1.0/default"))
    bundle = sim.bundle(tick=5)
    with monkeypatch.context() as patched:
        patched.setattr(trust_module, "write_durably", write)
        with pytest.raises(PowerCut):
            opened().accept(bundle, sim.now)
    trust = opened()
    assert trust.view() == old
    if cut == "view.json":
        with refused("replayed"):
            trust.accept(first, sim.now)
    assert trust.accept(bundle, sim.now).assignments["detector"].manifest.path.version == "1.1.0"


def test_scratch_left_by_a_power_cut_or_planted_does_no_harm(sim, opened, home, tmp_path):
    trust = opened()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (home / "scratch").symlink_to(outside)
    view = trust.accept(sim.bundle(), sim.now)
    (home / "scratch" / "root_history").mkdir(parents=True)
    (home / "scratch" / "timestamp.json").write_text("junk")
    assert trust.accept(sim.bundle(), sim.now).version > view.version
    assert [path.name for path in outside.iterdir()] == ["kept"]


def test_the_view_holds_the_floor_too_should_floor_and_roots_both_be_lost(sim, opened, home):
    thief = sim.copy()
    sim.rotate_root(online="online-2")
    opened().accept(sim.bundle(), sim.now)
    (home / "floor.json").unlink()
    (home / "roots.json").unlink()
    thief.now = sim.now
    trust = opened()
    with refused("replayed"):
        trust.accept(thief.bundle(), thief.now)
    assert trust.accept(sim.bundle(root=trust.root_version), sim.now)


def test_a_lost_floor_is_made_anew_at_once_so_that_the_view_may_be_lost_next(sim, opened, home):
    old = sim.bundle()
    trust = opened()
    trust.accept(old, sim.now)
    trust.accept(sim.bundle(), sim.now)
    (home / "floor.json").unlink()
    opened()
    (home / "view.json").unlink()
    with refused("replayed"):
        opened().accept(old, sim.now)


def test_losing_everything_is_starting_afresh(sim, opened, home):
    trust = opened()
    view = trust.accept(sim.bundle(), sim.now)
    shutil.rmtree(home)
    trust = opened()
    assert trust.view() is None
    assert trust.accept(sim.bundle(), sim.now).version > view.version


def test_the_device_stays_light(tmp_path):
    """Neither onnxruntime nor numpy nor Django come in by trust, store and download."""
    code = (
        "import sys, device_sdk.trust, device_sdk.store, device_sdk.download, device_sdk.transport\n"
        "print(sorted({'onnxruntime', 'numpy', 'django', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_digests_name_what_the_view_assigns(sim, opened):
    view = opened().accept(sim.bundle(), sim.now)
    verified = view.assignments["detector"]
    assert verified.assignment.sha256 == digest_of(verified.manifest)


def test_a_version_too_large_to_be_remembered_is_refused_and_costs_no_rollback_protection(sim, opened):
    """With the online key alone: 2**63 fits a bundle's file names, did not fit floor.json, and so emptied the floor.

    After the next start the role that CI had withdrawn a release from could be rolled back.
    """
    manifest = sim.publish("detector/1.1.0/default")
    sim.assign(manifest)
    before_withdrawal = sim.copy()
    sim.withdraw("detector/1.1.0/default")
    sim.assign(sim.publish("detector/1.2.0/default"))
    assert opened().accept(sim.bundle(), sim.now)

    thief = sim.copy()
    with refused("malformed"):
        opened().accept(thief.bundle(version=2**63 + 5), thief.now)
    assert opened().view().assignments["detector"].assignment.release.version == "1.2.0"
    with refused("replayed"):
        opened().accept(before_withdrawal.bundle(version=2**63 - 5), sim.now)
    assert opened().accept(sim.bundle(), sim.now)


@pytest.mark.parametrize(
    "change", [{"root.json": []}, {"../../planted": "x"}, {"..": "x"}, {"": "x"}, {"/planted": "x"}]
)
def test_a_record_of_no_plain_files_is_forgotten_and_writes_none(sim, home, opened, change):
    """Its checksum is no secret: who can write to the folder can make one."""
    opened().accept(sim.bundle(), sim.now)
    body = json.loads(json.loads((home / "view.json").read_bytes())["body"])
    text = json.dumps({**body, "metadata": {**body["metadata"], **change}})
    (home / "view.json").write_text(json.dumps({"body": text, "sha256": sha256(text.encode()).hexdigest()}))

    trust = opened()
    assert trust.view() is None
    assert not list(home.parent.rglob("planted"))
    assert trust.accept(sim.bundle(), sim.now)
