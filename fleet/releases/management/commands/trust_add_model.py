"""`manage.py trust_add_model NAME`: delegate a model to CI's key, and make its row.

It lives in this room because trust knows nothing of releases.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from securesystemslib.signer import CryptoSigner, Key

from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_model
from fleet.errors import FleetError
from fleet.releases import services
from fleet.trust import keys, keystore


class Command(BaseCommand):
    help = "Let a CI key sign the releases of a model. Repeating it with the same key is harmless."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name")
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--ci-key-out", type=Path, metavar="FILE", help="make CI's private key here (0600)")
        group.add_argument(
            "--ci-public", type=Path, metavar="FILE", action="append", help="CI's public key as JSON; may be repeated"
        )
        parser.add_argument("--threshold", type=int, default=1, help="how many of the keys must sign (default: 1)")
        parser.add_argument("--description", default="")
        parser.add_argument("--keystore", type=Path, help="where the targets key is (default: FLEET_VAR/keystore)")

    def handle(self, **options: Any) -> None:
        name = options["name"]
        try:
            check_model(name)
            row = keystore.add_model(
                keystore.at(options["keystore"]),
                model=name,
                public_keys=self._keys(name, options),
                threshold=options["threshold"],
            )
            services.create_model(name=name, description=options["description"])
        except (FleetError, ProtocolError) as error:
            raise CommandError(error.message) from error
        except (OSError, ValueError) as error:
            raise CommandError(str(error)) from error
        done = f"delegated by targets version {row.version}" if row else "delegated to this key already"
        self.stdout.write(f"Model {name} is {done}.")

    def _keys(self, name: str, options: dict[str, Any]) -> list[Key]:
        """CI's public keys: those given, else of a key made now, else of the one that the file holds already."""
        if options["ci_public"]:
            return [keys.public_from_json(path.read_bytes()) for path in options["ci_public"]]
        path = options["ci_key_out"] or keystore.at(options["keystore"]).folder / "ci" / f"{name}.pem"
        if path.exists():
            return [keystore.signer_from_pem(path.read_bytes()).public_key]
        signer = CryptoSigner.generate_ed25519()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys.write_private(path, signer.private_bytes)
        self.stdout.write(
            f"CI's private key for {name}: {path}. Put it into CI's secrets; the server does not need it."
        )
        return [signer.public_key]
