"""A mirror is a stranger near by: asked first, told nothing, believed in nothing, and left at the first doubt."""

import threading
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import pytest

from device_sdk.config import Home
from device_sdk.download import fetch
from device_sdk.errors import SetupError, TransferError, UntrustedError
from device_sdk.mirror import SHUN_FAILING, SHUN_LYING, Mirror, Mirrors
from device_sdk.protocol.polls import BLOBS
from device_sdk.store import Store
from device_sdk.traffic import Clock, Limits, Traffic
from device_sdk.transport import Transport
from tests.sdk.loopback import Reply, blob_route, loopback
from tests.sdk.world import World, scaling
from tests.simulator import release

DATA = b"weights " * 60_000
OTHER = b"weighty " * 60_000
MANIFEST, _ = release("detector/1.0.0/default", {"model.onnx": DATA})
(FILE,) = MANIFEST.files
PATH = BLOBS + FILE.sha256
MODEL = scaling(2.0)


@pytest.fixture
def server():
    with loopback() as server:
        server.on(PATH, blob_route(DATA))
        yield server


@pytest.fixture
def near():
    with loopback() as near:
        near.on(PATH, blob_route(DATA))
        yield near


@pytest.fixture
def time():
    return {"now": 1000.0}


@pytest.fixture
def mirror(near, time):
    with closing(Transport(near.url, (), "", stall_seconds=1)) as transport:
        yield Mirror(transport, monotonic=lambda: time["now"])


@pytest.fixture
def told(mirror):
    told = []
    mirror.on_bad = lambda error: told.append(error.code)
    return told


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def transport(server):
    with closing(Transport(server.url, [], "7.1.k1.mac")) as transport:
        yield transport


def download(transport, store, mirror, **changes):
    fetch(transport, store, MANIFEST, mirror=mirror, **{"deadline": 20, **changes})


def again(transport, store, mirror):
    """Another file of the same bytes, so to say."""
    (store._blobs / FILE.sha256).unlink()
    download(transport, store, mirror)


def test_the_mirror_is_asked_first_and_never_shown_the_credential(server, near, transport, store, mirror):
    download(transport, store, mirror)
    assert store.has_blob(FILE)
    assert server.asked == []
    assert [("Authorization" in asked.headers, asked.path) for asked in near.asked] == [(False, PATH)]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(500),
        Reply(404),
        Reply(401, b'{"code": "unauthorized"}'),
        Reply(200, b"<html>log in</html>", {"Content-Type": "text/html"}),
        Reply(302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}),
        Reply(200, DATA[:1000], {"Content-Length": str(len(DATA))}),
        Reply(200, DATA + b"more"),
        Reply(200, OTHER),
        Reply(206, DATA[:10], {"Content-Range": f"bytes 0-9/{len(DATA)}"}),
        Reply(200, DATA[: len(DATA) // 2]),
        Reply(raw=[b"nonsense\r\n\r\n"]),
        Reply(raw=[]),
    ],
)
def test_whatever_the_mirror_says_the_file_comes_in_the_same_attempt(near, transport, store, mirror, reply):
    near.on(PATH, reply)
    download(transport, store, mirror)
    assert store.has_blob(FILE)


def test_wrong_bytes_are_thrown_away_told_once_and_the_mirror_is_shunned_for_a_day(
    server, near, transport, store, mirror, told, time
):
    near.on(PATH, Reply(200, OTHER))
    download(transport, store, mirror)
    assert (told, len(near.asked), len(server.asked)) == (["hash_mismatch"], 1, 1)
    time["now"] += SHUN_LYING - 1
    again(transport, store, mirror)
    assert (told, len(near.asked)) == (["hash_mismatch"], 1)
    time["now"] += 2
    near.on(PATH, blob_route(DATA))
    again(transport, store, mirror)
    assert (len(near.asked), len(server.asked)) == (2, 2)


def test_a_mirror_that_fails_is_left_alone_for_a_while_and_is_no_news(
    server, near, transport, store, mirror, told, time
):
    near.on(PATH, Reply(503))
    download(transport, store, mirror)
    again(transport, store, mirror)
    assert (told, len(near.asked)) == ([], 1)
    time["now"] += SHUN_FAILING + 1
    again(transport, store, mirror)
    assert len(near.asked) == 2


def test_a_mirror_that_only_lacks_a_file_is_asked_for_others(near, transport, store, mirror):
    near.on(PATH, Reply(404))
    download(transport, store, mirror)
    assert not mirror.is_asked_for(FILE.sha256)
    assert mirror.is_asked_for("ab" * 32)


def test_a_cut_at_the_mirror_goes_on_at_the_server_where_it_stood(server, near, transport, store, mirror):
    half = len(DATA) // 2
    near.on(PATH, Reply(200, DATA[:half], {"Content-Length": str(len(DATA))}))
    download(transport, store, mirror)
    (asked,) = server.asked
    assert asked.headers["Range"] == f"bytes={half}-"


def test_wrong_bytes_before_a_cut_are_found_out_and_the_server_is_asked_for_all(
    server, near, transport, store, mirror, told
):
    half = len(DATA) // 2
    near.on(PATH, Reply(200, OTHER[:half], {"Content-Length": str(len(DATA))}))
    download(transport, store, mirror)
    assert [asked.headers.get("Range") for asked in server.asked] == [f"bytes={half}-", None]
    assert told == ["hash_mismatch"]
    assert store.has_blob(FILE)


def test_what_a_lying_mirror_left_before_a_restart_costs_one_more_download_and_no_refusal(
    server, near, transport, store, mirror, told
):
    store.append(FILE.sha256, OTHER[:1000])
    near.on(PATH, Reply(503))
    download(transport, store, mirror)
    assert store.has_blob(FILE)
    assert told == ["hash_mismatch"]


def test_what_it_left_is_found_out_also_while_it_is_shunned(server, near, transport, store, mirror):
    mirror.failed(FILE.sha256, TransferError("away", status=503))
    store.append(FILE.sha256, OTHER[:1000])
    download(transport, store, mirror)
    assert store.has_blob(FILE)
    assert near.asked == []


def test_an_answer_that_no_honest_mirror_gives_counts_as_a_lie(near, transport, store, mirror, told, time):
    near.on(PATH, Reply(302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}))
    download(transport, store, mirror)
    time["now"] += SHUN_FAILING + 1
    again(transport, store, mirror)
    assert (told, len(near.asked)) == (["redirect"], 1)


def test_a_download_resumes_at_the_mirror(near, transport, store, mirror):
    store.append(FILE.sha256, DATA[:1000])
    download(transport, store, mirror)
    assert [asked.headers.get("Range") for asked in near.asked] == ["bytes=1000-"]


def test_a_mirror_that_drips_is_given_up_in_seconds(server, near, transport, store, time):
    def drips():
        for at in range(0, len(DATA), 1000):
            pause.wait(0.1)
            yield DATA[at : at + 1000]

    pause = threading.Event()
    near.on(PATH, Reply(200, drips()))
    with closing(Transport(near.url, (), "", stall_seconds=0.5, slowest=16 * 1024)) as slow:
        download(transport, store, Mirror(slow))
    assert server.asked
    assert store.has_blob(FILE)


def test_a_server_that_lies_is_still_refused(server, near, transport, store, mirror):
    near.on(PATH, Reply(404))
    server.on(PATH, Reply(200, OTHER))
    with pytest.raises(UntrustedError) as caught:
        download(transport, store, mirror)
    assert caught.value.code == "hash_mismatch"
    assert not store.has_blob(FILE)


def test_without_the_server_a_mirror_that_fails_is_a_failed_transfer(server, near, transport, store, mirror):
    near.on(PATH, Reply(503))
    server.on(PATH, Reply(502))
    with pytest.raises(TransferError):
        download(transport, store, mirror)
    assert store.partial_length(FILE.sha256) == 0


def test_a_capped_download_comes_from_the_mirror_in_pieces(server, near, transport, store, mirror):
    download(transport, store, mirror, traffic=Traffic(None, Limits(daily=10**6, rate=5_000), quick()))
    assert server.asked == []
    starts = [int(asked.headers["Range"].removeprefix("bytes=").split("-")[0]) for asked in near.asked]
    assert starts == sorted(starts)
    assert {after - before for before, after in pairwise(starts)} == {100_000}


def quick():
    clock = {"now": 0.0}

    def wait(seconds):
        clock["now"] += seconds

    return Clock(monotonic=lambda: clock["now"], wait=wait)


# As a device has it


def a_device(tmp_path, near, **options):
    """Update once by a mirror; the world, and the state that the model is in."""
    world = World(tmp_path / "home")
    manifest = world.server.publish("detector/1.0.0/default", MODEL)
    near.on(BLOBS + manifest.files[0].sha256, options.pop("reply", blob_route(MODEL)))
    world.server.assign(manifest, mirror=options.pop("signed", ""))
    home = Home(world.path)
    provision = replace(home.provision(), mirror=options.pop("provisioned", ""))
    home.provision_file.write_bytes(provision.to_bytes())
    with world.open(**options) as fleet:
        state = fleet.update_once().models["detector"].state
    return world, state


def from_server(world):
    return [call for call in world.server.calls if call.startswith(f"GET {BLOBS}") and not call.endswith("/patches")]


def test_a_provisioned_mirror_is_used_without_the_credential(tmp_path, near):
    world, state = a_device(tmp_path, near, provisioned=near.url)
    assert (state, from_server(world)) == ("probation", [])
    assert near.asked
    assert "Authorization" not in near.asked[0].headers


@pytest.mark.parametrize(("mirror", "asked"), [(None, 1), ("", 0)])
def test_the_host_program_may_turn_a_provisioned_mirror_off(tmp_path, near, mirror, asked):
    world, state = a_device(tmp_path, near, provisioned=near.url, mirror=mirror)
    assert (state, len(near.asked), len(from_server(world))) == ("probation", asked, 1 - asked)


def test_the_mirror_that_the_view_names_is_used_without_the_credential(tmp_path, near):
    world, state = a_device(tmp_path, near, signed=near.url)
    assert (state, len(near.asked), from_server(world)) == ("probation", 1, [])
    assert "Authorization" not in near.asked[0].headers


@pytest.mark.parametrize(("mirror", "asked"), [(None, 1), ("", 0), ("http://127.0.0.1:9", 0)])
def test_the_host_program_overrules_the_view(tmp_path, near, mirror, asked):
    world, state = a_device(tmp_path, near, signed=near.url, mirror=mirror)
    assert (state, len(near.asked), len(from_server(world))) == ("probation", asked, 1 - asked)


def test_the_view_overrules_what_was_provisioned(tmp_path, near):
    with loopback() as old:
        world, state = a_device(tmp_path, near, signed=near.url, provisioned=old.url)
        assert (state, len(near.asked), old.asked, from_server(world)) == ("probation", 1, [], [])


def test_where_the_view_names_none_the_provisioned_one_is_asked(tmp_path, near):
    world, state = a_device(tmp_path, near, signed="http://no/mirror", provisioned=near.url)
    assert (state, len(near.asked), from_server(world)) == ("probation", 1, [])


def test_what_is_known_of_a_mirror_is_kept_until_the_view_names_another():
    mirrors = Mirrors(None, "", stall_seconds=1)
    first = mirrors.choose("http://near")
    first.lied(FILE.sha256)
    assert not mirrors.choose("http://near").is_asked_for(FILE.sha256)
    assert mirrors.choose("http://nearer").is_asked_for(FILE.sha256)
    assert mirrors.choose("") is None


def test_a_lying_mirror_of_the_view_is_reported_and_the_file_comes_from_the_server(tmp_path, near):
    world, state = a_device(tmp_path, near, signed=near.url, reply=Reply(200, scaling(3.0)))
    assert (state, len(from_server(world))) == ("probation", 1)
    assert [event.reason for event in world.server.events if event.kind == "refused"] == ["bad_mirror"]


def test_a_lying_mirror_is_reported_to_the_server_and_the_update_goes_on(tmp_path, near):
    world, state = a_device(tmp_path, near, mirror=near.url, reply=Reply(200, scaling(3.0)))
    assert state == "probation"
    refused = [event for event in world.server.events if event.kind == "refused"]
    assert [(event.reason, event.model) for event in refused] == [("bad_mirror", "detector")]


@pytest.mark.parametrize("address", ["edge.local", "ftp://edge.local", "http://"])
def test_an_address_that_is_none_is_refused_at_the_start(tmp_path, near, address):
    with pytest.raises(SetupError):
        a_device(tmp_path, near, provisioned=address)
    with pytest.raises(SetupError):
        World(tmp_path / "other").open(mirror=address)
