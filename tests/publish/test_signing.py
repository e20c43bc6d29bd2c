"""Signers by URI: files, environment secrets, and whatever securesystemslib is extended by. And what is never said."""

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import KEY_FOR_TYPE_AND_SCHEME, SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signature, Signer
from tuf.api.metadata import Metadata, Targets

from device_sdk import publish, signing
from device_sdk.errors import SetupError
from fleet.trust import keys, keystore, services
from tests.registry import Registry

SECRET = "correct-horse-battery"
PIN = "pin-4711-do-not-print"


@pytest.fixture
def signer() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


@pytest.fixture
def locked(signer: CryptoSigner, tmp_path: Path) -> Path:
    path = tmp_path / "locked.pem"
    path.write_bytes(signing.encrypted(signer, SECRET))
    return path


def works(loaded: Signer, public: Key) -> None:
    public.verify_signature(loaded.sign(b"text"), b"text")
    with pytest.raises(UnverifiedSignatureError):
        public.verify_signature(loaded.sign(b"text"), b"other")


@pytest.mark.parametrize("form", ["{}", "file:{}", "file://{}", "file2:{}"])
def test_a_key_file_is_loaded_by_path_or_uri(signer: CryptoSigner, tmp_path: Path, form: str) -> None:
    path = tmp_path / "ci.pem"
    signing.write_private(path, signer.private_bytes)
    works(signing.load_signer(form.format(path), signer.public_key), signer.public_key)


def test_a_key_comes_from_the_environment(signer: CryptoSigner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_KEY", signer.private_bytes.decode())
    works(signing.load_signer("env:CI_KEY"), signer.public_key)
    with pytest.raises(SetupError, match="OTHER holds no key"):
        signing.load_signer("env:OTHER")


def test_an_encrypted_key_opens_by_the_environment_or_by_asking(
    signer: CryptoSigner, locked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(signing.PASSPHRASE, raising=False)
    works(signing.load_signer(str(locked), ask=lambda _: SECRET), signer.public_key)
    with pytest.raises(SetupError, match=f"is encrypted: set {signing.PASSPHRASE}"):
        signing.load_signer(str(locked))
    monkeypatch.setenv(signing.PASSPHRASE, SECRET)
    works(signing.load_signer(str(locked)), signer.public_key)
    monkeypatch.setenv("CI_KEY", locked.read_text())
    works(signing.load_signer("env:CI_KEY"), signer.public_key)


def test_a_plain_key_does_not_mind_a_passphrase(
    signer: CryptoSigner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signing.PASSPHRASE, SECRET)
    signing.write_private(tmp_path / "ci.pem", signer.private_bytes)
    works(signing.load_signer(str(tmp_path / "ci.pem")), signer.public_key)


def test_a_private_key_of_another_public_half_is_refused(signer: CryptoSigner, tmp_path: Path) -> None:
    signing.write_private(tmp_path / "ci.pem", signer.private_bytes)
    with pytest.raises(SetupError, match="is not the private half"):
        signing.load_signer(str(tmp_path / "ci.pem"), CryptoSigner.generate_ed25519().public_key)


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_named_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ci.pem").write_bytes(content)
    with pytest.raises(SetupError, match=r"ci\.pem: expected a private key in PEM") as caught:
        signing.load_signer(str(tmp_path / "ci.pem"))
    assert "AAAA" not in str(caught.value)


def test_a_key_file_is_a_file_of_a_keys_size(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="Is a directory"):
        signing.load_signer(str(tmp_path))
    (tmp_path / "large").write_bytes(b"x" * (signing.MAX_KEY_FILE + 1))
    with pytest.raises(SetupError, match="at most"):
        signing.load_signer(str(tmp_path / "large"))


def test_nothing_secret_is_in_an_error_a_traceback_or_the_log(
    locked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fake_kms: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(signing.PASSPHRASE, "wrong-" + PIN)
    public = FakeKey.of(fake_kms)
    for uri, key in [(str(locked), None), (f"fakekms://x?pin={PIN}", public), (f"nokms://x?pin={PIN}", public)]:
        with pytest.raises(SetupError) as caught:
            signing.load_signer(uri, key)
        shown = "".join(traceback.format_exception(caught.value))
        assert caught.value.__context__ is None
        assert PIN not in shown
        assert PIN not in signing.shown(uri)
    with pytest.raises(SetupError) as caught:
        signing.load_signer(f"fakekms:{PIN}")
    assert PIN not in str(caught.value)
    assert PIN not in caplog.text


# --- securesystemslib's own extension point ---


class FakeKey(Key):
    """A key type that neither TUF nor we know."""

    @classmethod
    def of(cls, kms: dict[str, ec.EllipticCurvePrivateKey]) -> "FakeKey":
        point = kms["models"].public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint).hex()
        return cls("f" * 64, "fake", "fake-sha256", {"public": point})

    @classmethod
    def from_dict(cls, keyid: str, key_dict: dict[str, Any]) -> "FakeKey":
        keytype, scheme, keyval = cls._from_dict(key_dict)
        return cls(keyid, keytype, scheme, keyval, key_dict)

    def to_dict(self) -> dict[str, Any]:
        return self._to_dict()

    def verify_signature(self, signature: Signature, data: bytes) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.hashes import SHA256

        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(self.keyval["public"]))
        try:
            public.verify(bytes.fromhex(signature.signature), data, ec.ECDSA(SHA256()))
        except InvalidSignature as error:
            raise UnverifiedSignatureError from error


@pytest.fixture
def fake_kms(monkeypatch: pytest.MonkeyPatch) -> dict[str, ec.EllipticCurvePrivateKey]:
    """A service that signs by a key's name and gives no key out; its errors quote the whole address."""
    held = {"models": ec.generate_private_key(ec.SECP256R1())}

    class FakeSigner(Signer):
        def __init__(self, name: str, public: Key) -> None:
            self._name, self._public = name, public

        @property
        def public_key(self) -> Key:
            return self._public

        @classmethod
        def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Any = None) -> Signer:
            name = priv_key_uri.removeprefix("fakekms://").partition("?")[0]
            if name not in held:
                raise RuntimeError(f"no such key: {priv_key_uri}")
            return cls(name, public_key)

        def sign(self, payload: bytes) -> Signature:
            from cryptography.hazmat.primitives.hashes import SHA256

            return Signature(self._public.keyid, held[self._name].sign(payload, ec.ECDSA(SHA256())).hex())

    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "fakekms", FakeSigner)
    monkeypatch.setitem(KEY_FOR_TYPE_AND_SCHEME, ("fake", "fake-sha256"), FakeKey)
    return held


def test_whatever_is_registered_with_securesystemslib_signs(fake_kms: Any, tmp_path: Path) -> None:
    (tmp_path / "kms.pub.json").write_text(signing.public_to_json(FakeKey.of(fake_kms)))
    public = signing.read_public(tmp_path / "kms.pub.json")
    assert isinstance(public, FakeKey)
    works(signing.load_signer("fakekms://models?pin=1", public), public)
    with pytest.raises(SetupError, match="a fakekms: key needs its public half"):
        signing.load_signer("fakekms://models")


def test_ci_publishes_with_a_kms_key_by_the_one_option(fake_kms: Any, registry: Registry, tmp_path: Path) -> None:
    """`--key` and `--public` name a KMS; the role it signs is accepted by the server's own check."""
    public = FakeKey.of(fake_kms)
    (tmp_path / "kms.pub.json").write_text(signing.public_to_json(public))
    keystore.add_model(keystore.at(None), model="vision", public_keys=[public])
    options = publish._parser().parse_args(
        ["renew", "--model", "vision", "--server", "http://x", "--key", "fakekms://models",
         "--public", str(tmp_path / "kms.pub.json")]
    )  # fmt: skip
    role = publish.next_role(None, signer=publish._signer(options), known=[], edit=lambda _: None)
    assert services.accept_role("vision", role.encode()).version == 1
    assert set(Metadata[Targets].from_bytes(role.encode()).signatures) == {public.keyid}


def test_the_server_signs_views_with_a_kms_key_by_the_one_setting(fake_kms: Any, settings: Any, tmp_path: Path) -> None:
    public = FakeKey.of(fake_kms)
    settings.ONLINE_KEY_URI, settings.ONLINE_KEY_PUBLIC = f"fakekms://models?pin={PIN}", tmp_path / "kms.pub.json"
    settings.ONLINE_KEY_PUBLIC.write_text(signing.public_to_json(public))
    works(keys.online_signer(), public)
    fake_kms["models"] = ec.generate_private_key(ec.SECP256R1())  # the KMS was pointed at another key
    keys._signer.cache_clear()
    with pytest.raises(keys.Unavailable, match="fakekms:… is not that of its public half"):
        keys.online_signer()


# --- keygen ---


def test_keygen_makes_an_encrypted_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(signing.PASSPHRASE, SECRET)
    assert publish.main(["keygen", str(tmp_path / "ci.pem"), "--encrypt"]) == publish.OK
    out, err = capsys.readouterr()
    public = signing.public_from_json(out)
    assert b"ENCRYPTED" in (tmp_path / "ci.pem").read_bytes()
    works(signing.load_signer(str(tmp_path / "ci.pem"), public), public)
    assert SECRET not in out + err
    assert json.loads(out)["keytype"] == "ed25519"


def test_a_new_passphrase_is_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signing.PASSPHRASE, raising=False)
    answers = iter([SECRET, SECRET, SECRET, "another-thing"])
    assert signing.new_passphrase(lambda _: next(answers)) == SECRET
    with pytest.raises(SetupError, match="differ"):
        signing.new_passphrase(lambda _: next(answers))
    with pytest.raises(SetupError, match="no passphrase"):
        signing.new_passphrase(None)


@pytest.mark.parametrize("passphrase", ["", "x" * (signing.MIN_PASSPHRASE - 1)])
def test_a_short_passphrase_is_refused(signer: CryptoSigner, passphrase: str) -> None:
    with pytest.raises(SetupError, match=f"at least {signing.MIN_PASSPHRASE} characters") as caught:
        signing.encrypted(signer, passphrase)
    assert "xxx" not in str(caught.value)
