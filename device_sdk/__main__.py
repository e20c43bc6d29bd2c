"""`fleet-device`: what a person at the device needs. Exit codes: 0 done, 2 usage or set-up, 3 refused, 4 network."""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_sdk import __version__
from device_sdk.config import Home, Provision
from device_sdk.errors import DeviceError, InputError, NoModelError, SetupError, TransferError, is_retryable
from device_sdk.protocol.errors import ProtocolError

if TYPE_CHECKING:
    from device_sdk.model import Model
    from device_sdk.status import Status

OK, USAGE, REFUSED, NETWORK = 0, 2, 3, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Errors go to standard error in one line."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.ERROR, format="%(levelname)s %(message)s")
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (DeviceError, ProtocolError) as error:
        print(f"fleet-device: {error.code}: {error}", file=sys.stderr)  # noqa: T201
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    if isinstance(error, (SetupError, InputError, ProtocolError)):
        return USAGE
    return NETWORK if isinstance(error, TransferError) and is_retryable(error) else REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleet-device", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", type=Path, default=Path("/var/lib/fleet"), help="the device's directory")
    common.add_argument("--verbose", "-v", action="store_true", help="show what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        each = commands.add_parser(name, parents=[common], help=about, description=about)
        each.set_defaults(command=command)
        return each

    each = add("enrol", _enrol, "make this directory a device of the fleet")
    each.add_argument("--provision", type=Path, help="the file that the operator handed out; kept in the directory")
    each.add_argument("--name", required=True, help="the device's name")
    each.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    each.add_argument(
        "--patience", type=float, default=900.0, metavar="SECONDS", help="wait so long where the server asks to (900)"
    )
    each = add("status", _status, "what runs, and why not something newer")
    each.add_argument("--json", action="store_true", help="for programs")
    add("update", _update, "poll once and install what is new")
    each = add("run", _run, "run a model on an input, by its last good release")
    each.add_argument("model")
    each.add_argument("input", type=Path, help=".npy for a model of one input; .json for {name: nested lists}")
    each = add("forgive", _forgive, "let a release be tried again that was rejected here")
    each.add_argument("model")
    each.add_argument("version")
    add("upload", _upload, "upload the samples that wait, now")
    return parser


def _enrol(options: argparse.Namespace) -> int:
    from device_sdk.enrolment import enrol

    labels = dict(_label(text) for text in options.label)
    if options.provision is not None:
        _place_provision(options.provision, Home(options.home))
    state = enrol(options.home, options.name, labels, patience=options.patience, wait=_wait)
    _say(f"{options.name}: {state}" + (", waiting for approval" if state == "pending" else ""))
    return OK


def _wait(seconds: float) -> None:
    print(f"fleet-device: the server asks to come back later; waiting {seconds:.0f} s", file=sys.stderr)  # noqa: T201
    time.sleep(seconds)


def _status(options: argparse.Namespace) -> int:
    from device_sdk.client import Fleet

    with Fleet.open(options.home, read_only=True) as fleet:
        status = fleet.status()
    _say(json.dumps(status.to_json(), indent=1) if options.json else _described(status))
    return OK


def _update(options: argparse.Namespace) -> int:
    from device_sdk.client import Fleet

    with Fleet.open(options.home) as fleet:
        status = fleet.update_once()
    _say(_described(status))
    return REFUSED if any(model.state in {"failed", "rolled_back"} for model in status.models.values()) else OK


def _run(options: argparse.Namespace) -> int:
    from device_sdk.client import Fleet

    with Fleet.open(options.home, read_only=True) as fleet:
        model = fleet.model(options.model)
        if model.release is None and fleet.status().models[options.model].state != "stopped":
            raise NoModelError(f"no release of {options.model!r} is installed yet; run `fleet-device update`")
        outputs = model.run(_inputs(model, options.input) if model.release else {})  # of a stopped one, it says why
    _say(json.dumps({name: _plain(value) for name, value in outputs.items()}))
    return OK


def _forgive(options: argparse.Namespace) -> int:
    from device_sdk.client import Fleet

    with Fleet.open(options.home) as fleet:
        count = fleet.forgive(options.model, options.version)
    if not count:
        print(f"fleet-device: {options.model} {options.version} was not rejected here", file=sys.stderr)  # noqa: T201
        return USAGE
    _say(f"{options.model} {options.version} may be tried again: {count} variant(s)")
    return OK


def _upload(options: argparse.Namespace) -> int:
    from device_sdk.client import Fleet

    with Fleet.open(options.home) as fleet:
        report = fleet.upload_now()
    _say(f"uploaded {report.samples} samples in {report.sent} batches")
    if report.lost or report.failed:
        _say(f"not taken: {report.failed} batches, kept; {report.lost} batches, given up")
    return REFUSED if report.lost or report.failed else OK


def _label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise SetupError(f"label: expected key=value; got {text!r}")
    return key, value


def _place_provision(source: Path, home: Home) -> None:
    """Keep the file in the directory, once it has been seen to parse."""
    try:
        Provision.parse(source.read_bytes())
        home.make()
        if source.resolve() != home.provision_file.resolve():
            shutil.copyfile(source, home.provision_file)
            home.provision_file.chmod(0o600)
    except OSError as error:
        raise SetupError(f"cannot read {error.filename}: {error.strerror}") from error


def _inputs(model: "Model", path: Path) -> dict[str, Any]:
    """Arrays by name, of the types that the model takes. One array is enough for a model of one input."""
    import numpy as np

    try:
        value = json.loads(path.read_bytes()) if path.suffix == ".json" else np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SetupError(f"cannot read {path}: {error}") from error
    specs = model.inputs
    if not isinstance(value, dict) and len(specs) == 1:
        value = {next(iter(specs)): value}
    if not isinstance(value, dict):
        raise SetupError(f"{path}: the model takes {', '.join(specs)}; expected a JSON object of these")
    return {name: np.asarray(item, dtype=specs[name].dtype if name in specs else None) for name, item in value.items()}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _described(status: "Status") -> str:
    lines = [f"device   {status.device} at {status.server}"]
    if status.poll is not None and status.poll.error:
        lines.append(f"poll     {status.poll.error}")
    for name, model in sorted(status.models.items()):
        lines.append(f"{name:8} {model.release or 'nothing installed'}")
        if model.state != "idle":
            target = f" {model.target}" if model.target != model.release else ""
            lines.append(f"{'':8} {model.state}{target}" + (f": {model.reason}" if model.reason else ""))
        if model.missing_providers:
            lines.append(f"{'':8} no {', '.join(model.missing_providers)}: it runs on {', '.join(model.providers)}")
    if sum(status.samples_waiting.values()):
        lines.append(f"samples  {sum(status.samples_waiting.values())} wait for upload")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
