"""Small ONNX models, a server in memory, and a device on it. The real trust, store and download; no socket."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from device_sdk.client import Fleet
from device_sdk.config import Home, Identity, Provision
from device_sdk.errors import TransferError
from device_sdk.install import Clock
from device_sdk.protocol.assignment import Probation
from device_sdk.protocol.events import Event
from device_sdk.protocol.manifest import FileEntry, Manifest, TensorSpec, digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.polls import Bundle, Tag
from device_sdk.protocol.posts import EventPost
from device_sdk.transport import Answer, StreamAnswer
from tests.simulator import Simulator

X = {"x": np.arange(4, dtype=np.float32).reshape(1, 4)}
QUICK = Probation(calls=5, seconds=0.0)
INPUTS = (TensorSpec("x", "float32", ("n", 4)),)


def graph(nodes: list[Any], constants: Mapping[str, Any] | None = None, *, output: int = TensorProto.FLOAT) -> bytes:
    """A model from `x` float32 [n, 4] to `y`. Nodes may be of `ai.onnx.ml` too."""
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", output, ["n", 4])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    domains = {node.domain for node in nodes}
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(name, 3) for name in sorted(domains - {""}))]
    return helper.make_model(body, opset_imports=opsets, ir_version=8).SerializeToString()


def scaling(factor: float) -> bytes:
    """`y = x * factor`: what answers tells which release answered."""
    return graph([helper.make_node("Mul", ["x", "k"], ["y"])], {"k": np.float32(factor)})


def nan_emitting() -> bytes:
    """Loads, runs, and is not a number for anything below a thousand."""
    nodes = [helper.make_node("Sub", ["x", "k"], ["d"]), helper.make_node("Sqrt", ["d"], ["y"])]
    return graph(nodes, {"k": np.float32(1000)})


def failing_on_data() -> bytes:
    """Answers zeros, and fails on anything above 3: an index out of bounds."""
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["y"]),
    ]
    return graph(nodes, {"table": np.zeros(4, np.float32)})


def unknown_operator() -> bytes:
    body = helper.make_graph(
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def manifest_of(path: str, data: bytes, inputs: tuple[TensorSpec, ...] = INPUTS) -> Manifest:
    return Manifest(ReleasePath.parse(path), (FileEntry("model.onnx", len(data), digest(data)),), "model.onnx", inputs)


@dataclass
class Server:
    """Answers as the contract says, from a Simulator. `faults` are raised in turn, one per request of that path."""

    simulator: Simulator = field(default_factory=Simulator)
    interval: str = "60"
    want_runs: bool = False
    calls: list[str] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    posts: list[EventPost] = field(default_factory=list)
    faults: dict[str, list[Exception]] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    routes: dict[str, Callable[[bytes], dict[str, Any]]] = field(default_factory=dict)
    current: Bundle | None = None
    pieces: Callable[[str], Iterator[bytes]] | None = None  # of a file, as they come

    @property
    def events(self) -> list[Event]:
        seen: dict[str, Event] = {}
        for post in self.posts:
            for event in post.events:
                seen.setdefault(event.id, event)
        return list(seen.values())

    def kinds(self, model: str = "detector") -> list[str]:
        return [event.kind for event in self.events if event.model == model and event.kind != "health"]

    def publish(self, path: str, data: bytes, bundle: bytes = b"", **said: Any) -> Manifest:
        """`bundle`: what devices ask it before it serves. `said`: more fields of the manifest."""
        manifest = replace(manifest_of(path, data), **said)
        if bundle:
            manifest = replace(manifest, acceptance=FileEntry("acceptance.npz", len(bundle), digest(bundle)))
            self.simulator.blobs[digest(bundle)] = bundle
        self.simulator.list_release(manifest)
        self.simulator.blobs[digest(data)] = data
        return manifest

    def assign(self, manifest: Manifest | None, **changes: Any) -> None:
        self.simulator.assign(manifest, **{"probation": QUICK, **changes})
        self.current = None

    def renew(self) -> None:
        self.current = None

    # The transport's interface

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        limit: int,
        deadline: float,
        authorise: bool = True,
    ) -> Answer:
        path = url.partition("?")[0]
        self.calls.append(f"{method} {path}")
        if self.faults.get(path):
            raise self.faults[path].pop(0)
        content = body.read() if hasattr(body, "read") else (body or b"")
        if path.endswith("/poll"):
            return self._poll(url, dict(headers or {}))
        if path.endswith("/events"):
            return self._events(content)
        if "/batches" in path:
            return self._batches(path, content)
        if path in self.routes:
            return _json(self.routes[path](content))
        raise TransferError(f"no route {path}", status=404, code="not_found")

    @contextlib.contextmanager
    def stream(
        self, url: str, *, headers: Mapping[str, str] | None = None, limit: int, deadline: float
    ) -> Iterator[StreamAnswer]:
        self.calls.append(f"GET {url}")
        if self.faults.get("blobs"):
            raise self.faults["blobs"].pop(0)
        data = self.simulator.blobs[url.rsplit("/", 1)[1]]
        yield StreamAnswer(200, {}, self.pieces(url) if self.pieces else iter([data]))

    def _poll(self, url: str, headers: Mapping[str, str]) -> Answer:
        tag = Tag.parse(headers["If-None-Match"])
        self.tags.append(tag)
        answer_headers = {"Fleet-Poll-Interval": self.interval}
        if self.want_runs:
            answer_headers["Fleet-Want"] = "runs"
        if self.current is None:
            self.current = self.simulator.bundle(root=int(url.partition("root=")[2]))
        elif tag.view == self.simulator.version:
            return Answer(304, answer_headers, b"")
        return Answer(200, answer_headers, self.current.to_bytes())

    def _events(self, content: bytes) -> Answer:
        post = EventPost.parse(content)
        self.posts.append(post)
        return _json({"accepted": len(post.events)})

    def _batches(self, path: str, content: bytes) -> Answer:
        if path.endswith("/batches"):
            head = json.loads(content)
            known = self.batches.setdefault(head["id"], {**head, "state": "announced"})
            if known["state"] == "received":
                return _json({"state": "received"})
            url = f"/api/device/v1/batches/{head['id']}/content"
            upload = {"url": url, "method": "PUT", "headers": {}, "credential": True}
            return _json({"state": "announced", "upload": upload})
        identifier = path.split("/")[-2]
        if path.endswith("/content"):
            self.contents[identifier] = content
            return Answer(200, {}, b"")
        if digest(self.contents.get(identifier, b"")) != self.batches[identifier]["sha256"]:
            raise TransferError("hash", status=422, code="hash_mismatch")
        self.batches[identifier]["state"] = "received"
        return _json({"state": "received"})


@dataclass
class Time:
    """A clock that only tests move. The wall follows the simulator's."""

    simulator: Simulator
    seconds: float = 1_000.0
    second_of_day: float = 12 * 3_600.0

    def clock(self) -> Clock:
        return Clock(
            now=lambda: float(self.simulator.now),
            monotonic=lambda: self.seconds,
            second_of_day=lambda: self.second_of_day,
        )


@dataclass
class World:
    """One server and one device directory; `open` starts the device's process, so to say."""

    path: Path
    server: Server = field(default_factory=Server)
    time: Time = field(init=False)

    def __post_init__(self) -> None:
        self.time = Time(self.server.simulator)
        home = Home(self.path)
        home.make()
        simulator = self.server.simulator
        provision = Provision(
            server="http://fleet.test", root=simulator.pinned_root().decode(), token="t", models=simulator.models
        )
        home.provision_file.write_bytes(provision.to_bytes())
        home.identity_file.write_bytes(Identity(simulator.device, "0" * 32, "credential").to_bytes())

    def open(self, **options: Any) -> Fleet:
        defaults = {"transport": self.server, "clock": self.time.clock(), "intra_op_threads": 1, "rehearse": False}
        return Fleet.open(self.path, **{**defaults, **options})

    def committed(self, path: str, data: bytes, **options: Any) -> Fleet:
        """A device that has been through a whole update to a good release."""
        manifest = self.server.publish(path, data)
        self.server.assign(manifest)
        fleet = self.open(**options)
        fleet.update_once()
        prove(fleet)
        return fleet


def prove(fleet: Fleet, calls: int = 6, inputs: Mapping[str, Any] = X) -> None:
    """Call the model as an application does, then let the device judge and report."""
    model = fleet.model("detector")
    for _ in range(calls):
        with contextlib.suppress(Exception):
            model.run(inputs)
    judge(fleet)


def judge(fleet: Fleet) -> None:
    """What the background threads do when they are woken."""
    assert fleet._worker is not None
    fleet._worker.install()
    fleet._worker.install()
    fleet._worker.poller.report()


def answer(fleet: Fleet, model: str = "detector") -> float:
    """The factor of the release that answers now."""
    return float(fleet.model(model).run({"x": np.ones((1, 4), np.float32)})["y"][0, 0])


def _json(value: dict[str, Any]) -> Answer:
    return Answer(200, {}, json.dumps(value).encode())
