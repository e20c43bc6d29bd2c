"""The mirror of a site: Debian's nginx by our file, before the real server, and real devices that prefer it."""

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import requests
from onnx import helper

from device_sdk import Fleet
from device_sdk.protocol.polls import BLOBS
from tests.attacks.world import Proxy, Shop, eventually, proxy_to
from tests.deploy.test_deploy import DEPLOY, MAIN, tool
from tests.live import KNOWN, LiveServer
from tests.sdk.loopback import Reply
from tests.sdk.world import graph
from tests.services import free_port, running

pytestmark = pytest.mark.timeout(120)

PIECE = 1024 * 1024
DOWN = Reply(503, b"down")
UPSTREAM = "/api/mirror/v1/blobs/"


@dataclass
class Mirror:
    url: str
    folder: Path
    line: Proxy  # from the site to the server

    def get(self, sha: str, **headers: str) -> requests.Response:
        return requests.get(f"{self.url}{BLOBS}{sha}", headers=headers, timeout=30)

    def fetched(self) -> int:
        """Times that the server was asked for a piece of a file."""
        return sum(asked.path.startswith(UPSTREAM) for asked in list(self.line.asked))

    def logged(self) -> str:
        return (self.folder / "fleet-mirror.log").read_text()


def large(factor: float) -> bytes:
    """A model of some pieces, that no other has a part of."""
    pad = np.frombuffer(secrets.token_bytes(3 * PIECE), np.uint8)
    return graph([helper.make_node("Mul", ["x", "k"], ["y"])], {"k": np.float32(factor), "pad": pad})


@pytest.fixture(scope="module")
def shop(embedded: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def token(shop: Shop) -> str:
    said = shop.server.manage("api_token", f"site-{shop.model}", "--scope", "mirror", "--model", shop.model)
    return said.split()[0]


@pytest.fixture
def mirror(shop: Shop, token: str, tmp_path: Path) -> Iterator[Mirror]:
    """Our file as it is, but for the folders, the port, and the server's address, which is plain http here."""
    port = free_port()
    with proxy_to(shop.server.url) as line:
        text = (DEPLOY / "nginx" / "mirror.conf").read_text()
        for real, here in {
            "/var/cache/nginx/fleet": f"{tmp_path}/cache",
            "/var/log/nginx": str(tmp_path),
            "/etc/fleet/mirror-token.conf": f"{tmp_path}/mirror-token.conf",
            "server fleet.example.org:443;": f"server {line.host};",
            "https://fleet_origin": "http://fleet_origin",
            "Host fleet.example.org;": "Host 127.0.0.1;",
            "listen 8080;": f"listen {port};",
            "listen [::]:8080;": f"listen [::]:{port};",
        }.items():
            assert real in text
            text = text.replace(real, here)
        if not Path("/proc/net/if_inet6").exists():
            text = re.sub(r"listen \[::\].*", "", text)
        (tmp_path / "fleet.conf").write_text(text)
        (tmp_path / "mirror-token.conf").write_text(f'proxy_set_header Authorization "Bearer {token}";\n')
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        scratch = "\n".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
        (tmp_path / "nginx.conf").write_text(MAIN.format(folder=tmp_path, scratch=scratch))
        user = ["-g", "user root;"] if os.getuid() == 0 else []
        command = [tool("nginx"), "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), *user]
        command += ["-e", str(tmp_path / "error.log")]
        ready = lambda: socket.create_connection(("127.0.0.1", port), 1).close()  # noqa: E731
        with running(command, tmp_path / "out.log", ready=ready):
            yield Mirror(f"http://127.0.0.1:{port}", tmp_path, line)


def update(shop: Shop, line: Proxy, mirror: str) -> tuple[str, float]:
    """A new device that reaches the server by `line`: the state of its model after one update, and what it answers."""
    home = shop.enrol(f"cam-{secrets.token_hex(3)}", line.url)
    with Fleet.open(home, mirror=mirror, rehearse=False) as fleet:
        status = fleet.update_once().models[shop.model]
        answer = fleet.model(shop.model).run({"x": np.ones((1, 4), np.float32)})["y"][0, 0]
    return status.state, float(answer)


def test_the_first_device_fills_the_cache_and_the_next_needs_no_line(shop, mirror):
    factor = shop.new_factor()
    shop.roll_out(factor, large(factor))
    with proxy_to(shop.server.url) as line:
        line.attack(BLOBS, DOWN)  # the server itself gives no file to these devices
        assert update(shop, line, mirror.url) == ("probation", factor)
        pieces = mirror.fetched()
        assert pieces >= 4  # 3 MiB and a little, each piece once
        mirror.line.attack("/", DOWN)
        assert update(shop, line, mirror.url) == ("probation", factor)
        assert mirror.fetched() == pieces
        asked = [each.path for each in line.asked if each.path.startswith(BLOBS)]
        assert [path for path in asked if not path.endswith("/patches")] == []


def test_no_credential_reaches_the_mirror_and_only_its_own_token_leaves_it(shop, mirror, token):
    factor = shop.new_factor()
    shop.roll_out(factor, large(factor))
    with proxy_to(shop.server.url) as line:
        update(shop, line, mirror.url)
    sent = [each.headers for each in mirror.line.asked]
    assert sent
    assert {headers["Authorization"] for headers in sent} == {f"Bearer {token}"}
    forged = mirror.get("ab" * 32, Authorization="Bearer mine", Cookie="sessionid=1", X_Forwarded_For="6.6.6.6")
    assert forged.status_code == 404
    last = mirror.line.asked[-1].headers
    assert last["Authorization"] == f"Bearer {token}"
    assert not {"Cookie", "X-Forwarded-For", "X_Forwarded_For"} & set(last)


def test_a_device_goes_to_the_server_where_the_mirror_has_nothing(shop, mirror):
    factor = shop.new_factor()
    shop.roll_out(factor, large(factor))
    mirror.line.attack("/", DOWN)
    with proxy_to(shop.server.url) as line:
        assert update(shop, line, mirror.url) == ("probation", factor)
        assert any(each.path.startswith(BLOBS) for each in line.asked)


def test_a_device_asks_the_mirror_of_its_site_and_leaves_it_when_it_lies(shop, mirror):
    """Told by the server alone: nothing on the device names a mirror."""
    with proxy_to(shop.server.url) as line, proxy_to(shop.server.url) as liar:
        home = shop.enrol(f"cam-{secrets.token_hex(3)}", line.url)
        row, site = shop.device_row(home.name)["id"], {"site": shop.model}
        shop.api("POST", f"devices/{row}/labels/", {"labels": site})
        group = shop.api(
            "POST", "groups/", {"name": shop.model, "selector": f"site={shop.model}", "mirror": mirror.url}
        )
        with Fleet.open(home, rehearse=False) as fleet:
            line.attack(BLOBS, DOWN)  # the server itself gives no file
            assert updated(shop, fleet) == "probation"
            assert mirror.fetched() >= 4
            assert f"{mirror.url}, of the group {shop.model}" in shop.page(home.name)

            shop.api("PATCH", f"groups/{group['id']}/", {"mirror": liar.url})
            line.relent()
            liar.attack(BLOBS, Reply(200, bytes(len(large(1)))))
            assert updated(shop, fleet) == "probation"
        assert [each.path.startswith(BLOBS) for each in liar.asked] == [True]
        assert [asked for asked in liar.asked if "Authorization" in asked.headers] == []
        eventually(lambda: "bad_mirror" in shop.page(home.name), "the device's page to say so")


def updated(shop, fleet):
    """A new release goes out, and the device polls until it has it: the state of its model."""
    factor = shop.new_factor()
    shop.roll_out(factor, large(factor))
    time.sleep(KNOWN)
    state = fleet.update_once().models[shop.model].state
    answer = fleet.model(shop.model).run({"x": np.ones((1, 4), np.float32)})["y"][0, 0]
    assert float(answer) == factor
    return state


def test_a_range_is_answered_from_the_cache_byte_for_byte(shop, mirror):
    data = large(1)
    shop.release(shop.new_factor(), data)
    sha = sha256(data).hexdigest()
    whole = mirror.get(sha)
    assert (whole.status_code, whole.content == data) == (200, True)
    fetched = mirror.fetched()
    for start, end in ((0, 10), (PIECE - 5, PIECE + 5), (2 * PIECE, len(data))):
        part = mirror.get(sha, Range=f"bytes={start}-{end - 1}")
        assert (part.status_code, part.content) == (206, data[start:end])
        assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(data)}"
    assert mirror.fetched() == fetched
    assert mirror.get(sha, Range=f"bytes={len(data)}-").status_code == 416


def test_it_serves_nothing_but_files_by_their_hash(mirror):
    for path in ("/", "/admin/", "/api/device/v1/poll", f"{BLOBS}{'ab' * 32}/patches", f"{BLOBS}{'AB' * 32}", BLOBS):
        assert requests.get(mirror.url + path, timeout=10).status_code == 404
    assert requests.post(f"{mirror.url}{BLOBS}{'ab' * 32}", timeout=10).status_code == 403
    assert mirror.fetched() == 0


def test_a_mirror_gets_bytes_and_no_redirect_wherever_files_are_kept(live, tmp_path):
    """By ranges, as nginx asks; from S3 too, where devices themselves are sent to a presigned address."""
    shop = Shop(live, tmp_path)
    data = large(1)
    shop.release(shop.new_factor(), data)
    said = shop.server.manage("api_token", f"site-{shop.model}", "--scope", "mirror", "--model", shop.model)
    headers = {"Authorization": f"Bearer {said.split()[0]}"}
    address = f"{shop.server.url}{UPSTREAM}{sha256(data).hexdigest()}"
    whole = requests.get(address, headers=headers, timeout=30, allow_redirects=False)
    assert (whole.status_code, whole.content == data) == (200, True)
    part = requests.get(address, headers={**headers, "Range": "bytes=1000-1999"}, timeout=30, allow_redirects=False)
    assert (part.status_code, part.content, int(part.headers["Content-Length"])) == (206, data[1000:2000], 1000)
    beyond = requests.get(address, headers={**headers, "Range": f"bytes={len(data)}-"}, timeout=30)
    assert beyond.status_code == 416
