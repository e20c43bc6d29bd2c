"""The real server, an attacker in front of it, and a real device behind him: what every row of the attack table needs.

`Proxy` passes everything on, but for the paths on which a test has set a hook. `Device` is a process (`host.py`) that
embeds the SDK, polls each second and infers all the time. `Shop` is a model of its own on the shared server, with its
CI key, releases that answer 1.0, 2.0, 3.0 and so on, and operators' eyes: `Shop.page` is the admin's page of a device.

A row, in short:

    def test_row_01_an_older_full_view_replayed_is_refused(device):
        with assert_unharmed(device):
            device.proxy.attack(POLL, Reply(200, OLD))
            device.refuses("replayed")
        device.recovers()
"""

import html
import json
import os
import re
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Any

import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from device_sdk import enrolment, publish
from device_sdk.protocol.polls import EVENTS, INTERVAL_HEADER, POLL, Bundle
from tests.attacks import ATTACKED
from tests.live import KNOWN, ROOT, LiveServer
from tests.sdk.loopback import Asked, Loopback, Reply
from tests.sdk.world import scaling
from tests.services import end_with_me

DAY = timedelta(days=1)
UNCHANGED = Reply(
    304, b"", {INTERVAL_HEADER: "1"}
)  # with the tests' interval: without one the device takes five minutes
PATIENCE = 30.0  # seconds until a test gives up waiting, on a machine that does much else
POLLS = 12  # what the device has not done after so many polls, one after the other, it does not do
CALLS = 2_000  # the same, of inferences: what a probation goes by
END_SECONDS = 15.0  # of an orderly end
LEAST = 10.0  # seconds: and not before, for a server that is busy lets no poll through
PASSWORD = "correct horse battery"
OPERATORS = "Operators"
QUICK = {"calls": 5, "seconds": 0}
VOLATILE = ("store/loading/", "trust/scratch/")  # filled and emptied while a view or a model is looked at
_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive", "date", "server"}


class TooSlow(RuntimeError):
    """Nothing was shown, either way: the machine did not get round to it."""


def attacked() -> Path:
    """Where the device's process finds the SDK."""
    return Path(os.environ.get(ATTACKED, ROOT))


Honest = Callable[..., Reply]
Hook = Callable[[Asked, Honest], Reply]


class Proxy(Loopback):
    """Passes requests on to the real server; where a hook is set, the attacker's answer goes back instead.

    A hook gets what was asked and `honest`, which asks the real server (with other headers, if given). What it may
    say is a `Reply`: status, headers, a body of bytes, or an iterable of pieces that drips, never ends, or stops
    short; `raw` for bytes that are no HTTP. Paths without their query; a path that ends with / means all below it.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream
        self.patches = False  # whether the server's patches are offered: rows about whole files would be by chance
        self._hooks: dict[str, Hook] = {}
        self._session = threading.local()

    def attack(self, path: str, hook: Hook | Reply) -> None:
        self._hooks[path] = hook if callable(hook) else lambda *_: hook

    def relent(self, *paths: str) -> None:
        """Be an honest proxy again; on these paths, or altogether."""
        for path in paths or tuple(self._hooks):
            self._hooks.pop(path, None)

    def route(self, asked: Asked) -> Reply:
        path = asked.path.partition("?")[0]
        if path.endswith("/patches") and not self.patches:
            return Reply(404, b'{"code": "not_found", "message": "no patches today"}')
        fitting = [key for key in self._hooks if path == key or (key.endswith("/") and path.startswith(key))]
        if not fitting:
            return self.honest(asked)
        hook = self._hooks[max(fitting, key=len)]
        return hook(asked, lambda **headers: self.honest(asked, headers))

    def honest(self, asked: Asked, headers: Mapping[str, str] | None = None) -> Reply:
        sent = {name: value for name, value in asked.headers.items() if name.lower() not in {"host", *_HOP}}
        sent |= {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        if not hasattr(self._session, "it"):
            self._session.it = requests.Session()
        answer = self._session.it.request(
            asked.method, self.upstream + asked.path, headers=sent, data=asked.body, timeout=30, allow_redirects=False
        )
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
        return Reply(answer.status_code, answer.content, kept)

    def count(self, path: str, method: str = "GET") -> int:
        return sum(asked.method == method and asked.path.partition("?")[0] == path for asked in list(self.asked))


@contextmanager
def proxy_to(upstream: str, certificate: Path | None = None) -> Iterator[Proxy]:
    """`certificate`: of `certificate_of`; the proxy speaks TLS."""
    proxy = Proxy(upstream)
    if certificate is not None:
        proxy.speak_tls(certificate)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def certificate_of(address: str, folder: Path) -> Path:
    """A certificate for an IP address, signed by itself, with its private key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - DAY, now + DAY)
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    path = folder / "tls.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return path


@dataclass
class Shop:
    """A model of its own on a real server; whatever CI and operators do to it goes by their own doors."""

    server: LiveServer
    folder: Path
    model: str = field(default_factory=lambda: f"row-{secrets.token_hex(3)}")
    _factors: Iterator[int] = field(default_factory=lambda: count(5))
    token: str = ""
    operator: str = ""
    releases: dict[str, int] = field(default_factory=dict)
    homes: list[Path] = field(default_factory=list)
    _web: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        manage = self.server.manage
        for model, key in ((self.model, self.key), (self.other, self.other_key)):
            manage("trust_add_model", model, "--keystore", str(self.server.keystore), "--ci-key-out", str(key))
        people = "from django.contrib.auth.models import Group, User;"
        made = f"User.objects.create_user({self.user!r}, password={PASSWORD!r}, is_staff=True)"
        manage("shell", "-v0", "-c", f"{people} {made}.groups.add(Group.objects.get(name={OPERATORS!r}))")
        self.token = manage("api_token", f"ci-{self.model}", "--scope", "publish", "--model", self.model).split()[0]
        self.operator = manage("api_token", self.user, "--scope", "operate", "--user", self.user).split()[0]
        named = ["--name", self.model, "--model", self.model, "--uses", "1000", "--days", "1"]
        manage("provision", *named, "--out", str(self.provision))

    @property
    def user(self) -> str:
        """The operator's name."""
        return f"op-{self.model}"

    @property
    def key(self) -> Path:
        return self.folder / f"{self.model}.key"

    @property
    def other(self) -> str:
        """Another model of the same server, with a CI key of its own, that the devices do not run."""
        return f"{self.model}-other"

    @property
    def other_key(self) -> Path:
        return self.folder / f"{self.other}.key"

    @property
    def provision(self) -> Path:
        return self.folder / f"{self.model}.json"

    def push(self, version: str, data: bytes, *options: str, wait: bool = True) -> int:
        """As CI does. The publisher's exit code."""
        model = self.folder / "model.onnx"
        model.write_bytes(data)
        named = ["--model", self.model, "--version", version, "--server", self.server.url]
        secret = ["--key", str(self.key), "--token", self.token]
        return publish.main(["push", str(model), *named, *secret, *options, *(["--wait"] if wait else [])])

    def new_factor(self) -> float:
        """Of a release that no device has seen."""
        return float(next(self._factors))

    def release(self, factor: float, data: bytes | None = None) -> str:
        """A release that answers `factor`, or of these bytes; the version."""
        version = f"{int(factor)}.0.0"
        if version not in self.releases:
            assert self.push(version, data or scaling(factor)) == publish.OK
            found = self.api("GET", f"releases/?model={self.model}")["results"]
            self.releases |= {each["version"]: each["id"] for each in found}
        return version

    def roll_out(self, factor: float, data: bytes | None = None) -> None:
        """To every device of the model, from their next poll on."""
        body = {
            "release": self.releases[self.release(factor, data)],
            "stages": [{"percent": 100, "min_reports": 0}],
            "probation": QUICK,
        }
        made = self.api("POST", "rollouts/", body)
        self.api("POST", f"rollouts/{made['id']}/start/", {})
        # What a device does not do from now on is its own doing, not the server's.
        eventually(lambda: self.assigns() in {"", self.release(factor)}, "the server to assign the release")

    def assigns(self) -> str:
        """The version that the server has for the youngest device; "" where there is no device."""
        if not self.homes:
            return ""
        return self.assigned(self.ask(self.homes[-1]), self.homes[-1].name)

    def assigned(self, bundle: Bundle, device: str) -> str:
        """The version that a view names."""
        director = json.loads(next(text for name, text in bundle.metadata.items() if name.endswith(".director.json")))
        entry = director["signed"]["targets"].get(f"assign/{device}/{self.model}", {"custom": {}})
        return str(entry["custom"].get("release") or "none/none").split("/")[1]

    def api(self, method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {self.operator}"}
        answer = requests.request(method, f"{self.server.url}/api/v1/{path}", json=body, headers=headers, timeout=30)
        assert answer.ok, answer.text
        return answer.json()

    def page(self, device: str) -> str:
        """What an operator sees of a device in the admin, without the tags."""
        return self.admin(f"devices/device/{self.device_row(device)['id']}/change/")

    def admin(self, path: str) -> str:
        """What an operator reads on a page of the admin."""
        if not self._web.cookies.get("sessionid"):
            self._log_in()
        answer = self._web.get(f"{self.server.url}/admin/{path}", timeout=30)
        assert answer.ok, answer.text[:500]
        return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", answer.text)))

    def device_row(self, device: str) -> Any:
        found = self.api("GET", f"devices/?search={device}")["results"]
        return next(row for row in found if row["name"] == device)

    def _log_in(self) -> None:
        where = f"{self.server.url}/admin/login/?next=/admin/"
        self._web.get(where, timeout=30)
        form = {"username": self.user, "password": PASSWORD}
        form["csrfmiddlewaretoken"] = self._web.cookies["csrftoken"]
        answer = self._web.post(where, data=form, headers={"Referer": where}, timeout=30)
        assert self._web.cookies.get("sessionid"), answer.text[:500]

    def enrol(self, name: str, server: str = "") -> Path:
        """A directory that is a device; it reaches the server at `server`."""
        home = self.folder / name
        home.mkdir(mode=0o700)
        provision = json.loads(self.provision.read_text())
        (home / "provision.json").write_text(json.dumps({**provision, "server": server or self.server.url}))
        assert enrolment.enrol(home, name) == "active"
        return home

    def ask(self, home: Path, *, root: int = 0) -> Bundle:
        """The bundle that the honest server has for a device, as anyone on the line may have recorded it."""
        credential = json.loads((home / "identity.json").read_text())["credential"]
        headers = {"Authorization": f"Bearer {credential}"}
        answer = requests.get(f"{self.server.url}{POLL}?root={root}", headers=headers, timeout=30)
        assert answer.ok, answer.text
        return Bundle.parse(answer.content)


class Device:
    """The real SDK in a process of its own, behind a proxy of its own."""

    def __init__(self, shop: Shop, proxy: Proxy, home: Path) -> None:
        self.shop, self.proxy, self.home = shop, proxy, home
        self.name = home.name
        self.log = home.with_name(f"{home.name}.log")
        self.options: dict[str, Any] = {}  # of `Fleet.open`, from the next start on
        self._mark = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self, *, prefix: tuple[str, ...] = ()) -> None:
        """`prefix`: a command to run it under, such as `prlimit --as=…`."""
        command = [*prefix, sys.executable, "-m", "tests.attacks.host", str(self.home), self.shop.model]
        command.append(json.dumps(self.options))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=attacked(),
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._guard = end_with_me(self._process.pid)
        if self.active():
            eventually(lambda: self.facts().answer is not None, "the last good release to answer")

    def relieve(self) -> None:
        """An honest proxy and the right time again: what a test that failed in the middle leaves to the next."""
        self.proxy.relent()
        self.proxy.patches = False
        self.set_clock(0)
        self.poll()

    def stop(self, *, kill: bool = False) -> None:
        """An orderly end, or one by SIGKILL."""
        process, guard = self._process, self._guard
        assert process is not None
        assert guard is not None
        if kill:
            process.kill()
        process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            self._ended()

    def _ended(self) -> None:
        process, guard = self._process, self._guard
        process.stdout.close()
        guard.stdin.close()
        guard.wait()
        self._process = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, command: str, within: float = 0.0) -> Any:
        """One command of `host.py`, and its answer. `within`: the seconds that the SDK promises to need at most."""
        self._process.stdin.write(command.encode() + b"\n")
        line, ends = b"", time.monotonic() + (within or PATIENCE)
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(ends - time.monotonic(), 0))[0]:
                assert not within, f"{command!r} took longer than {within:g} s"
                raise TooSlow(f"{command!r} took longer than {PATIENCE:g} s")
            piece = self._process.stdout.read(1 << 16)
            assert piece, f"the device ended; it said:\n{self.logged()[-3000:]}"
            line += piece
        return json.loads(line)

    def poll(self, within: float = 0.0) -> str:
        """Poll at once, beside the background. The code of the refusal, or "" ."""
        return str(self.tell("poll", within))

    def retry(self, within: float = 0.0) -> str:
        """As `poll`, and what it has put off is tried again at once."""
        self.tell("skip")
        return self.poll(within)

    def set_clock(self, seconds: float) -> None:
        """Put the device's clock off by so much."""
        self.tell(f"clock {seconds}")

    def honest(self) -> Bundle:
        """What the server would answer this device now; a forger starts from it."""
        return self.shop.ask(self.home)

    def says(self, bundle: Bundle) -> None:
        """From now on the attacker answers every poll by this bundle."""
        self.proxy.attack(POLL, Reply(200, bundle.to_bytes(), {"Content-Type": "application/json"}))

    def logged(self) -> str:
        return self.log.read_text(errors="replace")

    def hears_last_of(self, factor: float) -> None:
        """A release is rolled out, and after that view comes no other: the server gives up on what has failed once."""
        version, over = self.shop.release(factor), threading.Event()

        def hook(_: Asked, honest: Honest) -> Reply:
            if over.is_set():
                return UNCHANGED
            answer = honest()
            if answer.status == 200 and self.shop.assigned(Bundle.parse(answer.body), self.name) == version:
                over.set()
            return answer

        self.proxy.attack(POLL, hook)
        self.shop.roll_out(factor)
        self.comes_to(over.is_set, f"it hears of {version}")
        self.poll()  # and has tried it, when this answers

    def said(self) -> str:
        """The log since the attack began."""
        return self.logged()[self._mark :]

    def page(self) -> str:
        return self.shop.page(self.name)

    def facts(self) -> "Facts":
        said = self.tell("status")
        model = said["status"]["models"][self.shop.model]
        return Facts(model["release"], said["answer"], said["calls"], tuple(said["failures"]), self.active())

    def active(self) -> str:
        """The manifest in use, by its sha256, as the state on disk has it."""
        path = self.home / "store" / "state.json"
        models = json.loads(path.read_bytes())["state"]["models"] if path.exists() else {}
        return str(models.get(self.shop.model, {}).get("active") or "")

    def on_disk(self, volatile: tuple[str, ...] = ()) -> dict[str, str]:
        """Every file of the store and of trust by its hash; links by where they lead."""
        found = {}
        for folder in ("store", "trust"):
            for path in (self.home / folder).rglob("*"):
                name = str(path.relative_to(self.home))
                if not name.startswith(VOLATILE + volatile) and (path.is_symlink() or path.is_file()):
                    found[name] = (
                        f"-> {path.readlink()}" if path.is_symlink() else sha256(path.read_bytes()).hexdigest()
                    )
        return found

    def refuses(self, code: str, *, polled: str | None = None, log: str = "", page: str = "") -> None:
        """The device refuses by this name: in its log, and on the server's page of it. Asks it to poll at once.

        `polled`: what the poll itself says, where it is not the poll that is refused; `log` and `page`: other words to
        look for.
        """
        assert self.poll() == (code if polled is None else polled)
        self.logs(log or f"refused ({code})")
        words = page or f"refused: {code}"
        self.comes_to(lambda: words in self.page(), f"its page says {words!r}")

    def logs(self, words: str) -> None:
        """It says so, since the last attack began."""
        self.comes_to(lambda: words in self.said(), f"its log says {words!r}")

    def comes_to(self, condition: Callable[[], object], what: str, *, calls: int = 0) -> None:
        """Poll until it is so. A device that has had its chances fails the test; one that never got them is too slow.

        `calls`: inferences that it must have made, besides its POLLS.
        """
        said: list[str] = []
        began, first = time.monotonic(), self.tell("status")["calls"] if calls else 0
        while not condition():
            made = self.tell("status")["calls"] - first if calls else 0
            took = time.monotonic() - began
            had_its_chances = len(said) >= POLLS and made >= calls and took > LEAST
            assert not had_its_chances, f"after {len(said)} polls ({said[-3:]}), {made} calls it is not so that {what}"
            if took > PATIENCE:
                raise TooSlow(f"{len(said)} polls and {made} calls in {PATIENCE:g} s: no chance for it that {what}")
            said.append(self.poll())
            time.sleep(0.05)

    def recovers(self, factor: float | None = None) -> None:
        """Honesty again: the next release is rolled out, installed, and no sign of the attack is left on the page."""
        self.proxy.relent()
        factor = factor or (3.0 if self.facts().answer == 2.0 else 2.0)
        self.shop.roll_out(factor)
        self.runs(factor)
        self.comes_to(lambda: "refuses what it is sent" not in self.page(), "its page shows that it is over")
        self._mark = len(self.logged())

    def catches_up(self) -> None:
        """It has the server's newest view, with what was done a moment ago."""
        time.sleep(KNOWN)
        self.poll()

    def settles(self) -> None:
        """It runs what the server has for it: a row with a device of its own rolls out to every device of the model."""
        self.runs(float(self.shop.assigned(self.honest(), self.name).partition(".")[0]))

    def runs(self, factor: float) -> None:
        """It answers by the release of `factor`, and has committed it."""
        version = f"{factor:.0f}.0.0/default"

        def settled() -> bool:
            said = self.tell("status")
            model = said["status"]["models"][self.shop.model]
            return said["answer"] == factor and model["release"] == version and model["state"] == "committed"

        self.poll()
        self.comes_to(settled, f"{version} runs", calls=CALLS)

    def begin(self) -> None:
        self._mark = len(self.logged())


@dataclass(frozen=True)
class Facts:
    release: str
    answer: float | None
    calls: int
    failures: tuple[str, ...]
    active: str


@contextmanager
def assert_unharmed(device: Device, *, volatile: tuple[str, ...] = (), begins: bool = True) -> Iterator[Facts]:
    """Whatever happens inside: the same model answers the same, no call failed meanwhile, and the disk is as it was.

    `volatile`: paths below the device's directory (their beginnings) that the row declares to change. `begins` False:
    the attack began before, and what the log has said since counts.
    """
    if begins:
        device.begin()
    before, disk = device.facts(), device.on_disk(volatile)
    assert before.answer is not None, "nothing runs that could be harmed"
    assert before.failures == ()
    yield before
    eventually(lambda: device.facts().calls > before.calls, "the next inference")  # what is inside may take no time
    assert replace(device.facts(), calls=before.calls) == before
    assert device.on_disk(volatile) == disk


def eventually(condition: Callable[[], object], what: str, *, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise TooSlow(f"waited in vain for {what}")
        time.sleep(0.02)


@contextmanager
def device_of(
    shop: Shop, *, name: str = "", start: bool = True, proxy: Proxy | None = None, **options: Any
) -> Iterator[Device]:
    """A device that runs the release that answers 2.0; `start` False: enrolled, and not yet started."""
    with nullcontext(proxy) if proxy else proxy_to(shop.server.url) as line:
        device = Device(shop, line, shop.enrol(name or f"cam-{secrets.token_hex(3)}", line.url))
        device.options = options
        shop.homes.append(device.home)
        if start:
            shop.roll_out(2.0)
            device.start()
            device.runs(2.0)
        try:
            yield device
        except BaseException:
            if device._process is not None:
                device.stop(kill=True)  # it may hang, and that is what a test has just found
            raise
        line.relent()
        if device._process is not None:
            device.stop()


def posted(proxy: Proxy) -> list[dict[str, Any]]:
    """Every event that went by."""
    bodies = [json.loads(asked.body) for asked in list(proxy.asked) if asked.path == EVENTS]
    return [event for body in bodies for event in body["events"]]
