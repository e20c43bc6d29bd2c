"""A real server in this process, on an SQLite file: trust, CI's releases, rollouts, devices. `set_up` comes first."""

import io
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import django
from django.core.management import call_command
from securesystemslib.signer import CryptoSigner

from deploy.bench import models
from device_sdk.protocol.assignment import Assignment
from device_sdk.protocol.manifest import digest
from device_sdk.publishing.roles import add_targets, next_role
from device_sdk.publishing.variants import Variant


def set_up(folder: Path) -> None:
    """Settings read the environment once, so that a process measures in one folder."""
    os.environ["FLEET_VAR"] = str(folder)
    os.environ["FLEET_DATABASE_URL"] = f"sqlite:///{folder / 'fleet.sqlite3'}"
    os.environ["FLEET_REDIS_URL"] = os.environ["FLEET_S3_BUCKET"] = ""
    os.environ["FLEET_PRODUCTION"] = "0"
    os.environ["FLEET_LOG_LEVEL"] = "ERROR"  # the table is what is read
    os.environ["DJANGO_SETTINGS_MODULE"] = "deploy.bench.settings"
    django.setup()
    call_command("migrate", verbosity=0, interactive=False)


class Server:
    """Plays CI and the operator, by the services that HTTP calls."""

    def __init__(self) -> None:
        from fleet.releases import services
        from fleet.trust import keystore

        self._ci = CryptoSigner.generate_ed25519()
        store = keystore.at(None)
        keystore.initialise(store)
        keystore.add_model(store, model=models.MODEL, public_keys=[self._ci.public_key])
        services.create_model(name=models.MODEL)

    def publish(self, version: str, files: Mapping[str, bytes]) -> Any:
        """Push, sign and validate a release, as `fleet-publish` does."""
        from fleet.releases import services, uploads

        for data in files.values():
            uploads.receive(sha256=digest(data), length=len(data), offset=0, source=io.BytesIO(data))
        signed = models.manifest(version, files)
        variant = Variant(signed, ())
        role = next_role(self._role(), signer=self._ci, known=(), edit=add_targets([variant]))
        texts = {signed.path.variant: signed.to_bytes().decode()}
        published = services.publish_release(model=models.MODEL, version=version, manifests=texts, role=role)
        published.release.refresh_from_db()
        return published.release

    def roll_out(self, release: Any) -> None:
        from fleet.rollouts import services

        stages = [services.StagePlan(percent=100)]
        made = services.create(
            release=release, group=None, stages=stages, actor="bench", probation={"calls": 1, "seconds": 0}
        )
        services.start(rollout=made, actor="bench")

    def token(self) -> str:
        from fleet.devices import services

        day = timedelta(days=1)
        return services.create_token(name="bench", model_names=[models.MODEL], max_uses=1_000, lifetime=day)[1]

    def device(self, name: str) -> Any:
        from device_sdk.protocol.polls import EnrolRequest
        from fleet.devices import services

        return services.enrol(token=self.token(), request=EnrolRequest(name, digest(name.encode()), {}, "0.1.0")).device

    def assignments(self, device: Any) -> list[Assignment]:
        from fleet.api import composition

        return composition.assignments(device)

    def _role(self) -> bytes | None:
        from fleet.trust import selectors

        newest = selectors.newest(models.MODEL)
        return newest.content.encode() if newest else None


def add_idle_fleet(server: Server) -> Any:
    """A release that is rolled out, and a device that runs it."""
    from device_sdk.protocol.polls import running_digest
    from fleet.devices.models import RunningSet

    release = server.publish("1.0.0", {"model.onnx": models.small()})
    server.roll_out(release)
    device = server.device("till-1")
    runs = {models.MODEL: "1.0.0/default"}
    device.runs, _ = RunningSet.objects.get_or_create(digest=running_digest(runs), defaults={"runs": runs})
    device.save()
    return device
