"""`fleet-publish`: CI hashes and uploads a release, signs its model's role with its own key, and publishes both.

The private key never leaves this machine, and a role that comes from the server is signed on only if it carries a
signature of a key that we know: a broken-into server must not get its own entries signed.
Exit codes: 0 done, 2 wrong use, 3 refused by the server, 4 network or server failure, 5 invalid after `--wait`,
6 well signed but by too few: somebody else runs `fleet-publish sign`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import file_digest
from pathlib import Path
from typing import Any

import requests
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import CryptoSigner, Key, Signer
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from device_sdk import signing
from device_sdk.errors import DeviceError, SetupError, TransferError, UntrustedError, is_retryable
from device_sdk.protocol import limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import (
    ATTACHMENT_KINDS,
    MODEL_SIGNATURE,
    Attachment,
    FileEntry,
    Manifest,
    Requirements,
    TensorSpec,
    digest,
)
from device_sdk.protocol.names import ReleasePath, check_file_name, check_model, check_name

ROLE_LIFETIME = timedelta(days=180)
CHUNK = 8 * 1024 * 1024  # bytes in one PUT; what a broken line costs at most
TRIES = 6
BACKOFF = 0.5  # seconds before the second try; doubles
TIMEOUT = (10.0, 300.0)  # seconds to connect, and without a byte
OK, USAGE, REFUSED, FAILED, INVALID, PENDING = 0, 2, 3, 4, 5, 6
_DTYPES = {"float": "float32", "double": "float64", "string": "object"}
Report = Callable[[int], None]
Edit = Callable[[Targets], None]


@dataclass(frozen=True, slots=True)
class LocalFile:
    path: Path
    entry: FileEntry


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant to publish; the first file is the one that is loaded."""

    manifest: Manifest
    files: tuple[LocalFile, ...]
    attached: tuple[LocalFile, ...] = ()


class Server:
    """The CI API. Every request may be repeated: the server knows what it has."""

    def __init__(self, address: str, token: str, *, pause: Callable[[float], None] = time.sleep) -> None:
        self._address = address.rstrip("/") + "/api/ci/v1"
        self._pause = pause
        self._session = requests.Session()
        self._session.auth = _Bearer(token)  # as `auth`: a header would give way to ~/.netrc

    def role(self, model: str) -> bytes | None:
        """The newest role; None: sign version 1."""
        answer = self._call("GET", f"/models/{model}/role", allowed={"no_role_yet"})
        return None if answer.status_code == 404 else answer.content

    def release(self, model: str, version: str) -> dict[str, Any] | None:
        answer = self._call("GET", f"/models/{model}/releases/{version}", allowed={"unknown_release"})
        return None if answer.status_code == 404 else _object(answer)

    def publish(self, model: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return _object(self._call("POST", f"/models/{model}/releases", body=json.dumps(body).encode()))

    def proposal(self, model: str) -> dict[str, Any] | None:
        """The role that waits for signatures, or None."""
        answer = self._call("GET", f"/models/{model}/role/pending", allowed={"no_pending_role"})
        return None if answer.status_code == 404 else _object(answer)

    def add_signatures(self, model: str, role: str) -> dict[str, Any]:
        return _object(self._call("POST", f"/models/{model}/role/pending", body=json.dumps({"role": role}).encode()))

    def update_role(self, model: str, role: str) -> dict[str, Any]:
        return _object(self._call("POST", f"/models/{model}/role", body=json.dumps({"role": role}).encode()))

    def upload(self, file: LocalFile, report: Report) -> None:
        """Go on where the server stands; a file that it has costs one request."""
        where = f"/blobs/{file.entry.sha256}"
        answer = self._call("HEAD", where)
        with file.path.open("rb") as stream:
            while answer.headers.get("Upload-Complete") != "?1":
                offset = _offset(answer)
                report(offset)
                stream.seek(offset)
                headers = {"Upload-Offset": str(offset), "Upload-Length": str(file.entry.length)}
                answer = self._put(where, stream.read(CHUNK), headers)
        report(file.entry.length)

    def _put(self, where: str, chunk: bytes, headers: Mapping[str, str]) -> requests.Response:
        for attempt in range(TRIES * 2):
            answer = self._call("PUT", where, body=chunk, headers=headers, allowed={"wrong_offset", "upload_busy"})
            if answer.status_code != 409 or "Upload-Offset" in answer.headers:
                return answer
            self._pause(min(BACKOFF * 2**attempt, 10.0))  # another runner uploads the same file
        raise _error(answer)

    def _call(
        self,
        method: str,
        where: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        allowed: frozenset[str] | set[str] = frozenset(),
    ) -> requests.Response:
        """Ask, again where that may help. Raises TransferError, but for refusals whose code is `allowed`."""
        for attempt in range(TRIES):
            try:
                answer = self._send(method, where, body, headers)
                if answer.status_code < 300 or _refusal(answer)[0] in allowed:
                    return answer
                raise _error(answer)
            except TransferError as error:
                if not is_retryable(error) or attempt == TRIES - 1:
                    raise
                self._pause(error.retry_after or min(BACKOFF * 2**attempt, 30.0))
        raise AssertionError("unreachable")

    def _send(
        self, method: str, where: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> requests.Response:
        kind = "application/octet-stream" if method == "PUT" else "application/json"
        try:
            return self._session.request(
                method,
                self._address + where,
                data=body,
                headers={"Content-Type": kind, "Accept": "application/json", **(headers or {})},
                timeout=TIMEOUT,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise TransferError(f"{self._address}: {error}") from error


class _Bearer(requests.auth.AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def build_variant(
    path: ReleasePath,
    files: Sequence[Path],
    *,
    requires: Requirements,
    metadata: Mapping[str, str],
    attach: Sequence[tuple[str, Path]] = (),
) -> Variant:
    """`attach`: kind and file of what is said about the variant."""
    local = tuple(_local(file) for file in files)
    inputs, outputs = _tensors(files[0])
    attached = tuple((kind, _attachment(file)) for kind, file in attach)
    manifest = Manifest(
        path=path,
        files=tuple(file.entry for file in local),
        entry=local[0].entry.name,
        inputs=inputs,
        outputs=outputs,
        requires=requires,
        metadata=metadata,
        attachments=tuple(Attachment(kind, f.entry.name, f.entry.length, f.entry.sha256) for kind, f in attached),
    )
    files_attached = tuple(file for _, file in attached)
    return Variant(Manifest.parse(manifest.to_bytes()), local, files_attached)  # parsed: what we refuse need not travel


def add_targets(variants: Sequence[Variant]) -> Edit:
    def edit(role: Targets) -> None:
        for variant in variants:
            content, path = variant.manifest.to_bytes(), str(variant.manifest.path)
            role.targets[path] = TargetFile(len(content), {"sha256": digest(content)}, path)

    return edit


def remove_release(model: str, version: str) -> Edit:
    def edit(role: Targets) -> None:
        prefix = f"{model}/{version}/"
        gone = [path for path in role.targets if path.startswith(prefix)]
        if not gone:
            raise SetupError(f"the role of {model} does not list {version}")
        for path in gone:
            del role.targets[path]

    return edit


def next_role(current: bytes | None, *, signer: Signer, known: Sequence[Key], edit: Edit) -> str:
    """The next version of a role, edited and signed. Raises UntrustedError for one that none of our keys signed."""
    role = Targets(version=1) if current is None else trusted(current, [signer.public_key, *known])
    if current is not None:
        role.version += 1
    role.expires = (datetime.now(UTC) + ROLE_LIFETIME).replace(microsecond=0)
    edit(role)
    metadata = Metadata(role)
    metadata.sign(signer)
    return metadata.to_bytes(JSONSerializer(compact=True)).decode()


def sign_and_post(server: Server, model: str, make: Callable[[bytes | None], str], post: Callable[[str], Any]) -> Any:
    """Sign upon the newest role; when another runner was faster, again upon its."""
    for attempt in range(TRIES):
        try:
            return post(make(server.role(model)))
        except TransferError as error:
            if error.code not in {"stale_role", "pending_changed"} or attempt == TRIES - 1:
                raise
    raise AssertionError("unreachable")


def push(options: argparse.Namespace, server: Server, signer: Signer) -> int:
    variants = _variants(options)
    present = server.release(options.model, options.version)
    if present is not None:
        _check_same(present, variants)
    if present is not None and present["state"] != "withdrawn":
        say(f"{options.model} {options.version} is published already ({present['state']}); nothing to do")
        return _conclude(options, server, present)
    wanted = {file.entry.sha256: file for variant in variants for file in (*variant.files, *variant.attached)}
    for file in wanted.values():
        with _progress(file) as report:
            server.upload(file, report)
    manifests = {variant.manifest.path.variant: variant.manifest.to_bytes().decode() for variant in variants}
    answer = sign_and_post(
        server,
        options.model,
        lambda current: next_role(current, signer=signer, known=known_keys(options), edit=add_targets(variants)),
        lambda role: server.publish(options.model, {"version": options.version, "manifests": manifests, "role": role}),
    )
    release = answer["release"] if answer.get("pending") else answer
    for version in answer.get("superseded", ()):
        say(f"note: the proposal of {options.model} {version} had too few signatures and is superseded by this one")
    size = sum(variant.manifest.length for variant in variants)
    for said in _said(release):
        say(said)
    say(f"published {options.model} {options.version}: {len(variants)} variant(s), {size:,} bytes, {release['state']}")
    return _conclude(options, server, release)


def revoke(options: argparse.Namespace, server: Server, signer: Signer) -> int:
    """Take a release out of the role: no device installs it any more."""
    return _update(options, server, signer, remove_release(options.model, options.version))


def renew(options: argparse.Namespace, server: Server, signer: Signer) -> int:
    """Sign the role anew before it expires; a monthly job of CI."""
    return _update(options, server, signer, lambda _: None)


def keygen(options: argparse.Namespace) -> int:
    """Make an Ed25519 key; the public half is printed, for `ceremony set-model` or `trust_add_model --ci-public`."""
    signer = CryptoSigner.generate_ed25519()
    content = signer.private_bytes
    if options.encrypt:
        content = signing.encrypted(signer, signing.new_passphrase(signing.asker()))
    try:
        signing.write_private(options.out, content)
    except OSError as error:
        raise SetupError(f"cannot make {options.out}: {error.strerror}") from error
    sys.stdout.write(signing.public_to_json(signer.public_key))
    say(f"the private key is {options.out}: put it into CI's secrets")
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "keygen":
            return keygen(options)
        check_model(options.model)
        server = Server(options.server, _token(options))
        signer = _signer(options) if options.key else None
        result: int = options.run(options, server, signer)
    except TransferError as error:
        say(f"error: {error} [{error.code}]")
        return REFUSED if 400 <= error.status < 500 and not is_retryable(error) else FAILED
    except (DeviceError, ProtocolError) as error:
        say(f"error: {error} [{error.code}]")
        return REFUSED if isinstance(error, UntrustedError) else USAGE
    return result


def _signer(options: argparse.Namespace) -> Signer:
    public = signing.read_public(options.public) if options.public else None
    return signing.load_signer(options.key, public, ask=signing.asker())


def _update(options: argparse.Namespace, server: Server, signer: Signer, edit: Edit) -> int:
    def make(current: bytes | None) -> str:
        if current is None:
            raise SetupError(f"{options.model} has no role yet; push a release first")
        return next_role(current, signer=signer, known=known_keys(options), edit=edit)

    answer = sign_and_post(server, options.model, make, lambda role: server.update_role(options.model, role))
    if answer.get("pending"):
        say(
            f"version {answer['version']} of the role of {options.model} is proposed and changes nothing until it has "
            f"enough signatures; to be removed: {', '.join(answer['removed']) or 'none'}"
        )
        say_pending(options, answer)
        return PENDING
    say(f"role of {options.model} is at version {answer['version']}; removed: {', '.join(answer['removed']) or 'none'}")
    return OK


def _said(release: Mapping[str, Any]) -> Iterator[str]:
    """What the server found of each model signature."""
    for name, variant in release["variants"].items():
        for item in variant.get("attachments", []):
            if item["kind"] == MODEL_SIGNATURE:
                yield f"{name}: {item['name']} is {item['verdict']}"


def _conclude(options: argparse.Namespace, server: Server, release: Mapping[str, Any]) -> int:
    """With `--wait`: what validation says. Without: what is known now."""
    deadline = time.monotonic() + options.wait_seconds
    if options.wait and release["state"] == "pending":
        say_pending(options, release["signatures"])
    while options.wait and release["state"] in {"pending", "validating"} and time.monotonic() < deadline:
        time.sleep(options.poll_seconds)
        release = server.release(options.model, options.version) or release
    if options.wait or release["state"] not in {"validating", "valid"}:
        say(f"{options.model} {options.version} is {release['state']}{release['reason'] and ': ' + release['reason']}")
    if release["state"] in {"invalid", "revoked", "withdrawn"}:
        return INVALID
    if release["state"] == "pending":
        if not options.wait:
            say_pending(options, release["signatures"])
        return PENDING
    return FAILED if options.wait and release["state"] == "validating" else OK


def say_pending(options: argparse.Namespace, standing: Mapping[str, Any]) -> None:
    """How many signatures there are, whose are missing, and what the second person does."""
    signed, missing = standing["signed"], standing["missing"]
    say(
        f"pending: {len(signed)} of {standing['threshold']} signatures; missing: "
        f"{standing['threshold'] - len(signed)} of {', '.join(missing) or 'no other key'}; the second person runs: "
        f"fleet-publish sign --model {options.model} --server {options.server} --key THEIR-KEY --role-key CI.pub.json"
    )


def _check_same(present: Mapping[str, Any], variants: Sequence[Variant]) -> None:
    """The same files under the same names are the same release, even where tensors were read on one machine only."""
    held = {name: _essence(Manifest.parse(item["manifest"].encode())) for name, item in present["variants"].items()}
    if held != {variant.manifest.path.variant: _essence(variant.manifest) for variant in variants}:
        message = f"{present['model']} {present['version']} was published with other content; releases never change"
        raise TransferError(message, code="version_exists", status=422)


def _essence(manifest: Manifest) -> Manifest:
    """Without what differs from one signing machine to the next: ECDSA signs the same thing anew each time."""
    said = tuple(item for item in manifest.attachments if item.kind != MODEL_SIGNATURE)
    return replace(manifest, inputs=(), outputs=(), attachments=said)


def trusted(content: bytes, keys: Sequence[Key]) -> Targets:
    try:
        metadata = Metadata[Targets].from_bytes(content)
    except DeserializationError as error:
        raise UntrustedError(f"the server's role does not parse: {error}", code="malformed_role") from error
    if not isinstance(metadata.signed, Targets) or not any(_has_signed(metadata, key) for key in keys):
        message = "the server's role is signed by none of our keys; after a change of keys give the old --role-key"
        raise UntrustedError(message, code="foreign_role")
    return metadata.signed


def _has_signed(metadata: Metadata[Targets], key: Key) -> bool:
    signature = metadata.signatures.get(key.keyid)
    if signature is None:
        return False
    try:
        key.verify_signature(signature, metadata.signed_bytes)
    except (UnverifiedSignatureError, VerificationError):
        return False
    return True


def _variants(options: argparse.Namespace) -> list[Variant]:
    """`--variant NAME=file,file` for several, or one made of the positional files."""
    named = [spec for spec in options.variant if "=" in spec]
    if bool(named) == bool(options.files) or (options.files and len(options.variant) > 1):
        raise SetupError("give either files (and one --variant NAME), or --variant NAME=file,file for each variant")
    chosen: dict[str, list[Path]] = {}
    for spec in named or [f"{(options.variant or ['default'])[0]}="]:
        name, _, listed = spec.partition("=")
        if name in chosen:
            raise SetupError(f"variant {name!r} is given twice")
        chosen[check_name(name, "variant")] = [Path(file) for file in listed.split(",")] if named else options.files
    requires = Requirements(options.min_sdk, options.min_runtime, options.opset, options.memory)
    metadata = _metadata(options.meta)
    version = check_name(options.version, "version")
    attach = _attached(options.attach, chosen)
    return [
        build_variant(
            ReleasePath(options.model, version, name), files, requires=requires, metadata=metadata, attach=attach[name]
        )
        for name, files in chosen.items()
    ]


def _attached(specs: Sequence[str], variants: Sequence[str] | Mapping[str, Any]) -> dict[str, list[tuple[str, Path]]]:
    """`KIND=FILE` for every variant, `VARIANT:KIND=FILE` for one."""
    attached: dict[str, list[tuple[str, Path]]] = {name: [] for name in variants}
    for spec in specs:
        named, equals, file = spec.partition("=")
        variant, _, kind = named.rpartition(":")
        if not equals or kind not in ATTACHMENT_KINDS or (variant and variant not in attached):
            expected = f"[VARIANT:]KIND=FILE with KIND one of {', '.join(ATTACHMENT_KINDS)}"
            raise SetupError(f"--attach: expected {expected}; got {spec!r}")
        for name in [variant] if variant else attached:
            attached[name].append((kind, Path(file)))
    return attached


def _attachment(path: Path) -> LocalFile:
    file = _local(path)
    if file.entry.length > limits.ATTACHMENT:
        raise SetupError(f"{path}: expected at most {limits.ATTACHMENT} bytes; got {file.entry.length}")
    return file


def _metadata(pairs: Sequence[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    wrong = [key for key, equals, _ in split if not equals or not key]
    if wrong:
        raise SetupError(f"--metadata: expected KEY=VALUE; got {wrong[0]!r}")
    return {key: value for key, _, value in split}


def _local(path: Path) -> LocalFile:
    try:
        with path.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
            return LocalFile(path, FileEntry(check_file_name(path.name), file.tell(), sha256))
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error


def _tensors(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs where onnxruntime is at hand and the model loads; else none: the server reads them anyway."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # onnxruntime has no base class
        say(f"note: inputs and outputs are not stated: {' '.join(str(error).split())[:200]}")
        return (), ()
    return _specs(session.get_inputs()), _specs(session.get_outputs())


def _specs(arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
    def dtype(kind: str) -> str:
        bare = kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind
        return _DTYPES.get(bare, bare)[:32]

    return tuple(
        TensorSpec(item.name, dtype(item.type), tuple(s if isinstance(s, (int, str)) else None for s in item.shape))
        for item in arguments
    )


def known_keys(options: argparse.Namespace) -> list[Key]:
    return [signing.read_public(path) for path in options.role_key]


def _token(options: argparse.Namespace) -> str:
    token: str = options.token or os.environ.get("FLEET_API_TOKEN", "")
    if not token:
        raise SetupError("no API token: set FLEET_API_TOKEN, or give --token")
    return token


def _offset(answer: requests.Response) -> int:
    value = answer.headers.get("Upload-Offset", "")
    if not value.isascii() or not value.isdigit():
        raise TransferError(f"{answer.url}: expected Upload-Offset; got {value!r:.40}", status=answer.status_code)
    return int(value)


def _object(answer: requests.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError as error:
        raise TransferError(f"{answer.url}: expected JSON", status=answer.status_code) from error
    if not isinstance(value, dict):
        raise TransferError(f"{answer.url}: expected a JSON object", status=answer.status_code)
    return value


def _refusal(answer: requests.Response) -> tuple[str, str]:
    """Code and message of a refusal; a proxy's page has neither."""
    try:
        body = answer.json()
        return str(body["code"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        return f"http_{answer.status_code}", answer.reason or "no reason given"


def _error(answer: requests.Response) -> TransferError:
    code, message = _refusal(answer)
    wait = answer.headers.get("Retry-After", "")
    return TransferError(
        f"{answer.request.method} {answer.url}: {answer.status_code} {message}",
        code=code,
        status=answer.status_code,
        retry_after=min(float(wait), 120.0) if wait.isascii() and wait.isdigit() else None,
    )


@contextmanager
def _progress(file: LocalFile) -> Iterator[Report]:
    """A bar where somebody watches and rich is installed; else a line at the end."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed
    except ImportError:
        yield lambda _: None
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(file.entry.name, total=file.entry.length)
            yield lambda done: bar.update(task, completed=done)
    say(f"uploaded {file.entry.name}: {file.entry.length:,} bytes, sha256 {file.entry.sha256}")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleet-publish", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("keygen", help="make CI's key")
    make.add_argument("out", type=Path, help="where the private key goes (PKCS#8 PEM, 0600)")
    make.add_argument(
        "--encrypt", action="store_true", help=f"with a passphrase: {signing.PASSPHRASE}, else asked for twice"
    )
    _push_arguments(commands.add_parser("push", help="publish a release"))
    taking = commands.add_parser("revoke", help="take a release out of the role")
    taking.add_argument("--version", required=True)
    taking.set_defaults(run=revoke)
    again = commands.add_parser("renew", help="sign the role anew before it expires")
    again.set_defaults(run=renew)
    for command in (taking, again):
        _common_arguments(command)
    from device_sdk import cosign  # it stands upon this module

    cosign.add_commands(commands)
    return parser


def _push_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="*", type=Path, help="the model first, then files that it refers to")
    command.add_argument("--version", required=True)
    command.add_argument("--variant", action="append", default=[], help="NAME, or NAME=file,file; may be repeated")
    command.add_argument(
        "--metadata", "--meta", dest="meta", action="append", default=[], metavar="KEY=VALUE",
        help="signed with the release, such as commit=1f3c or accuracy=0.97; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--attach", action="append", default=[], metavar="[VARIANT:]KIND=FILE",
        help=f"signed with the release, kept by the server: {', '.join(ATTACHMENT_KINDS)}; may be repeated",
    )  # fmt: skip
    command.add_argument("--min-sdk", default="", help="the oldest SDK that can run it")
    command.add_argument("--min-runtime", default="", help="the oldest onnxruntime that can run it")
    command.add_argument("--opset", type=int, default=0)
    command.add_argument("--memory", type=int, default=0, help="bytes that a device needs")
    command.add_argument("--wait", action="store_true", help="until the server has validated it")
    command.add_argument("--wait-seconds", type=float, default=600)
    command.add_argument("--poll-seconds", type=float, default=1.0, help=argparse.SUPPRESS)
    command.set_defaults(run=push)
    _common_arguments(command)


def _common_arguments(command: argparse.ArgumentParser) -> None:
    server_arguments(command)
    signing_arguments(command, "CI's private key: a PEM file or a securesystemslib URI")


def server_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True)
    command.add_argument("--server", required=True, help="address, such as https://fleet.example.com")
    command.add_argument("--token", default="", help="API token; better in FLEET_API_TOKEN")
    command.set_defaults(key="")


def signing_arguments(command: argparse.ArgumentParser, help_text: str) -> None:
    command.add_argument("--key", required=True, help=help_text)
    command.add_argument("--public", type=Path, help="its public half as JSON; a URI needs it")
    command.add_argument("--role-key", type=Path, action="append", default=[], help="another key whose roles we trust")


if __name__ == "__main__":
    sys.exit(main())
