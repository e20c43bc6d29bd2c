"""How fast views are signed: the bare building of one, and through the database when its inputs changed."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.bench.measure import Row, Scale, Section, interleaved
from deploy.bench.server import Server

BARE = 3_400  # a core-second, of the prototype


def measure(_folder: Path, scale: Scale, server: Server) -> Section:
    device = server.device("till-2")
    assignments = server.assignments(device)
    actions = {"keys": _sign_thrice(), "bare": _bare(device, assignments), "stored": _stored(device, assignments)}
    spent = interleaved(actions, rounds=scale.rounds, calls=scale.requests)
    keys, bare, stored = (1e6 / spent[name] for name in ("keys", "bare", "stored"))
    return Section("Views signed in a core-second", [
        Row("bare: trust.repository.build_view", bare, "views", keys, "three Ed25519 signatures and nothing else",
            f">= {BARE} (prototype)", bare >= BARE),
        Row("current_view of changed inputs, SQLite", stored, "views", bare, "bare"),
    ], ["A view is three signed files. `current_view` also locks and writes."])  # fmt: skip


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
