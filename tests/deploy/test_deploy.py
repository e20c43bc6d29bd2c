"""The files that run Fleet for real, read by the programs that will: systemd, nginx, granian, Celery, Django."""

import gzip
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from django.core.management import get_commands

from device_sdk.protocol import limits
from fleet.operations.reference import settings_of
from fleet.trust.keystore import Keystore
from tests.services import free_port, running

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
HOST = "fleet.example.org"
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = Path(sys.executable).parent


def tool(name: str) -> str:
    found = shutil.which(name, path=SEARCH)
    assert found, f"{name} is not installed; .ci/tools installs it"
    return found


# --- systemd ---------------------------------------------------------------------------------------------------------
def verify(folder: Path, units: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As systemd would read them on a machine where Fleet is installed under `folder`."""
    programs = folder / "opt/fleet/.venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "granian", "celery"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    paths = []
    for name, text in units.items():
        paths.append(folder / name)
        paths[-1].write_text(text.replace("/opt/fleet", str(folder / "opt/fleet")))
    command = [tool("systemd-analyze"), "verify", "--man=no", "--generators=no", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def unit_texts() -> dict[str, str]:
    return {path.name: path.read_text() for path in UNITS}


def lines_of(unit: Path, key: str) -> list[str]:
    """The values of a key, continued lines joined."""
    text = unit.read_text().replace("\\\n", " ")
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def test_there_are_units_for_web_worker_and_clock():
    assert [path.name for path in UNITS] == ["fleet-beat.service", "fleet-web.service", "fleet-worker.service"]


def test_systemd_reads_the_units_without_a_complaint(tmp_path):
    done = verify(tmp_path, unit_texts())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("good", "bad"),
    [("ProtectSystem=strict", "ProtectSytem=strict"), ("Restart=always", "Restart=often"), ("/bin/granian", "/bin/x")],
)
def test_that_check_would_notice(tmp_path, good, bad):
    texts = unit_texts()
    assert good in texts["fleet-web.service"]
    done = verify(tmp_path, {"fleet-web.service": texts["fleet-web.service"].replace(good, bad)})
    assert done.stderr != ""


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_the_units_are_hardened(unit):
    """systemd's own measure, 0 to 100; what runs as root without any of it scores 96."""
    command = [tool("systemd-analyze"), "security", "--offline=yes", "--threshold=20", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-400:]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_the_programs_know_the_options_that_the_units_give_them(unit):
    (command,) = lines_of(unit, "ExecStart")
    program, *arguments = shlex.split(command)
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    asked = [arguments[2]] if program.endswith("celery") else []  # --app fleet <command>
    prefix = ["--app", "fleet", *asked] if asked else []
    done = subprocess.run(
        [str(PROGRAMS / Path(program).name), *prefix, "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    known = set(re.findall(r"--[a-z0-9-]+", done.stdout)) | {"--app"}
    assert options <= known
    paths = [word.replace("/opt/fleet", str(ROOT), 1) for word in arguments if word.startswith("/opt/fleet")]
    assert all(Path(path).exists() for path in paths)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_variables_on_a_command_line_have_defaults_in_the_unit(unit):
    (command,) = lines_of(unit, "ExecStart")
    given = {word.partition("=")[0] for line in lines_of(unit, "Environment") for word in line.split()}
    assert set(re.findall(r"\$\{(\w+)\}", command)) <= given


def test_the_shell_reads_the_manage_wrapper():
    wrapper = DEPLOY / "systemd" / "fleet-manage"
    assert os.access(wrapper, os.X_OK)
    subprocess.run(["/bin/sh", "-n", str(wrapper)], check=True)


# --- settings --------------------------------------------------------------------------------------------------------
def example() -> dict[str, str]:
    lines = (DEPLOY / "fleet.env.example").read_text().splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def test_every_variable_of_the_example_is_a_setting():
    known = {setting.name for setting in settings_of(ROOT / "fleet" / "settings.py")}
    assert set(example()) <= known
    text = (DEPLOY / "fleet.env.example").read_text()
    assert set(re.findall(r"FLEET_[A-Z0-9_]+", text)) <= known


def test_the_example_is_plain_enough_for_systemd():
    for name, value in example().items():
        assert re.fullmatch(r"[\w:/.,@+-]*", value), name


def checked(extra: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLEET_", "DJANGO_"))}
    Keystore(folder / "keys").make("online")
    here = {
        "FLEET_VAR": str(folder / "var"),
        "FLEET_ONLINE_KEY_URI": f"file2:{folder}/keys/online.pem",
        "FLEET_ONLINE_KEY_PUBLIC": f"{folder}/keys/online.pub.json",
    }
    command = [sys.executable, "manage.py", "check", "--deploy", "--fail-level", "WARNING"]
    env = {**inherited, **example(), **here, **extra, "DJANGO_SETTINGS_MODULE": "fleet.settings"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


FILLED = {
    "FLEET_SECRET_KEY": "5e" * 16 + "a-secret-of-many-different-letters",
    "FLEET_DEVICE_SECRETS": "prod-1:" + "5e" * 32,
    "FLEET_METRICS_TOKEN": "5e" * 32,
    "FLEET_DATABASE_URL": "postgres://fleet:secret@127.0.0.1/fleet",
    "FLEET_S3_BUCKET": "fleet-objects",
}


def test_the_example_filled_in_passes_every_check_without_a_warning(tmp_path):
    done = checked(FILLED, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_example_as_it_is_does_not_start(tmp_path):
    assert checked({}, tmp_path).returncode != 0


# --- nginx -----------------------------------------------------------------------------------------------------------
@dataclass
class Upstream:
    """Stands for granian: says what it was asked, and by how many connections."""

    port: int
    connections: set[tuple[str, int]] = field(default_factory=set)
    arrived: threading.Event = field(default_factory=threading.Event)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    seen = Upstream(free_port())

    class Echo(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            seen.connections.add(self.client_address)
            seen.arrived.set()
            length = int(self.headers.get("Content-Length") or 0)
            while length > 0:
                chunk = self.rfile.read(min(length, 65536))
                if not chunk:
                    return
                length -= len(chunk)
            told = {"path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}}
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = answer  # noqa: N815  # the base class wants these names

        def log_message(self, *_args) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", seen.port), Echo)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass(frozen=True)
class Nginx:
    folder: Path
    port: int
    plain_port: int
    command: list[str]

    @contextmanager
    def connected(self, name: str = HOST) -> Iterator[HTTPSConnection]:
        context = ssl.create_default_context(cafile=str(self.folder / "tls" / "fullchain.pem"))
        connection = _Named(name, self.port, context=context, timeout=10)
        try:
            yield connection
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        with self.connected() as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


class _Named(HTTPSConnection):
    """Connects to this machine, whatever the name."""

    def connect(self) -> None:
        plain = socket.create_connection(("127.0.0.1", self.port), self.timeout)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)


def certificate(folder: Path) -> None:
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "fullchain.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8
    (folder / "privkey.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
    )


MAIN = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    # What Debian's own nginx.conf says, so that ours agrees with it.
    sendfile on;
    tcp_nopush on;
    types_hash_max_size 2048;
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers on;
    access_log {folder}/access.log;
    gzip on;
    {scratch}
    include {folder}/fleet.conf;
}}
"""


@pytest.fixture(scope="module")
def configured(tmp_path_factory, upstream: Upstream) -> Nginx:
    """Our file as it is, but for the folders and ports of a real machine."""
    folder = tmp_path_factory.mktemp("nginx")
    port, plain_port = free_port(), free_port()
    certificate(folder / "tls")
    (folder / "static").mkdir()
    (folder / "static" / "app.css").write_text("body {}")
    (folder / "static" / "app.css.gz").write_bytes(gzip.compress(b"body {}"))
    text = (DEPLOY / "nginx" / "fleet.conf").read_text()
    for real, here in {
        "/etc/fleet/tls": f"{folder}/tls",
        "/var/lib/fleet": str(folder),
        "/var/log/nginx": str(folder),
        "127.0.0.1:8000;": f"127.0.0.1:{upstream.port};",
        "listen 443": f"listen {port}",
        "listen [::]:443": f"listen [::]:{port}",
        "listen 80": f"listen {plain_port}",
        "listen [::]:80": f"listen [::]:{plain_port}",
    }.items():
        assert real in text
        text = text.replace(real, here)
    if not Path("/proc/net/if_inet6").exists():
        text = re.sub(r"listen \[::\].*", "", text)
    (folder / "fleet.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = "\n".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, scratch=scratch))
    folder.chmod(0o755)
    command = [tool("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    return Nginx(folder, port, plain_port, command)


@pytest.fixture(scope="module")
def nginx(configured: Nginx) -> Iterator[Nginx]:
    def answers() -> None:
        socket.create_connection(("127.0.0.1", configured.port), 1).close()

    user = ["-g", "user root;"] if os.getuid() == 0 else []  # pytest's folders are private to whoever runs it
    with running([*configured.command, *user], configured.folder / "out.log", ready=answers):
        yield configured


def test_nginx_reads_the_file_without_a_complaint(configured):
    done = subprocess.run([*configured.command, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\[(warn|emerg|alert|crit|error)\]", done.stderr), done.stderr


def test_a_request_reaches_the_server_with_the_right_headers_and_no_forged_ones(nginx):
    status, _, body = nginx.ask(
        "GET", "/api/device/v1/poll?root=1",
        Authorization="Bearer 1.1.a.b", X_Forwarded_For="6.6.6.6", X_Forwarded_Proto="http",
        X_Forwarded_Host="evil.example", Forwarded="for=6.6.6.6",
    )  # fmt: skip
    told = json.loads(body)
    assert (status, told["path"]) == (200, "/api/device/v1/poll?root=1")
    headers = told["headers"]
    assert headers["host"] == HOST
    assert headers["x-forwarded-proto"] == "https"
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["authorization"] == "Bearer 1.1.a.b"
    assert not headers.keys() & {"x-forwarded-host", "forwarded", "connection"}


LOCATIONS = [
    "/admin/", "/admin/login/", "/admin/feedback/datasetpart/", "/static/nothing.css", "/api/device/v1/blobs/a",
    "/api/device/v1/batches/a/content", "/api/ci/v1/blobs/a", "/api/ci/v1/models/digits/releases", "/readyz",
    "/metrics",
]  # fmt: skip


@pytest.mark.parametrize("path", LOCATIONS)
def test_every_location_forwards_the_same_headers(nginx, path):
    status, _, body = nginx.ask("GET", path, X_Forwarded_For="6.6.6.6")
    told = json.loads(body)
    assert (status, told["path"]) == (200, path)
    assert (told["headers"]["host"], told["headers"]["x-forwarded-proto"]) == (HOST, "https")
    assert told["headers"]["x-forwarded-for"] == "127.0.0.1"


def test_connections_to_the_server_are_kept(nginx, upstream):
    nginx.ask("GET", "/")
    upstream.connections.clear()
    for _ in range(20):
        nginx.ask("GET", "/")
    assert len(upstream.connections) <= 4  # each nginx worker has its own


def test_connections_of_devices_are_kept(nginx):
    with nginx.connected() as connection:
        for _ in range(3):
            connection.request("GET", "/api/device/v1/poll")
            answer = connection.getresponse()
            answer.read()
            assert connection.sock is not None
            assert answer.getheader("Connection") != "close"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_session_is_resumed(nginx, version):
    """A full handshake costs ten times as much, and every poll of a fleet would be one."""
    context = ssl.create_default_context(cafile=str(nginx.folder / "tls" / "fullchain.pem"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    session = None
    for reused in (False, True):
        with (
            socket.create_connection(("127.0.0.1", nginx.port), 5) as plain,
            context.wrap_socket(plain, server_hostname=HOST, session=session) as connection,
        ):
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            assert connection.recv(8) == b"HTTP/1.1"  # TLS 1.3 sends its session after the handshake
            assert connection.session_reused is reused
            session = connection.session


@pytest.mark.parametrize("version", [b"\x03\x01", b"\x03\x02"], ids=["1.0", "1.1"])
def test_old_tls_is_refused(nginx, version):
    """By a ClientHello of our own: today's OpenSSL would not send one."""
    body = version + bytes(32) + b"\0" + b"\x00\x04\xc0\x09\x00\x2f" + b"\x01\0"
    hello = b"\x01" + len(body).to_bytes(3, "big") + body
    with socket.create_connection(("127.0.0.1", nginx.port), 5) as connection:
        connection.sendall(b"\x16\x03\x01" + len(hello).to_bytes(2, "big") + hello)
        answer = connection.recv(100)
    assert (answer[:1], answer[5:7]) == (b"\x15", b"\x02\x46")  # an alert: fatal, protocol version


def test_another_name_gets_no_certificate(nginx):
    with nginx.connected("other.example.org") as connection, pytest.raises(ssl.SSLError):
        connection.request("GET", "/")


def test_plain_http_is_sent_to_https(nginx):
    with socket.create_connection(("127.0.0.1", nginx.plain_port), 5) as connection:
        connection.sendall(f"GET /admin/?a=1 HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 308")
    assert f"Location: https://{HOST}/admin/?a=1\r\n".encode() in answer


MIB = 1024**2


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/device/v1/batches/a/content", limits.BATCH),
        ("POST", "/api/ci/v1/models/digits/releases", 2 * limits.METADATA + 32 * limits.MANIFEST),
        ("POST", "/api/device/v1/events", limits.EVENT_BODY),
        ("PUT", "/api/ci/v1/blobs/a", 40 * MIB),
    ],
)
def test_the_largest_body_of_the_protocol_passes(nginx, method, path, allowed):
    status, _, body = nginx.ask(method, path, bytes(allowed))
    assert status == 200
    assert json.loads(body)["headers"]["content-length"] == str(allowed)


@pytest.mark.parametrize("path", ["/api/device/v1/events", "/api/device/v1/enrol", "/admin/login/"])
def test_a_larger_body_is_refused_before_it_is_read(nginx, path):
    with nginx.connected() as connection:
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(2 * MIB))
        connection.endheaders()
        assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    ("path", "early"), [("/api/ci/v1/blobs/a", True), ("/api/device/v1/batches/a/content", False)], ids=["ci", "device"]
)
def test_what_ci_uploads_is_passed_on_as_it_comes_and_what_devices_upload_is_not(nginx, upstream, path, early):
    """CI's uploads resume from what the server has; a device's slow one must not hold a thread of the server."""
    upstream.arrived.clear()
    with nginx.connected() as connection:
        connection.putrequest("PUT", path)
        connection.putheader("Content-Length", str(MIB))
        connection.endheaders(bytes(MIB // 2))
        assert upstream.arrived.wait(5 if early else 0.5) is early
        connection.send(bytes(MIB // 2))
        assert connection.getresponse().status == 200


def test_nginx_serves_static_files_itself_compressed(nginx, upstream):
    upstream.arrived.clear()
    status, headers, body = nginx.ask("GET", "/static/app.css", Accept_Encoding="gzip")
    assert headers["content-type"] == "text/css"
    assert (status, headers["content-encoding"], gzip.decompress(body)) == (200, "gzip", b"body {}")
    assert "max-age=3600" in headers["cache-control"]
    assert not upstream.arrived.is_set()


def test_nothing_beside_the_static_files_can_be_reached(nginx):
    (nginx.folder / "secret").write_text("private")
    for path in ("/static/../secret", "/static/%2e%2e/secret", "/static/..%2fsecret", "/secret", "/static../secret"):
        assert b"private" not in nginx.ask("GET", path)[2]


def test_guessing_passwords_is_slowed_down(nginx):
    statuses = [nginx.ask("POST", "/admin/login/")[0] for _ in range(30)]
    assert 429 in statuses
    assert nginx.ask("GET", "/admin/")[0] == 200


def test_the_key_of_a_view_stays_out_of_the_log(nginx):
    nginx.ask("GET", "/tuf/cam-1/the-view-key/metadata/timestamp.json")
    nginx.ask("GET", "/api/device/v1/poll?last=1")
    deadline = time.monotonic() + 5
    while "last=1" not in (told := (nginx.folder / "fleet.log").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "last=1" in told
    assert "the-view-key" not in told


# --- the page --------------------------------------------------------------------------------------------------------
def test_the_page_names_files_and_commands_that_exist():
    page = (DEPLOY / "README.md").read_text()
    for name in re.findall(r"deploy/[\w./-]+", page):
        assert (ROOT / name.rstrip(".")).exists(), name
    commands = set(re.findall(r"(?:manage\.py|fleet-manage) ([a-z_]+)", page))
    assert commands
    assert commands <= set(get_commands())


def test_the_policy_for_the_bucket_is_json_and_grants_what_is_used():
    (policy,) = re.findall(r"```json\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    actions = {action for statement in json.loads(policy)["Statement"] for action in statement["Action"]}
    assert actions == {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket", "s3:AbortMultipartUpload"}
