"""The embedded keystore: every private key in one folder of the server. For demonstrations and for a first look.

In production the root and targets keys are made and kept offline; only the online key is reachable by the server.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from django.conf import settings
from django.db import transaction
from django.utils import timezone
from securesystemslib.signer import CryptoSigner, Key, Signer
from tuf.api.metadata import Targets

from device_sdk.protocol.names import check_model
from fleet.errors import Conflict, Unavailable
from fleet.trust import keys, repository, selectors, services
from fleet.trust.models import RoleMetadata

ROOT_KEYS = ("root-1", "root-2", "root-3")
ROOT_THRESHOLD = 2
TARGETS_KEYS = ("targets-1", "targets-2")
ONLINE_KEY = "online"
OFFLINE_LIFETIME = timedelta(days=365)
ROOT, TARGETS = "root", "targets"

WARNING = """\
************************************************************************************
*  WARNING: this is the EMBEDDED KEYSTORE. All private keys, the root's included,  *
*  lie unencrypted in one folder of this machine. Whoever reads it owns the fleet. *
*  Good for a demonstration. For production keep root-*.pem and targets-*.pem on   *
*  offline media, and give the server nothing but the online key.                  *
************************************************************************************"""


@dataclass(frozen=True, slots=True)
class Keystore:
    """A folder of PKCS#8 PEM files, 0600, each with its public half as JSON beside it."""

    folder: Path

    def private(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def public(self, name: str) -> Path:
        return self.folder / f"{name}.pub.json"

    def make(self, name: str) -> CryptoSigner:
        """Make a key, or load the one that an interrupted run has made: a key is never overwritten."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.private(name).exists():
            return self.load(name)
        signer = CryptoSigner.generate_ed25519()
        self.public(name).write_text(keys.public_to_json(signer.public_key))
        write_private(self.private(name), signer.private_bytes)
        return signer

    def load(self, name: str) -> CryptoSigner:
        try:
            public = keys.public_from_json(self.public(name).read_bytes())
            return CryptoSigner.from_priv_key_uri(f"file2:{self.private(name)}", public)
        except (OSError, ValueError) as error:
            raise Unavailable("no_offline_key", f"the key {name!r} is not in {self.folder}: {error}") from error


def at(folder: Path | None) -> Keystore:
    """The keystore in `folder`; None: the embedded one."""
    return Keystore(folder or settings.VAR / "keystore")


def signer_from_pem(content: bytes) -> CryptoSigner:
    """Raises ValueError for anything but an unencrypted private key that securesystemslib knows."""
    return CryptoSigner(load_pem_private_key(content, None))


def write_private(path: Path, content: bytes) -> None:
    """Only ever a new file, readable by its owner alone from the first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@transaction.atomic
def initialise(store: Keystore) -> bool:
    """Make the keys, root and targets version 1. False: there is a root already, and nothing was touched."""
    if selectors.newest(ROOT) is not None:
        return False
    roots = [store.make(name) for name in ROOT_KEYS]
    targets = [store.make(name) for name in TARGETS_KEYS]
    online = store.make(ONLINE_KEY).public_key
    expires = _expiry()
    root = repository.build_root(
        version=1,
        roots=[signer.public_key for signer in roots],
        threshold=ROOT_THRESHOLD,
        targets=[signer.public_key for signer in targets],
        online=online,
        expires=expires,
    )
    services.store_role(ROOT, 1, repository.sign(root, roots), expires)
    first = repository.build_targets(director=online, expires=expires)
    services.store_role(TARGETS, 1, repository.sign(first, targets), expires)
    return True


@transaction.atomic
def add_model(store: Keystore, *, model: str, public_keys: Sequence[Key], threshold: int = 1) -> RoleMetadata | None:
    """Delegate `<model>/*/*` to the keys, by a new targets version. None: it is so already."""
    check_model(model)
    newest = _newest(TARGETS)
    targets = repository.read_targets(newest.content.encode())
    if selectors.delegated_keys(targets, model) == (threshold, {key.keyid for key in public_keys}):
        return None
    repository.delegate(targets, model=model, keys=public_keys, threshold=threshold)
    return _resign_targets(store, targets, newest)


@transaction.atomic
def renew(store: Keystore, role: str) -> RoleMetadata:
    """Sign root or targets anew for another year, with nothing else changed."""
    newest = _newest(role)
    if role == TARGETS:
        return _resign_targets(store, repository.read_targets(newest.content.encode()), newest)
    root = repository.read_root(newest.content.encode())
    root.version, root.expires = newest.version + 1, _expiry()
    content = repository.sign(root, [store.load(name) for name in ROOT_KEYS])
    return services.store_role(ROOT, root.version, content, root.expires)


def _resign_targets(store: Keystore, targets: Targets, newest: RoleMetadata) -> RoleMetadata:
    targets.version, targets.expires = newest.version + 1, _expiry()
    signers: list[Signer] = [store.load(TARGETS_KEYS[0])]
    return services.store_role(TARGETS, targets.version, repository.sign(targets, signers), targets.expires)


def _newest(role: str) -> RoleMetadata:
    newest = selectors.newest(role)
    if newest is None:
        raise Conflict("no_trust_root", "there is no trust root yet; run trust_init first")
    return newest


def _expiry() -> datetime:
    return (timezone.now() + OFFLINE_LIFETIME).replace(microsecond=0)
