"""What an update waits for: conditions signed in the assignment, answered by the host's probes or by Linux."""

import threading

import pytest

from device_sdk.errors import SetupError
from device_sdk.probes import Probes, free_memory, is_charging, is_idle
from device_sdk.protocol.assignment import Assignment, Conditions, Window
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import ReleasePath
from tests.sdk.world import World, scaling

FLAGS = ("unmetered", "charging", "idle")
REASONS = {"unmetered": "metered", "charging": "charging", "idle": "idle"}
NOON = Window(11 * 60, 13 * 60)
NIGHT = Window(120, 300)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def waits(world, *, probes=None, **changes):
    """Assign 1.0.0 under these terms, poll once, and say what it waits for; "": it is on trial."""
    world.server.assign(world.server.publish("detector/1.0.0/default", scaling(2.0)), **changes)
    with world.open(probes=probes or {}) as fleet:
        status = fleet.update_once().models["detector"]
        told = [event.reason for event in world.server.events if event.kind == "waiting"]
    assert told == ([status.reason] if status.state == "waiting" else [])
    assert status.state in {"waiting", "probation"}
    return status.reason if status.state == "waiting" else ""


# On the wire


def test_conditions_survive_the_round_trip_and_stand_there_only_where_they_ask_for_something():
    conditions = Conditions(charging=True, free_disk=10**9, rate=4096)
    assignment = Assignment(
        "detector", ReleasePath("detector", "1.0.0", "default"), 1, "ab" * 32, conditions=conditions
    )
    custom = assignment.to_custom()
    assert custom["conditions"] == {"charging": True, "free_disk": 10**9, "rate": 4096}
    assert Assignment.parse("detector", 1, "ab" * 32, custom) == assignment
    assert "conditions" not in Assignment("detector").to_custom()


def test_a_condition_of_a_later_server_is_passed_over():
    assert Conditions.parse({"charging": True, "full_moon": True}) == Conditions(charging=True)


@pytest.mark.parametrize("wrong", [{"charging": 1}, {"free_disk": -1}, {"rate": 0.5}, {"daily": 2**60}, []])
def test_conditions_that_are_none_are_refused(wrong):
    with pytest.raises(ProtocolError):
        Conditions.parse(wrong)


# Waiting


@pytest.mark.parametrize("name", FLAGS)
def test_an_update_waits_for_the_condition_and_says_which(world, name):
    assert waits(world, probes={name: lambda: False}, conditions=Conditions(**{name: True})) == REASONS[name]


@pytest.mark.parametrize("name", FLAGS)
def test_a_condition_that_nobody_asked_for_holds_up_nothing(world, name):
    assert waits(world, probes={name: lambda: False}) == ""


def test_an_update_goes_on_when_the_condition_holds(world):
    plugged = []
    world.server.assign(
        world.server.publish("detector/1.0.0/default", scaling(2.0)), conditions=Conditions(charging=True)
    )
    with world.open(probes={"charging": lambda: bool(plugged)}) as fleet:
        assert fleet.update_once().models["detector"].reason == "charging"
        fleet.update_once()
        plugged.append(1)
        assert fleet.update_once().models["detector"].state == "probation"
    assert world.server.kinds()[:2] == ["waiting", "downloading"]  # told once, however often it looked


def test_what_cannot_be_told_holds_up_nothing(world):
    everything = Conditions(unmetered=True, charging=True, idle=True, free_memory=10**12)
    names = ("charging", "idle", "free_memory")
    assert waits(world, probes={name: lambda: None for name in names}, conditions=everything) == ""


@pytest.mark.parametrize(("left", "reason"), [(10**6 - 1, "disk"), (10**6 + 10**6, "")])
def test_so_much_of_the_disk_must_stay_free_after_the_download(world, left, reason):
    assert waits(world, probes={"free_disk": lambda: left}, conditions=Conditions(free_disk=10**6)) == reason


def test_the_release_itself_needs_room_beside_what_must_stay_free(world):
    size = len(scaling(2.0))
    probes = {"free_disk": lambda: 10**6 + size - 1}
    assert waits(world, probes=probes, conditions=Conditions(free_disk=10**6)) == "disk"


@pytest.mark.parametrize(("free", "reason"), [(10**6 - 1, "memory"), (10**6, "")])
def test_so_much_memory_must_be_free(world, free, reason):
    assert waits(world, probes={"free_memory": lambda: free}, conditions=Conditions(free_memory=10**6)) == reason


def test_an_urgent_release_waits_for_room_and_for_nothing_else(world):
    no = dict.fromkeys(FLAGS, lambda: False)
    asked = Conditions(unmetered=True, charging=True, idle=True)
    assert waits(world, probes=no, conditions=asked, window=NIGHT, urgent=True) == ""


@pytest.mark.parametrize(("name", "reason"), [("free_disk", "disk"), ("free_memory", "memory")])
def test_an_urgent_release_waits_for_room(world, name, reason):
    assert waits(world, probes={name: lambda: 5}, conditions=Conditions(**{name: 10**6}), urgent=True) == reason


# Probes that fail


def broken():
    raise OSError("no such sensor")


@pytest.mark.parametrize("probe", [broken, lambda: "yes", lambda: float("nan"), lambda: [1]])
def test_a_broken_probe_holds_an_update_and_says_so(world, probe):
    assert waits(world, probes={"charging": probe}, conditions=Conditions(charging=True)) == "charging: probe_failed"


def test_a_broken_probe_holds_up_no_urgent_release(world):
    assert waits(world, probes={"free_disk": broken}, conditions=Conditions(free_disk=1), urgent=True) == ""


def test_a_probe_that_hangs_costs_one_thread_and_a_moment_each_time(caplog):
    release, calls = threading.Event(), []

    def hangs():
        calls.append(1)
        release.wait(30)
        return True

    probes = Probes({"idle": hangs}, disk=lambda: None, seconds=0.05)
    asked = Conditions(idle=True)
    said = [probes.unmet(asked, urgent=False, missing=0) for _ in range(5)]
    assert said == ["idle: probe_failed"] * 5
    assert len(calls) == 1
    assert caplog.text.count("the probe idle") == 1  # once, not at every look
    release.set()
    probes._asking["idle"].join(5)
    assert probes.unmet(asked, urgent=False, missing=0) == ""


def test_a_probe_of_no_known_name_is_a_mistake(world):
    with pytest.raises(SetupError, match="moonlight"):
        world.open(probes={"moonlight": lambda: True})


# In the middle of a download


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"conditions": Conditions(charging=True)}, "charging"),
        ({"window": NOON}, "window"),
        ({"conditions": Conditions(idle=True)}, ""),  # a download is no idleness: it would end itself
    ],
)
def test_a_download_that_takes_long_stops_when_the_condition_does_and_keeps_what_came(world, terms, reason):
    manifest = world.server.publish("detector/1.0.0/default", scaling(2.0))
    world.server.assign(manifest, **terms)
    holds = [True]

    def slow(url, **_):
        data = world.server.simulator.blobs[manifest.files[0].sha256]
        yield data[:50]
        world.time.seconds += 31
        world.time.second_of_day = 14 * 3_600.0
        holds.clear()
        yield data[50:]

    world.server.pieces = slow
    probes = {name: lambda: bool(holds) for name in ("charging", "idle")}
    with world.open(probes=probes) as fleet:
        status = fleet.update_once().models["detector"]
        come = fleet._store.partial_length(manifest.files[0].sha256)
    assert status.reason == reason
    assert (status.state, come > 50) == (("waiting", True) if reason else ("probation", False))


# Linux


def supply(folder, name, **files):
    (folder / name).mkdir(parents=True)
    for key, text in files.items():
        (folder / name / key).write_text(text + "\n")


@pytest.mark.parametrize(
    ("supplies", "charging"),
    [
        ({}, True),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Full"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}, "AC": {"type": "Mains", "online": "1"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}, "AC": {"type": "Mains", "online": "0"}}, False),
        ({"mouse": {"type": "Battery", "status": "Discharging", "scope": "Device"}}, True),
    ],
)
def test_the_power_supply_is_read(tmp_path, supplies, charging):
    for name, files in supplies.items():
        supply(tmp_path, name, **files)
    assert is_charging(tmp_path) is charging


def test_a_machine_without_power_supplies_is_on_mains(tmp_path):
    assert is_charging(tmp_path / "none") is True


@pytest.mark.parametrize(
    ("load", "pressure", "idle"),
    [
        ("0.90 0 0", "some avg10=1.20 avg60=0 avg300=0 total=1", True),
        ("1.10 0 0", "some avg10=0.00 avg60=0 avg300=0 total=1", False),
        ("0.10 0 0", "some avg10=25.00 avg60=0 avg300=0 total=1", False),
        ("0.10 0 0", None, True),  # a kernel without pressure
        (None, None, None),
    ],
)
def test_idleness_is_read_from_load_and_pressure(tmp_path, load, pressure, idle):
    if load:
        (tmp_path / "loadavg").write_text(load)
    if pressure:
        (tmp_path / "pressure").mkdir()
        (tmp_path / "pressure" / "cpu").write_text(pressure)
    assert is_idle(tmp_path, processors=2) is idle


def test_free_memory_is_read(tmp_path):
    assert free_memory(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1234 kB\nCached: 5 kB\n")
    assert free_memory(tmp_path) == 1234 * 1024
    assert (free_memory() or 0) > 0  # this machine's own
