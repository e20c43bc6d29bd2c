"""Bytes on the wire: the real SDK and a stock TUF client against granian, through a relay that counts. No TLS."""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuf.ngclient import Updater

from deploy.bench import models
from deploy.bench.measure import Row, Scale, Section
from deploy.bench.server import Server
from device_sdk import Fleet
from device_sdk.enrolment import enrol
from device_sdk.protocol import polls

UP, DOWN, UPDATE = 212, 119, 7_000  # of the prototype
FROM_MEMORY = 200  # Django's own 304 has all the headers that pages need
ROOT = Path(__file__).resolve().parent.parent.parent
STOCK = "stock TUF client"


@dataclass
class Exchange:
    """A request and its answer, heads included."""

    request: str
    up: int = 0
    down: int = 0


class Relay:
    """Passes connections on to `port` and notes each exchange. Clients here ask one thing at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.exchanges: list[Exchange] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def take(self) -> list[Exchange]:
        """What came since the last time."""
        taken, self.exchanges = self.exchanges, []
        return taken

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server, suppress(OSError):
            answered = True  # what goes up now begins an exchange
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65_536)
                    if not data:
                        return
                    answered = self._note(data, upward=source is client, answered=answered)
                    (server if source is client else client).sendall(data)

    def _note(self, data: bytes, *, upward: bool, answered: bool) -> bool:
        if not upward:
            self.exchanges[-1].down += len(data)
            return True
        if answered:
            self.exchanges.append(Exchange(data.split(b"\r\n", 1)[0].decode()))
        self.exchanges[-1].up += len(data)
        return False


def measure(folder: Path, _scale: Scale, server: Server) -> Section:
    release = server.publish("2.0.0", {"model.onnx": models.small(3.0)})
    with granian(os.environ) as (port, _), closing(Relay(port)) as relay:
        home = _enrol(folder / "home", server, relay.url)
        with Fleet.open(home) as fleet:
            server.roll_out(release)
            first = _poll(fleet, relay)
            idle = _settle(fleet, relay)
            stock_first = _stock(folder / "tuf", fleet.device, relay, fetch=True)
            stock_idle = _stock(folder / "tuf", fleet.device, relay, fetch=False)
            server.roll_out(server.publish("2.1.0", {"model.onnx": models.small(4.0)}))
            update = _poll(fleet, relay)
            stock_update = _stock(folder / "tuf", fleet.device, relay, fetch=True)
    note = (
        f"The stock client is tuf.ngclient on the plain TUF address; it asks {stock_idle.request} "
        f"times when idle and {stock_update.request} times for the update, where ours asks once. Manifests included."
    )
    return Section("Bytes on the wire (one model, HTTP/1.1, heads included, without TLS and TCP)", [
        Row("idle poll, request", idle.up, "B", stock_idle.up, f"{STOCK}, idle", f"<= {UP} B", idle.up <= UP),
        Row("idle poll, response", idle.down, "B", stock_idle.down, f"{STOCK}, idle", f"<= {DOWN} B",
            idle.down <= DOWN),
        Row("first bundle, response", first.down, "B", stock_first.down, f"{STOCK}, first time"),
        Row("bundle of an update, response", update.down, "B", stock_update.down, f"{STOCK}, same update",
            f"< {UPDATE} B", update.down < UPDATE),
    ], [note])  # fmt: skip


def _enrol(home: Path, server: Server, url: str) -> Path:
    from fleet.trust.provisioning import provision

    home.mkdir()
    (home / "provision.json").write_bytes(provision(secret=server.token(), models=[models.MODEL], server=url))
    enrol(home, "till-wire")
    return home


def _poll(fleet: Fleet, relay: Relay) -> Exchange:
    relay.take()
    fleet.update_once()
    return next(each for each in relay.take() if polls.POLL in each.request)


def _settle(fleet: Fleet, relay: Relay) -> Exchange:
    """Pass the probation, report it, and poll until nothing is new: then a poll is the only exchange."""
    model = fleet.model(models.MODEL)
    for _ in range(20):
        model.run(models.SMALL_INPUT)
        relay.take()
        fleet.update_once()
        exchanges = relay.take()
        if len(exchanges) == 1 and exchanges[0].down < FROM_MEMORY:
            return exchanges[0]
        time.sleep(0.3)  # in which the web process learns of what is new
    raise RuntimeError(f"the device does not come to rest: {exchanges}")


def _stock(folder: Path, name: str, relay: Relay, *, fetch: bool) -> Exchange:
    """A stock client's refresh, and with `fetch` also what leads to the manifest; all exchanges added up."""
    from fleet.devices.credentials import view_key
    from fleet.devices.models import Device
    from fleet.trust import selectors

    view = f"{relay.url}/tuf/{name}/{view_key(Device.objects.get(name=name))}"
    folder.mkdir(exist_ok=True)
    relay.take()
    updater = Updater(str(folder), f"{view}/metadata/", str(folder), f"{view}/targets/",
                      bootstrap=selectors.root_text().encode())  # fmt: skip
    updater.refresh()
    if fetch:
        _fetch(updater, name)
    taken = relay.take()
    return Exchange(str(len(taken)), sum(each.up for each in taken), sum(each.down for each in taken))


def _fetch(updater: Updater, name: str) -> None:
    assigned: Any = updater.get_targetinfo(f"assign/{name}/{models.MODEL}")
    target = updater.get_targetinfo(str(assigned.custom["release"]))
    if target is None:
        raise RuntimeError(f"assigned and not listed: {assigned.custom}")
    updater.download_target(target, str(Path(updater._dir) / "manifest"))  # noqa: SLF001


@contextmanager
def granian(environment: Mapping[str, str], application: str = "fleet.wsgi:application") -> Iterator[tuple[int, int]]:
    """The real web server as a process: its port, and its id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--no-ws", "--host", "127.0.0.1",
               "--port", str(port), "--log-level", "error", "--blocking-threads", "4", application]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=dict(environment))
    try:
        _wait(port, process)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(15)


def _wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"granian ended with {process.returncode}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError("granian does not answer")
