"""The embedded keystore: every private key in one folder of the server. For demonstrations and for a first look.

In production the root and targets keys are made and kept offline; only the online key is reachable by the server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from django.conf import settings
from django.db import transaction
from django.utils import timezone
from securesystemslib.signer import CryptoSigner, Key, Signer
from tuf.api.metadata import Metadata, Targets

from device_sdk import signing
from device_sdk.protocol.names import check_model
from fleet.errors import Conflict, Unavailable
from fleet.trust import offline, selectors, transfer
from fleet.trust.ceremony import LIFETIME
from fleet.trust.models import RoleMetadata
from fleet.trust.offline import Named

ROOT_KEYS = ("root-1", "root-2", "root-3")
ROOT_THRESHOLD = 2
TARGETS_KEYS = ("targets-1", "targets-2")
ONLINE_KEY = "online"
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
        self.public(name).write_text(signing.public_to_json(signer.public_key))
        signing.write_private(self.private(name), signer.private_bytes)
        return signer

    def load(self, name: str) -> CryptoSigner:
        try:
            signer = signing.load_signer(str(self.private(name)), signing.read_public(self.public(name)))
        except signing.SetupError as error:
            raise Unavailable("no_offline_key", f"the key {name!r} is not in {self.folder}: {error}") from error
        if not isinstance(signer, CryptoSigner):  # a file is nothing else
            raise Unavailable("no_offline_key", f"the key {name!r} in {self.folder} is no file")
        return signer


def at(folder: Path | None) -> Keystore:
    """The keystore in `folder`; None: the embedded one."""
    return Keystore(folder or settings.VAR / "keystore")


def signer_from_pem(content: bytes) -> CryptoSigner:
    """Raises ValueError for anything but an unencrypted private key that securesystemslib knows."""
    return CryptoSigner(load_pem_private_key(content, None))


@transaction.atomic
def initialise(store: Keystore) -> bool:
    """Make the keys, root and targets version 1. False: there is a root already, and nothing was touched."""
    if selectors.newest(ROOT) is not None:
        return False
    roots, targets = [_named(store, name) for name in ROOT_KEYS], [_named(store, name) for name in TARGETS_KEYS]
    online = _named(store, ONLINE_KEY)
    root = offline.first_root(
        roots, targets, online, root_threshold=ROOT_THRESHOLD, targets_threshold=1, expires=_expiry()
    )
    first = offline.first_targets(online, expires=_expiry())
    transfer.accept([_signed(root, store, ROOT_KEYS)], _signed(first, store, TARGETS_KEYS))
    return True


def add_model(store: Keystore, *, model: str, public_keys: Sequence[Key], threshold: int = 1) -> RoleMetadata | None:
    """Delegate `<model>/*/*` to the keys, by a new targets version. None: it is so already."""
    check_model(model)
    held = selectors.delegated_keys(_targets().signed, model)
    if held == (threshold, {key.keyid for key in public_keys}):
        return None
    keys = [Named("", key) for key in public_keys]
    return _edit_targets(store, lambda targets: offline.set_model(targets, model, keys, threshold))


@transaction.atomic
def renew(store: Keystore, role: str) -> RoleMetadata:
    """Sign root or targets anew for another year, with nothing else changed."""
    if role == TARGETS:
        return _edit_targets(store, lambda _: None)
    targets = _targets()
    root = offline.next_version(offline.read_root(_newest(ROOT).content.encode()).signed, _expiry())
    transfer.accept([_signed(root, store, ROOT_KEYS)], targets)
    return _newest(ROOT)


@transaction.atomic
def _edit_targets(store: Keystore, edit: Callable[[Targets], None]) -> RoleMetadata:
    targets = offline.next_version(_targets().signed, _expiry())
    edit(targets)
    root = offline.read_root(_newest(ROOT).content.encode())
    transfer.accept([root], _signed(targets, store, TARGETS_KEYS[:1]))
    return _newest(TARGETS)


def _targets() -> Metadata[Targets]:
    return offline.read_targets(_newest(TARGETS).content.encode())


def _signed(signed: offline.Signed, store: Keystore, names: Sequence[str]) -> "Metadata[offline.Signed]":
    metadata = Metadata(signed)
    for name in names:
        signer: Signer = store.load(name)
        metadata.sign(signer, append=True)
    return metadata


def _named(store: Keystore, name: str) -> Named:
    return Named(name, store.make(name).public_key)


def _newest(role: str) -> RoleMetadata:
    newest = selectors.newest(role)
    if newest is None:
        raise Conflict("no_trust_root", "there is no trust root yet; run trust_init first")
    return newest


def _expiry() -> datetime:
    return timezone.now() + LIFETIME
