"""`manage.py provenance_key add | list | remove`: whose model signatures are shown as verified."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.errors import FleetError
from fleet.releases import provenance
from fleet.releases.models import Model, ProvenanceKey


class Command(BaseCommand):
    help = "Say whose OpenSSF model signatures are believed, for each model. No such key lets a release be installed."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("list")
        add = commands.add_parser("add")
        add.add_argument("model")
        add.add_argument("name", help="whose key it is")
        add.add_argument("file", type=Path, help="the public key, PEM")
        remove = commands.add_parser("remove")
        remove.add_argument("model")
        remove.add_argument("fingerprint", help="as `list` shows it, or its beginning")

    def handle(self, *_: Any, command: str, **options: Any) -> None:
        try:
            getattr(self, f"_{command}")(**options)
        except FleetError as error:
            raise CommandError(error.message) from error
        except OSError as error:
            raise CommandError(f"cannot read {options['file']}: {error.strerror}") from error
        except Model.DoesNotExist as error:
            raise CommandError(f"there is no model {options['model']!r}") from error
        except (ProvenanceKey.DoesNotExist, ProvenanceKey.MultipleObjectsReturned) as error:
            raise CommandError(f"expected one key of {options['model']} with this fingerprint; see `list`") from error

    def _list(self, **_: Any) -> None:
        for key in ProvenanceKey.objects.select_related("model"):
            self.stdout.write(f"{key.model.name}  {key.fingerprint}  {key.name}")

    def _add(self, *, model: str, name: str, file: Path, **_: Any) -> None:
        pem = file.read_text(errors="replace")
        key = provenance.add_key(model=Model.objects.get(name=model), name=name, pem=pem, actor="manage.py")
        self.stdout.write(f"{model}: model signatures of {key.name} are believed ({key.fingerprint})")

    def _remove(self, *, model: str, fingerprint: str, **_: Any) -> None:
        key = ProvenanceKey.objects.select_related("model").get(model__name=model, fingerprint__startswith=fingerprint)
        provenance.remove_key(key=key)
        self.stdout.write(f"{model}: model signatures of {key.name} are believed no more")
