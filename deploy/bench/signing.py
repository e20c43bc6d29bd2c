"""How fast views are signed: the bare building of one, and through the database when its inputs changed."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count, cycle
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.bench.measure import Row, Scale, Section, interleaved
from deploy.bench.server import Server, add_idle_fleet

BARE, POLLS = 1_500, 200  # a core-second


def measure(_folder: Path, scale: Scale, server: Server) -> Section:
    device = server.device("till-2")
    assignments = server.assignments(device)
    poller = Poller(server, scale.requests)
    actions = {
        "keys": _sign_thrice(),
        "bare": _bare(device, assignments),
        "stored": _stored(device, assignments),
        "poll": poller.poll,
    }
    spent = interleaved(actions, rounds=scale.rounds, calls=scale.requests, between=poller.void)
    keys, bare, stored, polls = (1e6 / spent[name] for name in ("keys", "bare", "stored", "poll"))
    return Section("Views signed in a core-second", [
        Row("bare: trust.repository.build_view", bare, "views", keys, "three Ed25519 signatures and nothing else",
            f">= {BARE:,}", bare >= BARE),
        Row("current_view of changed inputs, SQLite", stored, "views", bare, "bare"),
        Row("a poll that signs, SQLite", polls, "views", bare, "bare", f">= {POLLS}", polls >= POLLS),
    ], [
        "A view is three signed files. `current_view` also locks and writes.",
        "A poll that signs: from the WSGI request to the bundle, with all middleware, without HTTP.",
    ])  # fmt: skip


class Poller:
    """Polls of devices whose views have to be signed anew, by the server's whole WSGI application."""

    def __init__(self, world: Server, number: int) -> None:
        from django.test import RequestFactory

        from device_sdk.protocol import polls
        from device_sdk.protocol.polls import Tag
        from fleet.devices import credentials
        from fleet.devices.models import Device

        resting = add_idle_fleet(world)
        devices = [world.device(f"till-signed-{each}") for each in range(number)]
        Device.objects.update(runs=resting.runs)
        ask = RequestFactory(headers={"Host": "127.0.0.1", "If-None-Match": str(Tag(0, resting.runs.digest))}).get
        bearers = [f"Bearer {credentials.credential_for(device)}" for device in devices]
        asked = [ask(f"{polls.POLL}?root=1", headers={"Authorization": bearer}) for bearer in bearers]
        self._asked = cycle([dict(request.environ) for request in asked])

    def void(self) -> None:
        """As a change of the policy does: what every view was signed for is not what it should be."""
        from fleet.trust.models import DeviceView

        DeviceView.objects.update(inputs_digest="")

    def poll(self) -> None:
        from fleet.wsgi import application

        application.feed.ensure = lambda: None  # its thread's time is no poll's
        said: list[str] = []
        answer = application(dict(next(self._asked)), lambda status, *_: said.append(status))
        body = b"".join(answer)
        answer.close()
        if said != ["200 OK"] or b"director" not in body:
            raise RuntimeError(f"expected a bundle; got {said}: {body[:300]!r}")


def _sign_thrice() -> Any:
    key, message = Ed25519PrivateKey.generate(), b"x" * 800
    return lambda: [key.sign(message) for _ in range(3)]


def _bare(device: Any, assignments: Any) -> Any:
    from fleet.trust import keys, repository, selectors

    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    roles, signer, versions = selectors.snapshot_roles(), keys.online_signer(), count(1_800_000_000)
    return lambda: repository.build_view(
        device=device.name, assignments=assignments, roles=roles, signer=signer, version=next(versions), expires=expires
    )


def _stored(device: Any, assignments: Any) -> Any:
    from fleet.trust import services

    changes = count(1)
    return lambda: services.current_view(device, [replace(item, rollout=str(next(changes))) for item in assignments])
