"""`manage.py ceremony …`: root and targets, made and signed by people on machines without a network: deploy/keys.md.

It touches no database and reads no setting; the first argument of every step is the stick's folder.
"""

from argparse import ArgumentParser
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from securesystemslib.signer import CryptoSigner

from device_sdk import signing
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_name
from fleet.errors import FleetError, Invalid
from fleet.trust import ceremony, offline
from fleet.trust.offline import ROOT, TARGETS, Named
from fleet.trust.stick import Stick

PUB = "PUB"
A_KEY = "NAME of NAME.pub.json on the stick, or the path of such a file"


class Command(BaseCommand):
    help = "Make, change and sign root and targets offline, by plain TUF files in a folder (a stick)."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
        for add in (_add_making, _add_signing, _add_root_edits, _add_targets_edits):
            add(steps)

    def handle(self, **options: Any) -> None:
        step = getattr(self, options["step"].replace("-", "_"))
        try:
            step(**options)
        except (FleetError, ProtocolError) as error:
            raise CommandError(f"{error.message} [{error.code}]") from error
        except signing.SetupError as error:
            raise CommandError(str(error)) from None

    # --- keys ---

    def make_key(self, *, name: str, private: Path, stick: Path | None, no_passphrase: bool, **_: Any) -> None:
        """The private half stays in its holder's folder; the public half may travel."""
        check_name(name, "key name")
        signer = CryptoSigner.generate_ed25519()
        content = signer.private_bytes
        if not no_passphrase:
            content = signing.encrypted(signer, signing.new_passphrase(signing.asker()))
        path, public = private / f"{name}.pem", private / f"{name}.pub.json"
        named = Named(name, signer.public_key)
        try:
            private.mkdir(parents=True, exist_ok=True, mode=0o700)
            signing.write_private(path, content)
            public.write_text(signing.public_to_json(named.key))
        except OSError as error:
            raise Invalid("no_key_made", f"cannot make {path}: {error.strerror}") from error
        if stick is not None:
            Stick(stick).write_public(named)
        self.stdout.write(f"Key {offline.label(named.key.keyid, {named.key.keyid: name})}")
        self.stdout.write(f"  private half, {'NOT encrypted' if no_passphrase else 'encrypted'}: {path}")
        self.stdout.write(f"  public half: {public}{' and on the stick' if stick else ''}")

    # --- first version and signatures ---

    def init(self, **options: Any) -> None:
        stick = Stick(options["stick"])
        ceremony.init(
            stick,
            roots=[stick.public(who) for who in options["root"]],
            root_threshold=options["root_threshold"],
            targets=[stick.public(who) for who in options["targets"]],
            targets_threshold=options["targets_threshold"],
            online=stick.public(options["online"]),
            expires=_expiry(options),
        )
        self._tell(stick)

    def sign(self, **options: Any) -> None:
        stick = Stick(options["stick"])
        chain = ceremony.read(stick)
        _check_first(chain, options["first_root"])
        public = signing.read_public(options["public"]) if options["public"] else None
        signer = signing.load_signer(options["key"], public, ask=signing.asker())
        roles = [options["role"]] if options["role"] else [ROOT, TARGETS]
        for version in ceremony.to_sign(chain, signer.public_key, roles):
            self._describe(version)
            if not options["yes"] and not _agreed(f"Sign {version.title}? [y/N] "):
                raise Invalid("not_signed", f"{version.title} was not signed")
            standing = ceremony.add_signature(stick, version, signer)
            self.stdout.write(f"Signed {version.title}. {_outlook(standing)}")

    def show(self, **options: Any) -> None:
        stick = Stick(options["stick"])
        chain = ceremony.read(stick)
        _check_first(chain, options["first_root"])
        self.stdout.write(f"First root: {chain.first_mark}")
        now = datetime.now(UTC)
        for version in ceremony.newest(chain):
            self._describe(version)
            expired = " EXPIRED." if version.metadata.signed.is_expired(now) else ""
            self.stdout.write(f"  signed by: {', '.join(version.standing.signed) or 'nobody'}")
            self.stdout.write(f"  {_outlook(version.standing)}{expired}")
        for name in stick.foreign():
            self.stdout.write(f"Not ours, not read: {name!r}")
        self.stdout.write("Ready: trust_import takes it." if ceremony.is_settled(chain) else "Not ready yet.")

    # --- edits ---

    def rotate_root(self, **options: Any) -> None:
        self._edit_keys(ceremony.change_root, options)

    def set_targets(self, **options: Any) -> None:
        self._edit_keys(ceremony.change_targets, options)

    def set_online(self, **options: Any) -> None:
        stick = Stick(options["stick"])
        ceremony.set_online(stick, online=stick.public(options["public_key"]), expires=_expiry(options))
        self._tell(stick)

    def set_model(self, **options: Any) -> None:
        stick = Stick(options["stick"])
        keys = [stick.public(who) for who in options["key"]]
        name, threshold = options["model"], options["threshold"]
        ceremony.edit_targets(
            stick, lambda targets: offline.set_model(targets, name, keys, threshold), expires=_expiry(options)
        )
        self._tell(stick)

    def remove_model(self, **options: Any) -> None:
        stick = Stick(options["stick"])
        ceremony.edit_targets(
            stick, lambda targets: offline.remove_model(targets, options["model"]), expires=_expiry(options)
        )
        self._tell(stick)

    def renew(self, **options: Any) -> None:
        stick = Stick(options["stick"])
        ceremony.renew(stick, options["role"], expires=_expiry(options))
        self._tell(stick)

    # --- within ---

    def _edit_keys(self, edit: Any, options: dict[str, Any]) -> None:
        stick = Stick(options["stick"])
        edit(
            stick,
            remove=options["remove"],
            add=[stick.public(who) for who in options["add"]],
            threshold=options["threshold"],
            expires=_expiry(options),
        )
        self._tell(stick)

    def _tell(self, stick: Stick) -> None:
        for version in ceremony.newest(ceremony.read(stick)):
            if not version.standing.complete:
                self._describe(version)
                self.stdout.write(f"  {_outlook(version.standing)}")

    def _describe(self, version: ceremony.Version) -> None:
        first, *rest = version.lines
        self.stdout.write(f"{first}; mark {offline.mark(version.metadata)}")
        for line in rest:
            self.stdout.write(f"  {line}")


def _check_first(chain: ceremony.Chain, expected: str) -> None:
    """The stick came from elsewhere: a whole false chain is found out by the mark that was written on paper."""
    if expected and expected != chain.first_mark:
        raise Invalid("foreign_root", f"the first root: expected {expected}; this stick's is {chain.first_mark}")


def _outlook(standing: offline.Standing) -> str:
    return "Complete." if standing.complete else f"Still needs {'; and '.join(standing.needs)}."


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:
        return False


def _expiry(options: dict[str, Any]) -> datetime:
    return datetime.now(UTC) + timedelta(days=options["days"])


def _step(steps: Any, name: str, text: str) -> ArgumentParser:
    parser: ArgumentParser = steps.add_parser(name, help=text, description=text)
    parser.add_argument("stick", type=Path, metavar="STICK", help="the folder that travels")
    return parser


def _edit(steps: Any, name: str, text: str) -> ArgumentParser:
    parser = _step(steps, name, text)
    days = ceremony.LIFETIME.days
    parser.add_argument("--days", type=float, default=days, help=f"that it is good for (default: {days})")
    return parser


def _add_making(steps: Any) -> None:
    text = "Make a key pair: encrypted, with a passphrase that is asked for or in FLEET_KEY_PASSPHRASE."
    making = steps.add_parser("make-key", help=text, description=text)
    making.add_argument("name")
    making.add_argument("--private", type=Path, required=True, metavar="DIR", help="its holder's folder; no stick")
    making.add_argument("--stick", type=Path, metavar="STICK", help="put the public half there too")
    making.add_argument("--no-passphrase", action="store_true", help="leave the private half unencrypted")
    first = _edit(steps, "init", "Write root and targets version 1, unsigned.")
    first.add_argument("--root", action="append", required=True, metavar=PUB, help=f"{A_KEY}; repeat for each person")
    first.add_argument("--root-threshold", type=int, default=2, help="how many of them must sign (default: 2)")
    first.add_argument("--targets", action="append", required=True, metavar=PUB, help="likewise for targets")
    first.add_argument("--targets-threshold", type=int, default=1, help="(default: 1)")
    first.add_argument("--online", required=True, metavar=PUB, help="the server's key")


def _add_signing(steps: Any) -> None:
    signs = _step(steps, "sign", "Say what changes, ask, and add one signature to all that waits for this key.")
    signs.add_argument("--key", required=True, metavar="URI", help="private key: a file, env:NAME, a KMS or HSM URI")
    signs.add_argument("--public", type=Path, metavar="FILE", help="its public half; a KMS or HSM needs it")
    signs.add_argument("--role", choices=[ROOT, TARGETS], help="only this one")
    signs.add_argument("--yes", action="store_true", help="do not ask")
    shows = _step(steps, "show", "Check the whole chain, and say who has signed and who is missing.")
    for parser in (signs, shows):
        parser.add_argument("--first-root", default="", metavar="MARK", help="refuse a stick of another first root")


def _add_root_edits(steps: Any) -> None:
    for name, what in (("rotate-root", "root"), ("set-targets", "targets")):
        parser = _edit(steps, name, f"Change who signs {what}.")
        parser.add_argument("--remove", action="append", default=[], metavar="NAME", help="or the start of a key id")
        parser.add_argument("--add", action="append", default=[], metavar=PUB, help=A_KEY)
        parser.add_argument("--threshold", type=int, help="(default: as before)")
    online = _edit(steps, "set-online", "Give the server another key: changes root and targets.")
    online.add_argument("public_key", metavar=PUB, help=A_KEY)


def _add_targets_edits(steps: Any) -> None:
    model = _edit(steps, "set-model", "Say which CI keys sign a model's releases, and how many of them must.")
    model.add_argument("model", metavar="NAME")
    model.add_argument("--key", action="append", required=True, metavar=PUB, help=f"{A_KEY}; all of them")
    model.add_argument("--threshold", type=int, default=1, help="(default: 1)")
    gone = _edit(steps, "remove-model", "End a model's delegation: none of its releases may run any more.")
    gone.add_argument("model", metavar="NAME")
    again = _edit(steps, "renew", "Another year, nothing else changed.")
    again.add_argument("role", choices=[ROOT, TARGETS])
