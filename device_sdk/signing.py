"""Load whatever signs: a key file, an environment secret, a KMS, an HSM. Used by CI and by the server's online key.

| URI | is |
|---|---|
| a path, `file:/path` (also `file2:`) | PKCS#8 PEM; its passphrase is in `FLEET_KEY_PASSPHRASE` or asked for |
| `env:NAME` | the same PEM in an environment variable |
| anything else | what securesystemslib has registered (`SIGNER_FOR_URI_SCHEME`); needs the public half |

It refuses a private key that does not belong to the public half given with it. Errors name the file or the scheme and
nothing else: a URI may hold a PIN or a token, and so may what a KMS library says when it fails.
"""

import getpass
import json
import os
import stat
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.hazmat.primitives.serialization import PublicFormat as Public
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from device_sdk.errors import SetupError as SetupError  # noqa: PLC0414  # the server knows no other module of ours

PASSPHRASE = "FLEET_KEY_PASSPHRASE"  # noqa: S105  # the variable's name
MIN_PASSPHRASE = 12  # characters: PKCS#8 as cryptography writes it is quick to try passphrases on
MAX_KEY_FILE = 64 * 1024  # bytes
_FILES = ("file", "file2")
Ask = Callable[[str], str]


def load_signer(uri: str, public: Key | None = None, *, ask: Ask | None = None) -> Signer:
    """The signer that `uri` names. `ask` gets a prompt and returns a passphrase; None: never ask.

    Raises SetupError, whose text and context hold neither the URI nor a passphrase.
    """
    scheme, rest = split(uri)
    if scheme == "file2" and public is None:  # as securesystemslib has it
        raise SetupError("a file2: key needs its public half as JSON")
    if scheme in _FILES:
        return _from_pem(_read_file(_path(scheme, rest), "private key"), rest, public, ask)
    if scheme == "env":
        return _from_pem(_from_environment(rest), f"environment variable {rest}", public, ask)
    if public is None:
        raise SetupError(f"a {scheme}: key needs its public half as JSON")
    return _from_library(uri, scheme, public)


def split(uri: str) -> tuple[str, str]:
    """Scheme and rest. What has no scheme, or exists as a file, is a path."""
    scheme, colon, rest = uri.partition(":")
    if not colon or not scheme.isalnum() or Path(uri).exists():
        return "file", uri
    return scheme, rest


def shown(uri: str) -> str:
    """What may be said of a key's URI: the file or variable that it names, else the scheme alone."""
    scheme, rest = split(uri)
    return rest if scheme in _FILES else f"env:{rest}" if scheme == "env" else f"{scheme}:…"


def fingerprint(uri: str) -> str:
    """Changes when a local key is replaced under the same URI; constant for what lies elsewhere."""
    scheme, rest = split(uri)
    if scheme == "env":
        return sha256(os.environ.get(rest, "").encode()).hexdigest()
    if scheme not in _FILES:
        return ""
    try:
        found = _path(scheme, rest).stat()
    except OSError:
        return "missing"
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


def read_public(path: Path) -> Key:
    """A public key as `public_to_json` writes it. Raises SetupError."""
    try:
        return public_from_json(_read_file(path, "public key"))
    except ValueError as error:
        raise SetupError(f"{path}: {error}") from error


def public_to_json(key: Key) -> str:
    return json.dumps({"keyid": key.keyid, **key.to_dict()}, indent=1) + "\n"


def public_from_json(text: str | bytes) -> Key:
    """Any key type that securesystemslib knows. Raises ValueError when it is not one as `public_to_json` writes it."""
    try:
        fields: dict[str, Any] = json.loads(text)
        return Key.from_dict(fields.pop("keyid"), fields)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected a public key as JSON; {error!r:.200}") from error


def essence(key: Key) -> bytes:
    """Names the key itself: the same for one key under two ids, or written in two ways. Raises ValueError."""
    if not isinstance(key, SSlibKey):
        return repr(sorted(key.to_dict().items())).encode()
    text = key.keyval.get("public")
    if not isinstance(text, str):
        raise ValueError("expected a public key's value as text")  # noqa: TRY004  # as all else that is malformed
    if "-----BEGIN" not in text:
        return bytes.fromhex(text)
    return load_pem_public_key(text.encode()).public_bytes(Encoding.DER, Public.SubjectPublicKeyInfo)


def encrypted(signer: CryptoSigner, passphrase: str) -> bytes:
    """The private key as encrypted PKCS#8 PEM."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise SetupError(f"the passphrase: expected at least {MIN_PASSPHRASE} characters; got {len(passphrase)}")
    private = load_pem_private_key(signer.private_bytes, None)
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase.encode()))


def write_private(path: Path, content: bytes) -> None:
    """Only ever a new file, readable by its owner alone from the first byte on. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def asker() -> Ask | None:
    """Ask a person where there is one."""
    return getpass.getpass if sys.stdin is not None and sys.stdin.isatty() else None


def new_passphrase(ask: Ask | None) -> str:
    """From the environment, else asked for twice. Raises SetupError."""
    given = os.environ.get(PASSPHRASE, "")
    if given:
        return given
    if ask is None:
        raise SetupError(f"no passphrase: set {PASSPHRASE}, or run this on a terminal")
    first = ask("Passphrase for the new key: ")
    if first != ask("The same again: "):
        raise SetupError("the two passphrases differ")
    return first


def _from_pem(content: bytes, what: str, public: Key | None, ask: Ask | None) -> Signer:
    private = _decrypted(content, what, ask)
    problem = ""
    try:
        derived = CryptoSigner(private)
        if public is None:
            return derived
        if not isinstance(public, SSlibKey) or essence(public) != essence(derived.public_key):
            problem = "is not the private half of the public key given with it"
        else:
            return CryptoSigner(private, public)
    except Exception as error:  # noqa: BLE001  # a key of a kind that nothing here signs with
        problem = f"cannot be used: {type(error).__name__}"
    raise SetupError(f"the key {what} {problem}")


def _decrypted(content: bytes, what: str, ask: Ask | None) -> PrivateKeyTypes:
    """Raised outside of the handlers, so that no context carries what was tried."""
    locked = False
    try:
        return load_pem_private_key(content, None)
    except TypeError:
        locked = True
    except Exception:  # noqa: BLE001, S110  # said below, without what the library quotes
        pass
    if not locked:
        raise SetupError(f"the key {what}: expected a private key in PEM (PKCS#8)")
    passphrase = os.environ.get(PASSPHRASE, "") or (ask(f"Passphrase of {what}: ") if ask else "")
    if not passphrase:
        raise SetupError(f"the key {what} is encrypted: set {PASSPHRASE}")
    try:
        return load_pem_private_key(content, passphrase.encode())
    except Exception:  # noqa: BLE001, S110
        pass
    raise SetupError(f"the key {what}: the passphrase is wrong")


def _from_library(uri: str, scheme: str, public: Key) -> Signer:
    problem = ""
    try:
        return Signer.from_priv_key_uri(uri, public)
    except Exception as error:  # noqa: BLE001  # each KMS and HSM library has its own family, and quotes the URI
        problem = type(error).__name__
    raise SetupError(f"cannot use the {scheme}: key {public.keyid[:12]} ({problem}); is its library installed?")


def _from_environment(name: str) -> bytes:
    content = os.environ.get(name, "")
    if not content:
        raise SetupError(f"the environment variable {name} holds no key")
    return content.encode()


def _path(scheme: str, rest: str) -> Path:
    if scheme == "file2":  # as securesystemslib reads it
        return Path(os.environ.get(CryptoSigner.PREFIX_ENV_VAR, "")) / rest
    return Path(rest.removeprefix("//")) if rest.startswith("///") else Path(rest)


def _read_file(path: Path, what: str) -> bytes:
    """A regular file of a key's size; a key may well lie behind a symlink, as secret stores mount them."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SetupError(f"cannot read the {what} {path}: expected a file")
            content = file.read(MAX_KEY_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise SetupError(f"cannot read the {what} {path}: {reason}") from None
    if len(content) > MAX_KEY_FILE:
        raise SetupError(f"cannot read the {what} {path}: expected at most {MAX_KEY_FILE} bytes")
    return content
