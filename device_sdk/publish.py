"""`fleet-publish`: CI hashes and uploads a release, signs its model's role with its own key, and publishes both.

The private key never leaves this machine, and a role that comes from the server is signed on only if it carries a
signature of a key that we know: a broken-into server must not get its own entries signed.
Exit codes: 0 done, 2 wrong use, 3 refused by the server, 4 network or server failure, 5 invalid after `--wait`,
6 well signed but by too few: somebody else runs `fleet-publish sign`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Key, Signer

from device_sdk import signing
from device_sdk.errors import DeviceError, SetupError, TransferError, UntrustedError, is_retryable
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import ATTACHMENT_KINDS, MODEL_SIGNATURE
from device_sdk.protocol.names import check_model
from device_sdk.protocol.scores import KINDS
from device_sdk.publishing import needs
from device_sdk.publishing.console import progress, say
from device_sdk.publishing.roles import Edit, add_targets, next_role, remove_release, sign_and_post
from device_sdk.publishing.server import Server
from device_sdk.publishing.variants import Variant, check_same, chosen

OK, USAGE, REFUSED, FAILED, INVALID, PENDING = 0, 2, 3, 4, 5, 6


def push(options: argparse.Namespace, server: Server, signer: Signer) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        return _push(options, server, signer, chosen(options, options.accept_out or Path(scratch)))


def _push(options: argparse.Namespace, server: Server, signer: Signer, variants: Sequence[Variant]) -> int:
    present = server.release(options.model, options.version)
    if present is not None:
        check_same(present, variants)
    if present is not None and present["state"] != "withdrawn":
        say(f"{options.model} {options.version} is published already ({present['state']}); nothing to do")
        return _conclude(options, server, present)
    wanted = {file.entry.sha256: file for variant in variants for file in (*variant.files, *variant.beside)}
    for file in wanted.values():
        with progress(file.entry.name, file.entry.length) as report:
            server.upload(file, report)
        say(f"uploaded {file.entry.name}: {file.entry.length:,} bytes, sha256 {file.entry.sha256}")
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
    size = sum(file.length for variant in variants for file in variant.manifest.fetched)
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


def known_keys(options: argparse.Namespace) -> list[Key]:
    return [signing.read_public(path) for path in options.role_key]


def _token(options: argparse.Namespace) -> str:
    token: str = options.token or os.environ.get("FLEET_API_TOKEN", "")
    if not token:
        raise SetupError("no API token: set FLEET_API_TOKEN, or give --token")
    return token


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
    command.add_argument(
        "--scores", default="", metavar="OUTPUT[:KIND]",
        help=f"the output with the scores of classes ({', '.join(KINDS)}): devices then watch confidence and class mix",
    )  # fmt: skip
    _acceptance_arguments(command)
    command.add_argument("--min-sdk", default="", help="the oldest SDK that can run it")
    command.add_argument("--min-runtime", default="", help="the oldest onnxruntime that can run it")
    command.add_argument("--opset", type=int, default=0)
    command.add_argument("--memory", type=int, default=0, help="bytes that a device needs")
    command.add_argument("--needs", action="append", default=[], metavar="[VARIANT:]KEY=VALUE", help=needs.HELP)
    command.add_argument("--wait", action="store_true", help="until the server has validated it")
    command.add_argument("--wait-seconds", type=float, default=600)
    command.add_argument("--poll-seconds", type=float, default=1.0, help=argparse.SUPPRESS)
    command.set_defaults(run=push)
    _common_arguments(command)


def _acceptance_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "acceptance bundle", "The model is run here on samples; devices refuse a release that does not answer alike."
    )
    group.add_argument(
        "--accept", type=Path, action="append", default=[], metavar="SAMPLES",
        help="an .npz file, or a folder of .npy files, with an array for each input; may be repeated",
    )  # fmt: skip
    group.add_argument("--accept-batch", type=int, default=1, help="rows of a call, where the model leaves them open")
    group.add_argument(
        "--accept-rtol", action="append", default=[], metavar="[OUTPUT=]R", help="relative tolerance of floats: 1e-3"
    )
    group.add_argument(
        "--accept-atol", action="append", default=[], metavar="[OUTPUT=]A", help="absolute tolerance of floats: 1e-4"
    )
    group.add_argument("--max-latency-ms", type=float, default=0.0, help="of a call on the device, the median of 7")
    group.add_argument("--max-memory-mb", type=float, default=0.0, help="MiB at most, while it loads and answers")
    group.add_argument("--accept-out", type=Path, help="a folder that keeps the bundles, for whoever signs second")


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
