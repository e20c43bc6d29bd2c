"""The public face and the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest

import device_sdk
from device_sdk import __version__, abilities
from device_sdk.__main__ import main
from device_sdk.client import Fleet
from device_sdk.config import Home, Provision
from device_sdk.enrolment import enrol
from device_sdk.errors import SetupError, TransferError
from tests.sdk.world import Server, World, X, answer, prove, scaling

ENROL = "/api/device/v1/enrol"


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "device")


@pytest.fixture
def over_wire(world, monkeypatch):
    """Commands make their own transport: let it be the server in memory."""
    for module in ("transport", "enrolment"):
        monkeypatch.setattr(f"device_sdk.{module}.Transport", lambda *_, **__: world.server)
    return world


def provisioned(path, server):
    home = Home(path)
    home.make()
    provision = Provision(
        server="http://fleet.test", root=server.simulator.pinned_root().decode(), token="t", models=("detector",)
    )
    home.provision_file.write_bytes(provision.to_bytes())
    return home


def granting(server, state="active"):
    requests = []

    def grant(content):
        requests.append(json.loads(content))
        return {"device": requests[-1]["device"], "credential": "secret", "models": ["detector"], "state": state}

    server.routes[ENROL] = grant
    return requests


def test_second_process_serves_and_changes_nothing(world):
    with world.committed("detector/1.0.0/default", scaling(2)) as first:
        assert first.updates
        second = world.open()
        assert not second.updates
        assert answer(second) == 2.0
        second.start()
        with pytest.raises(SetupError, match="another process"):
            second.update_once()
        second.stop()
    with world.open() as third:
        assert third.updates


def test_second_process_does_not_count_starts_of_a_trial(world):
    world.server.assign(world.server.publish("detector/1.0.0/default", scaling(2)))
    with world.open() as first:
        first.update_once()
        for _ in range(4):
            second = world.open()
            assert answer(second) == 2.0
            second.stop()
        assert first._store.state("detector").starts == 1


def test_many_devices_live_in_one_process(tmp_path):
    worlds = [World(tmp_path / str(number)) for number in range(4)]
    fleets = [world.committed("detector/1.0.0/default", scaling(n)) for n, world in enumerate(worlds)]
    assert [answer(fleet) for fleet in fleets] == [0, 1, 2, 3]
    for fleet in fleets:
        fleet.stop()


def test_unknown_model_is_explained(world):
    with world.open() as fleet, pytest.raises(SetupError, match="it has detector"):
        fleet.model("detecto")


def test_unknown_option_is_an_error(world):
    with pytest.raises(TypeError, match="threads"):
        Fleet.open(world.path, threads=3)


@pytest.mark.parametrize("spoil", ["provision.json", "identity.json"])
def test_directory_that_is_not_set_up_says_what_to_do(world, spoil):
    (world.path / spoil).unlink()
    with pytest.raises(SetupError, match=spoil):
        world.open()
    (world.path / spoil).write_text("{", encoding="utf-8")
    with pytest.raises(SetupError):
        world.open()


def test_enrolment_keeps_the_nonce_before_it_asks_and_the_credential_after(tmp_path):
    server = Server()
    home = provisioned(tmp_path / "device", server)
    requests = granting(server)
    server.faults[ENROL] = [TransferError("the answer got lost")]
    with pytest.raises(TransferError):
        enrol(home.path, "cam-1", {"site": "north"}, transport=server)
    nonce = home.identity().nonce
    with pytest.raises(SetupError, match="enrolment was begun"):
        Fleet.open(home.path)
    assert enrol(home.path, "cam-1", {"site": "north"}, transport=server) == "active"
    said = {"device": "cam-1", "nonce": nonce, "labels": {"site": "north"}, "sdk": __version__}
    assert requests == [said | {"abilities": abilities.detect().to_json()}]
    assert (home.identity().credential, home.identity().nonce) == ("secret", nonce)
    assert home.identity_file.stat().st_mode & 0o077 == 0


def test_directory_is_one_device_for_ever(tmp_path):
    server = Server()
    home = provisioned(tmp_path / "device", server)
    granting(server)
    enrol(home.path, "cam-1", transport=server)
    with pytest.raises(SetupError, match="enrolled as 'cam-1'"):
        enrol(home.path, "cam-2", transport=server)


def test_pending_enrolment_is_told_and_the_directory_can_be_opened(tmp_path):
    server = Server()
    home = provisioned(tmp_path / "device", server)
    granting(server, state="pending")
    assert enrol(home.path, "cam-1", transport=server) == "pending"
    Fleet.open(home.path).stop()


def test_credential_does_not_show_in_text(world):
    with world.open() as fleet:
        assert "credential" not in json.dumps(fleet.status().to_json())
        assert "credential'" not in repr(fleet._identity)


def test_commands_enrol_update_run_status_and_upload(over_wire, tmp_path, capsys):
    server = over_wire.server
    granting(server)
    source = tmp_path / "handed-out.json"
    source.write_bytes((over_wire.path / "provision.json").read_bytes())
    home = tmp_path / "fresh"
    at = ["--home", str(home)]
    assert main(["enrol", *at, "--provision", str(source), "--name", "cam-1", "--label", "site=north"]) == 0
    assert capsys.readouterr().out == "cam-1: active\n"
    server.assign(server.publish("detector/1.0.0/default", scaling(3)))
    assert main(["update", *at]) == 0
    assert "probation" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", X["x"])
    assert main(["run", *at, "detector", str(tmp_path / "x.npy")]) == 0
    assert json.loads(capsys.readouterr().out) == {"y": [[0.0, 3.0, 6.0, 9.0]]}
    (tmp_path / "x.json").write_text("[[1, 1, 1, 1]]", encoding="utf-8")
    assert main(["run", *at, "detector", str(tmp_path / "x.json")]) == 0
    assert json.loads(capsys.readouterr().out) == {"y": [[3.0] * 4]}
    assert main(["status", *at]) == 0
    assert "detector 1.0.0/default" in capsys.readouterr().out
    assert main(["status", *at, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["detector"]["state"] == "probation"
    assert main(["upload", *at]) == 0
    assert capsys.readouterr().out == "uploaded 0 samples in 0 batches\n"


def test_status_works_beside_the_process_that_updates(over_wire, capsys):
    with over_wire.committed("detector/1.0.0/default", scaling(2)):
        assert main(["status", "--home", str(over_wire.path)]) == 0
        assert "committed" in capsys.readouterr().out
        assert main(["update", "--home", str(over_wire.path)]) == 2
        assert "another process" in capsys.readouterr().err


def test_commands_say_what_is_wrong_and_how_by_their_exit_codes(over_wire, tmp_path, capsys):
    at = ["--home", str(over_wire.path)]
    assert main(["status", "--home", str(tmp_path / "nowhere")]) == 2
    assert "provision.json" in capsys.readouterr().err
    over_wire.server.faults["/api/device/v1/poll"] = [TransferError("no route to host")]
    assert main(["update", *at]) == 4
    over_wire.server.faults["/api/device/v1/poll"] = [TransferError("no", status=403, code="device_pending")]
    assert main(["update", *at]) == 3
    assert "device_pending" in capsys.readouterr().err
    assert main(["run", *at, "detector", str(tmp_path / "x.npy")]) == 3
    assert "no_model" in capsys.readouterr().err
    assert main(["enrol", *at, "--name", "cam-1", "--label", "site"]) == 2
    assert main(["enrol", *at, "--name", "../cam"]) == 2


def test_update_that_fails_has_its_own_exit_code(over_wire):
    over_wire.server.assign(over_wire.server.publish("detector/1.0.0/default", b"no model"))
    assert main(["update", "--home", str(over_wire.path)]) == 3


def test_wrong_input_of_a_run_is_explained(over_wire, tmp_path, capsys):
    fleet = over_wire.committed("detector/1.0.0/default", scaling(2))
    fleet.stop()
    np.save(tmp_path / "x.npy", np.zeros((1, 5), np.float32))
    assert main(["run", "--home", str(over_wire.path), "detector", str(tmp_path / "x.npy")]) == 2
    assert "expected x: float32" in capsys.readouterr().err


def test_models_go_on_serving_after_stop(world):
    fleet = world.committed("detector/1.0.0/default", scaling(2))
    prove(fleet)
    model = fleet.model("detector")
    fleet.stop()
    assert float(model.run(X)["y"][0, 1]) == 2.0


def imported_by(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_protocol_loads_neither_onnxruntime_nor_tuf():
    modules = imported_by("import device_sdk.protocol.polls, device_sdk.protocol.batches")
    assert not modules & {"onnxruntime", "tuf", "numpy", "requests", "securesystemslib", "django"}


def test_public_names_are_found_and_the_sdk_needs_no_django():
    modules = imported_by(
        "import device_sdk; [getattr(device_sdk, name) for name in device_sdk.__all__]; from device_sdk import Fleet"
    )
    assert "onnxruntime" in modules
    assert not {module for module in modules if module.split(".")[0] in {"django", "fleet"}}


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Flete"):
        _ = device_sdk.Flete


LATER = {"status": 429, "code": "too_many_failures", "retry_after": 40.0}


def test_enrolment_comes_back_when_the_server_says_and_not_before(tmp_path):
    server = Server()
    home = provisioned(tmp_path / "device", server)
    granting(server)
    server.faults[ENROL] = [TransferError("later", **LATER), TransferError("later", **{**LATER, "status": 503})]
    waits = []
    assert enrol(home.path, "cam-1", transport=server, patience=200, wait=waits.append) == "active"
    assert len(waits) == 2
    assert all(40 <= wait <= 50 for wait in waits)  # spread: a whole site was told the same


def test_enrolment_waits_no_longer_than_its_patience_and_never_for_a_refusal(tmp_path):
    server = Server()
    home = provisioned(tmp_path / "device", server)
    granting(server)
    waits = []
    for patience, fault in [
        (100, [TransferError("later", **LATER)] * 9),
        (0, [TransferError("later", **LATER)]),
        (100, [TransferError("no", status=401, code="enrolment_unknown", retry_after=1.0)]),
        (100, [TransferError("no answer")]),
    ]:
        server.faults[ENROL] = list(fault)
        with pytest.raises(TransferError):
            enrol(home.path, "cam-1", transport=server, patience=patience, wait=waits.append)
    assert len(waits) == 2
