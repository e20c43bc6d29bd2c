"""What is fuzzed: each parser, good messages to start from, the errors it may raise, what must hold of its answer.

To add one: write `run(data)`, which parses and asserts, and a row in TARGETS. Errors beyond those named are crashes.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import requests
from tuf.api.metadata import Metadata

from device_sdk import download, hashed, ledger, standing, transport
from device_sdk.config import Identity, Provision
from device_sdk.counts import Counts
from device_sdk.errors import TransferError, UntrustedError
from device_sdk.ledger import Done, Ledger
from device_sdk.protocol import fields, limits
from device_sdk.protocol.abilities import Abilities
from device_sdk.protocol.arrays import npy
from device_sdk.protocol.arrays.acceptance import INDEX as ACCEPTANCE_INDEX
from device_sdk.protocol.arrays.acceptance import Acceptance, Budgets, Sample, Tolerance
from device_sdk.protocol.arrays.archive import opened, packed
from device_sdk.protocol.assignment import Assignment, Probation, Sampling, Window
from device_sdk.protocol.batches import BatchHead, BatchIndex, SampleEntry
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.events import Event
from device_sdk.protocol.manifest import FileEntry, Manifest, Requirements, TensorSpec, digest
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.patches.frames import HEAD_BYTES, Head
from device_sdk.protocol.patches.offers import PatchOffer, offers_to_json, parse_offers
from device_sdk.protocol.polls import Bundle, EnrolRequest, Tag
from device_sdk.protocol.posts import EventPost
from device_sdk.protocol.scores import KINDS, Scores
from device_sdk.trust import Trust
from device_sdk.updater import judge
from device_sdk.uploader import Upload
from fleet.api import blobs
from fleet.devices import selection
from fleet.errors import FleetError, Invalid
from fleet.feedback import parsing
from fleet.releases import bom, model_signing, onnx_probe
from fleet.releases.model_signing import State
from fleet.trust import offline, repository
from tests.deltas import pieces
from tests.protocol.test_patches import OLD, RICH, golden, golden_quarters
from tests.registry import external_model, onnx_model
from tests.server.batch_world import pack, sample
from tests.simulator import START, Simulator, signer

Errors = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Target:
    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    errors: Errors = (ProtocolError,)
    is_json: bool = True
    weight: float = 1.0  # of the examples: less where each is slow


def plain(name: str) -> bool:
    """Written anew here, so that a hole in the parser's own rule shows."""
    return bool(name) and not set(name) & set("/\\\0\n\r ") and ".." not in name and name[0] != "." and name.isascii()


def check_release(release: ReleasePath | None) -> None:
    if release is not None:
        assert all(plain(part) for part in (release.model, release.version, release.variant)), release
        assert release.model not in {"assign", "director", "root", "targets", "snapshot", "timestamp"}


# Protocol

MANIFEST = Manifest(
    path=ReleasePath("digits", "1.0.0", "default"),
    files=(FileEntry("model.onnx", 3, "ab" * 32), FileEntry("model.onnx.data", 5, "cd" * 32)),
    entry="model.onnx",
    inputs=(TensorSpec("image", "float32", ("batch", 64, None)),),
    outputs=(TensorSpec("label", "int64", (None,)),),
    requires=Requirements("0.1.0", "1.31", 17, 2**20, "0.9.0", ("x86_64",), ("CPUExecutionProvider",)),
    metadata={"commit": "abc"},
)
ASSIGNMENT = Assignment(
    "digits",
    MANIFEST.path,
    10,
    "ef" * 32,
    rollout="r-1",
    urgent=True,
    window=Window(60, 120),
    probation=Probation(5, 0.25, 0.001, 1e-7),
    sampling=Sampling("night", 1 / 3, 100, START, Window(1, 2), 600),
    stop=True,
    mirror="http://mirror.oslo.example:8080",
)
EVENT = Event("0" * 32, 1.5e9, "failed", "digits", MANIFEST.path, "r-1", "disk", {"free": 1.5, "code": "x"})
ABILITIES = Abilities("1.31.0", 26, 2**30, "x86_64", ("CPUExecutionProvider",))
POST = EventPost((EVENT,), {"digits": "1.0.0/default"}, "0.1.0", 3, ABILITIES)
HEAD = BatchHead("0" * 32, "digits", "ab" * 32, 100, 5, 2, "night")
SAMPLE = SampleEntry("1" * 32, 1.5e9, MANIFEST.path, 0.5, {"x": "t0.npy"}, {"y": "t1.npy"})
INDEX = BatchIndex("0" * 32, "cam-1", "digits", (SAMPLE,))


def accepted() -> Acceptance:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    samples = [Sample({"x": x[:rows]}, {"y": x[:rows] * 2, "label": np.array(["a", "ö"])}) for rows in (1, 2)]
    return Acceptance(samples, Tolerance(1e-3, 1e-4), {"y": Tolerance(0.1, 0.0)}, Budgets(5.0, 2**28))


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


def parsed(data: bytes) -> dict[str, Any]:
    return fields.parse_object(data, limit=limits.BUNDLE, what="message")


def run_manifest(data: bytes) -> None:
    manifest = Manifest.parse(data)
    check_release(manifest.path)
    names = [file.name for file in manifest.files]
    assert all(plain(name) for name in names)
    assert manifest.entry in names
    assert len(set(names)) == len(names)
    assert all(
        0 <= file.length <= limits.ARTIFACT and re.fullmatch("[0-9a-f]{64}", file.sha256) for file in manifest.files
    )
    source = json.loads(data)
    assert {type(source[name]) for name in ("model", "version", "variant")} == {str}
    assert not any(isinstance(size, bool) for spec in (*manifest.inputs, *manifest.outputs) for size in spec.shape)
    assert Manifest.parse(manifest.to_bytes()) == manifest


def run_acceptance(data: bytes) -> None:
    found = Acceptance.parse(data)
    arrays = [each for item in found.samples for part in (item.inputs, item.outputs) for each in part.values()]
    assert 1 <= len(found.samples) <= limits.ACCEPTANCE_SAMPLES
    assert all(npy.is_plain(each.dtype) and len(each.shape) <= limits.RANK for each in arrays)
    assert sum(each.nbytes for each in arrays) <= len(data)
    for number, item in enumerate(found.samples):
        assert isinstance(found.complaint(number, item.outputs), str)
    assert Acceptance.parse(found.to_bytes()).to_bytes() == found.to_bytes()


def accepted_members() -> dict[str, bytes]:
    with opened(accepted().to_bytes()) as archive:
        return {name: archive.read(name) for name in archive.sizes}


def run_acceptance_index(data: bytes) -> None:
    run_acceptance(packed({**accepted_members(), ACCEPTANCE_INDEX: data}))


def run_bundle(data: bytes) -> None:
    bundle = Bundle.parse(data)
    assert all(plain(name) and name.endswith(".json") for name in bundle.metadata)
    assert all(isinstance(text, str) for text in (*bundle.metadata.values(), *bundle.manifests.values()))
    assert Bundle.parse(bundle.to_bytes()) == bundle


def run_assignment(data: bytes) -> None:
    item = parsed(data)
    found = Assignment.parse("digits", 10, "ef" * 32, item)
    check_release(found.release)
    assert found.release is None or found.release.model == "digits"
    assert not found.mirror or (found.mirror.isascii() and not set(found.mirror.partition("://")[2]) & set("/?#@\\ \n"))
    assert Assignment.parse("digits", 10, "ef" * 32, parsed(dumped(found.to_custom()))) == found


def run_events(data: bytes) -> None:
    post = EventPost.parse(data)
    for event in post.events:
        check_release(event.release)
    assert len(post.events) <= limits.EVENTS_PER_POST
    assert EventPost.parse(dumped(post.to_json())) == post


def run_enrolment(data: bytes) -> None:
    request = EnrolRequest.parse(parsed(data))
    assert plain(request.device)
    assert EnrolRequest.parse(parsed(dumped(request.to_json()))) == request


def run_head(data: bytes) -> None:
    head = BatchHead.parse(parsed(data))
    assert plain(head.model)
    assert BatchHead.parse(parsed(dumped(head.to_json()))) == head


def run_index(data: bytes) -> None:
    index = BatchIndex.parse(data)
    assert plain(index.device)
    assert all(entry.release.model == index.model for entry in index.samples)
    assert BatchIndex.parse(index.to_bytes()) == index


def run_tag(data: bytes) -> None:
    tag = Tag.parse(data.decode("latin-1"))
    assert Tag.parse(str(tag)) == tag


def run_provision(data: bytes) -> None:
    provision = Provision.parse(data)
    assert all(plain(model) for model in provision.models)
    assert Provision.parse(provision.to_bytes()) == provision
    # What the transport makes of the addresses: refused by name, or pinned.
    with suppress(ValueError, UntrustedError):
        transport.Transport(provision.server, provision.blob_hosts, provision.token).close()


def run_identity(data: bytes) -> None:
    identity = Identity.parse(data)
    assert plain(identity.device)
    assert Identity.parse(identity.to_bytes()) == identity


def run_upload(data: bytes) -> None:
    upload = Upload.parse(parsed(data))
    assert upload.method in {"PUT", "POST"}
    assert all(isinstance(value, str) for value in upload.headers.values())


def run_scores(data: bytes) -> None:
    scores = Scores.parse(parsed(data))
    assert scores.output
    assert scores.kind in KINDS
    assert Scores.parse(parsed(dumped(scores.to_json()))) == scores


# Device: files of ours, as a crash or a person may leave them


COUNTS = Counts(
    calls=900, errors=1, checked=500, times=((20, 300), (40, 200)), scored=400, confidence=320.0,
    classes=((0, 300), (7, 100)), changes=9,
)  # fmt: skip
COMPARING = Probation(5, 1.0, 0.1, 0.1, max_slowdown=2.0, max_confidence_drop=0.2, max_class_shift=0.3)


def run_ledger(data: bytes) -> None:
    """Whatever it says: a trial can be judged beside it."""
    for done in ledger.parse(data).values():
        for sha, each in done.items():
            assert re.fullmatch("[0-9a-f]{64}", sha)
            assert each.seconds >= 0
            judge(COMPARING, COUNTS, 100.0, each.counts)
            judge(COMPARING, each.and_then(COUNTS, 1.0).counts, each.seconds, COUNTS)


def run_hashed(data: bytes) -> None:
    """A file in the store: what a start may believe of the blobs."""
    for sha, identity in hashed.parse(data).items():
        assert len(sha) == 64
        assert len(identity) == 5


def ledger_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        kept = Ledger(Path(folder) / "ledger.json")
        kept.keep("digits", "ab" * 32, Done(COUNTS, 60.5), kept={"ab" * 32})
        return (Path(folder) / "ledger.json").read_bytes()


def run_standing(data: bytes) -> None:
    """It may say what must not be served, and never what is to be installed."""
    found = standing.parse(data, view="ab" * 32)
    for model, each in found.assignments.items() if found else ():
        check_release(each.assignment.release)
        assert each.assignment.release is None or each.assignment.release.model == model
        assert (each.manifest, each.manifest_bytes) == (None, None)
        assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in each.listed or ())


def standing_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        view, path = Path(folder) / "view.json", Path(folder) / "standing.json"
        view.write_bytes(b"{}")
        said = {"digits": standing.Remembered(ASSIGNMENT, frozenset({"cd" * 32}))}
        standing.remember(path, view, {**said, "other": standing.Remembered(Assignment("other", stop=True), None)})
        return path.read_bytes().replace(digest(b"{}").encode(), b"ab" * 32)


# Device: what the server and the hosts say


@cache
def honest() -> tuple[Simulator, Bundle]:
    sim = Simulator(models=("detector", "digits"))
    for model in sim.models:
        sim.assign(sim.publish(f"{model}/1.0.0/default"))
    sim.rotate_root()
    return sim, sim.bundle()


def trust_in(folder: Path) -> Trust:
    sim, _ = honest()
    return Trust(folder, sim.device, sim.models, sim.pinned_root(), clock_floor=0)


def run_view(data: bytes) -> None:
    """A mutated bundle gives the honest view or a refusal, and a refusal leaves a device that still accepts."""
    sim, bundle = honest()
    with tempfile.TemporaryDirectory() as folder:
        trust = trust_in(Path(folder))
        try:
            view = trust.accept(Bundle.parse(data), sim.now)
        except (ProtocolError, UntrustedError):
            view = trust.accept(bundle, sim.now)
        assert {model: str(each.assignment.release) for model, each in view.assignments.items()} == {
            "detector": "detector/1.0.0/default",
            "digits": "digits/1.0.0/default",
        }


def run_inner(name: str) -> Callable[[bytes], None]:
    """The same with one TUF file of the bundle being the mutated bytes."""

    def run(data: bytes) -> None:
        _, bundle = honest()
        text = data.decode("utf-8", "replace")
        found = next(each for each in bundle.metadata if each.endswith(name))
        run_view(replace(bundle, metadata={**bundle.metadata, found: text}).to_bytes())

    return run


def inner(name: str) -> Callable[[], list[bytes]]:
    return lambda: [next(text for each, text in honest()[1].metadata.items() if each.endswith(name)).encode()]


def run_trust_files(data: bytes) -> None:
    """Whatever lies on the disk after a crash: the device opens, and accepts the honest view."""
    sim, bundle = honest()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("floor.json", "roots.json", "view.json"):
            text = data.decode("utf-8", "replace")
            (Path(folder) / name).write_bytes(dumped({"body": text, "sha256": digest(text.encode())}))
        trust = trust_in(Path(folder))
        trust.view()
        with suppress(UntrustedError):  # a floor that says more than was ever signed is obeyed
            assert trust.accept(bundle, sim.now).assignments


def records() -> list[bytes]:
    sim, bundle = honest()
    with tempfile.TemporaryDirectory() as folder:
        trust_in(Path(folder)).accept(bundle, sim.now)
        names = ("floor.json", "roots.json", "view.json")
        return [json.loads((Path(folder) / name).read_bytes())["body"].encode() for name in names]


FILE = FileEntry("model.onnx", 1_000, "ab" * 32)


class NoStore:
    def discard(self, sha256: str) -> None:
        assert sha256 == FILE.sha256


def run_content_range(data: bytes) -> None:
    """A resumed answer is taken only when it is the very rest of the file, whatever its header says."""
    text = data.decode("latin-1")
    answer: Any = SimpleNamespace(status=206, headers={"Content-Range": text})
    store: Any = NoStore()
    assert download._place(store, FILE, answer, 400, FILE.length) == (400, FILE.length)
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    assert numbers[0] == 400
    assert numbers[1] < FILE.length
    assert numbers[2:] in ([], [FILE.length])


def answer_of(headers: Mapping[str, str]) -> requests.Response:
    response = requests.Response()
    response.status_code, response.raw, response.url = 503, BytesIO(), "https://fleet.example/x"
    response.headers.update(headers)
    return response


def run_headers(data: bytes) -> None:
    text = data.decode("latin-1")
    seconds = transport._retry_after(answer_of({"Retry-After": text}))
    assert seconds is None or 0 <= seconds <= transport.LONGEST_RETRY_AFTER
    transport._is_page(answer_of({"Content-Type": text}))
    with suppress(TransferError):
        transport._refuse_encoding(answer_of({"Content-Encoding": text}))


PINNED = transport.Transport("https://fleet.example", ["blobs.example:8443"], "secret")


def run_redirect(data: bytes) -> None:
    """Wherever an answer points: a pinned host by https or a refusal; the credential goes to the server alone."""
    url = PINNED._next_hop("https://fleet.example/api/device/v1/blobs/x", data.decode("latin-1"))
    prepared = requests.Session().prepare_request(requests.Request("GET", url)).url or ""
    PINNED._check_host(prepared)
    exchange = transport._Exchange("GET", None, {}, 1.0, authorise=True)
    headers = PINNED._headers(prepared, exchange)
    # The address as the standard library reads it, which is not the parser that the rule is written with.
    host = re.match(r"https://([^/?#@\\]+)", prepared)
    assert host is not None
    assert host[1].lower().removesuffix(":443") in {"fleet.example", "blobs.example:8443"}
    assert ("Authorization" in headers) == (host[1].lower().removesuffix(":443") == "fleet.example")


REDIRECT_ERRORS: Errors = (UntrustedError, requests.RequestException)


# Server


def run_range(data: bytes) -> None:
    part = blobs.parse_range(data.decode("latin-1"), 1_000)
    assert part is None or 0 <= part[0] < part[1] <= 1_000


EXPECTED = parsing.Expected("a" * 32, "cam-1", "digits", 2)


def run_batch(data: bytes) -> None:
    samples = parsing.parse(data, EXPECTED)
    assert len(samples) == 2
    held = sum(array.nbytes for each in samples for array in (*each.inputs.values(), *each.outputs.values()))
    assert held <= len(data)


@cache
def role() -> tuple[Simulator, bytes]:
    sim = honest()[0]
    return sim, sim.roles["digits"].to_bytes()


def run_role(data: bytes) -> None:
    """Only what CI's key has signed is taken; and that is just the role that it did sign."""
    sim, content = role()
    now = datetime.fromtimestamp(sim.now, UTC)
    found = repository.check_role(data, model="digits", delegator=sim.targets.signed, current=0, now=now)
    assert found.targets == repository.read_entries(Metadata.from_bytes(content).signed, "digits")


def run_role_entries(data: bytes) -> None:
    """The same behind the signature: CI's key may be stolen, or its script may be wrong."""
    metadata = repository._parse_role(data)
    entries = repository.read_entries(metadata.signed, "digits")
    for path, (length, sha256) in entries.items():
        assert path.startswith("digits/")
        assert type(length) is int
        assert re.fullmatch("[0-9a-f]{64}", sha256)


def run_onnx(data: bytes) -> None:
    """In this process: only what is ours of the probe, onnx's parser and our walk; its death is tested elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        import onnx
        from google.protobuf.message import DecodeError

        try:
            model = onnx.load(str(path), load_external_data=False)
        except DecodeError:
            return
        for location in onnx_probe.external_locations(model):
            with suppress(onnx_probe.RefusedError):
                onnx_probe._check_location(path.parent, location)
                assert plain_location(location)


def plain_location(location: str) -> bool:
    return Path(location).name == location


# Patches, and what travels beside a release


def run_patch(data: bytes) -> None:
    """From the base that its head names: what comes out is never more than the target's length."""
    head = Head.parse(data[:HEAD_BYTES])
    out = sum(map(len, pieces(data, OLD, head.target_sha256, min(head.target_length, 4096))))
    assert out <= 4096


def run_offers(data: bytes) -> None:
    offers = parse_offers(data)
    assert parse_offers(dumped(offers_to_json(offers))) == offers


def run_selector(data: bytes) -> None:
    """What parses means one thing: its text parses back to it, and an empty one has no text."""
    text = data.decode(errors="surrogateescape")
    found = selection.parse(text)
    assert selection.parse(str(found)) == found
    assert bool(found) == bool(text.strip())
    assert len(found.requirements) <= selection.REQUIREMENTS
    found.matches({"site": "berlin"}, "cam-1")


SELECTORS = ("site in (berlin, hamburg), hw=jetson, !lab", 'a notin ("b c", "\\"") , @name!=cam-1, x==y')


def run_bom(data: bytes) -> None:
    outline = bom.read_bom(data)
    assert len(json.dumps(outline)) < limits.ATTACHMENT


def run_free(data: bytes) -> None:
    assert all(isinstance(value, str) for value in bom.read_free(data).get("values", {}).values())


def run_model_signature(data: bytes) -> None:
    signature = model_signing.read_signature(data)
    assert model_signing.judge(signature, {"model.onnx": "ab" * 32}, []).state is not State.VERIFIED


def run_stick_root(data: bytes) -> None:
    """What lies on a stick came from another machine: it is described in words, or refused."""
    assert all(line.isprintable() for line in offline.describe(offline.read_root(data).signed, None))


def run_stick_targets(data: bytes) -> None:
    assert all(line.isprintable() for line in offline.describe(offline.read_targets(data).signed, None))


@cache
def stick() -> tuple[bytes, bytes]:
    named = [offline.Named(name, signer(name).public_key) for name in ("anna", "boris", "dora", "online", "ci")]
    expires = datetime.fromtimestamp(START, UTC)
    root = offline.first_root(named[:2], [named[2]], named[3], root_threshold=2, targets_threshold=1, expires=expires)
    targets = offline.first_targets(named[3], expires=expires)
    offline.set_model(targets, "digits", [named[4]], 1)
    return Metadata(root).to_bytes(), Metadata(targets).to_bytes()


BOM = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "metadata": {"component": {"type": "machine-learning-model", "name": "digits", "version": "1"}},
    "components": [{"type": "data", "name": "mnist", "licenses": [{"license": {"id": "MIT"}}]}],
}
SIGNATURES = Path(__file__).parents[1] / "server" / "model_sigs"

TARGETS = (
    Target("patch", run_patch, lambda: [golden()[0], golden_quarters()[0], RICH], is_json=False),
    Target("patch-offers", run_offers, lambda: [dumped(offers_to_json([PatchOffer("ab" * 32, "cd" * 32, 9)]))]),
    Target("selector", run_selector, lambda: [text.encode() for text in SELECTORS], errors=(Invalid,), is_json=False),
    Target("bom", run_bom, lambda: [dumped(BOM)], errors=(Invalid,)),
    Target("provenance", run_free, lambda: [dumped({"commit": "1f3c", "accuracy": 0.97})], errors=()),
    Target(
        "model-signature",
        run_model_signature,
        lambda: [path.read_bytes() for path in sorted(SIGNATURES.glob("*.sig"))],
        errors=(Invalid,),
    ),
    Target("stick-root", run_stick_root, lambda: [stick()[0]], errors=(FleetError, ProtocolError)),
    Target("stick-targets", run_stick_targets, lambda: [stick()[1]], errors=(FleetError, ProtocolError)),
    Target("manifest", run_manifest, lambda: [MANIFEST.to_bytes()]),
    Target("acceptance", run_acceptance, lambda: [accepted().to_bytes()], is_json=False),
    Target("acceptance-index", run_acceptance_index, lambda: [accepted_members()[ACCEPTANCE_INDEX]]),
    Target(
        "bundle",
        run_bundle,
        lambda: [Bundle({"timestamp.json": "{}", "1.root.json": "{}"}, {"ab" * 32: "{}"}).to_bytes()],
    ),
    Target(
        "assignment", run_assignment, lambda: [dumped(ASSIGNMENT.to_custom()), dumped(Assignment("digits").to_custom())]
    ),
    Target("events", run_events, lambda: [dumped(POST.to_json())]),
    Target(
        "enrolment",
        run_enrolment,
        lambda: [dumped(EnrolRequest("cam-1", "0" * 32, {"site": "x"}, "0.1.0", ABILITIES).to_json())],
    ),
    Target("batch-head", run_head, lambda: [dumped(HEAD.to_json())]),
    Target("batch-index", run_index, lambda: [INDEX.to_bytes()]),
    Target("tag", run_tag, lambda: [str(Tag(17, "0" * 16)).encode(), b'W/"0-0123456789abcdef"'], is_json=False),
    Target(
        "provision",
        run_provision,
        lambda: [
            Provision("https://fleet.example", "{}", "token", ("digits",), ("cdn.example:8443",), START).to_bytes()
        ],
    ),
    Target("scores", run_scores, lambda: [dumped(Scores("y", kind).to_json()) for kind in KINDS]),
    Target("ledger", run_ledger, lambda: [ledger_file()]),
    Target("hashed", run_hashed, lambda: [b'{"' + b"ab" * 32 + b'": [1, 2, 3, 4, 5]}']),
    Target("standing", run_standing, lambda: [standing_file()]),
    Target("identity", run_identity, lambda: [Identity("cam-1", "0" * 32, "secret").to_bytes()]),
    Target(
        "upload",
        run_upload,
        lambda: [dumped({"url": "https://s3.example/x", "method": "PUT", "headers": {"a": "b"}, "credential": False})],
    ),
    Target("view", run_view, lambda: [honest()[1].to_bytes()], weight=0.1),
    *(
        Target(f"view-{name}", run_inner(f"{name}.json"), inner(f"{name}.json"), weight=0.1)
        for name in ("timestamp", "snapshot", "targets", "director", "root")
    ),
    Target("trust-files", run_trust_files, records, weight=0.1),
    Target(
        "content-range",
        run_content_range,
        lambda: [b"bytes 400-999/1000", b"bytes 400-999/*"],
        errors=(UntrustedError,),
        is_json=False,
    ),
    Target(
        "headers",
        run_headers,
        lambda: [b"120", b"Wed, 21 Oct 2026 07:28:00 GMT", b"text/html; q=1"],
        errors=(),
        is_json=False,
    ),
    Target(
        "redirect",
        run_redirect,
        lambda: [
            b"https://blobs.example:8443/x?sig=1",
            b"//blobs.example:8443/x",
            b"/api/x",
            b"https://fleet.example@evil.example/x",
            b"https://fleet.example\\@evil.example/x",
        ],
        errors=REDIRECT_ERRORS,
        is_json=False,
    ),
    Target("range", run_range, lambda: [b"bytes=0-9", b"bytes=-5"], errors=(blobs.UnsatisfiableError,), is_json=False),
    Target(
        "batch",
        run_batch,
        lambda: [pack([sample(0), sample(1)], batch_id="a" * 32)],
        errors=(Invalid,),
        is_json=False,
        weight=0.5,
    ),
    Target("role", run_role, lambda: [role()[1]], errors=(FleetError,), weight=0.3),
    Target("role-entries", run_role_entries, lambda: [role()[1]], errors=(FleetError,)),
    Target("onnx", run_onnx, lambda: [onnx_model(), external_model()[0]], errors=(), is_json=False, weight=0.3),
)
BY_NAME = {target.name: target for target in TARGETS}


def attempt(target: Target, data: bytes) -> None:
    """One message: it is parsed, or refused by an error of the named family. Anything else passes through."""
    with suppress(*target.errors):
        target.run(data)
