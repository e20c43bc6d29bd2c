"""Read an OpenSSF Model Signing signature (`model.sig`) and hold it to a variant's files. Pure: bytes and keys in.

The format, as `model_signing sign key` writes it: a Sigstore bundle with a DSSE envelope, over an in-toto statement of
predicate `https://model_signing/signature/v1.0`, that lists a digest for each file and, as its subject, one over all of
these. Signed by ECDSA on P-256, P-384 or P-521 with SHA-256, -384 or -512.

It says where a release comes from. It never lets one be installed: it has no version, expiry or revocation. Signing by
certificate or by Sigstore's own service is read and shown, and not verified here.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from fleet.errors import Invalid

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
RESOURCES = 10_000
_HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512,
}  # fmt: skip


class State(StrEnum):
    VERIFIED = "verified"
    UNVERIFIED = "unverified"  # by a key that nobody here trusts, or by other means than a key
    FORGED = "forged"  # names a trusted key that has not signed it
    MISMATCH = "mismatch"  # signs other files than the variant's


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that somebody trusts for provenance. `fingerprint`: as signatures name it."""

    name: str
    pem: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a signature says of a variant. `key`: the trusted key that verified it, or what it names instead."""

    state: State
    key: str
    detail: str = ""

    def __str__(self) -> str:
        if self.state is State.VERIFIED:
            return f"verified by key {self.key}{self.detail}"
        if self.state is State.UNVERIFIED:
            return f"not verified: signed by {self.key}{self.detail}"
        return f"refused: {self.detail}"


@dataclass(frozen=True, slots=True)
class Signature:
    """A bundle, parsed, not yet verified. `digests`: sha256 by file name. `hint`: the key's fingerprint, or empty."""

    payload: bytes
    signature: bytes
    hint: str
    by_key: bool
    digests: Mapping[str, str]
    root_is_right: bool


def read_key(pem: bytes, name: str = "") -> PublicKey:
    """Check and normalise a public key. Raises `bad_key`."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Invalid("bad_key", f"expected a public key as PEM; {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise Invalid("bad_key", "expected an elliptic curve key on P-256, P-384 or P-521, as model_signing uses")
    text = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(name, text.decode(), sha256(text).hexdigest())


def read_signature(content: bytes) -> Signature:
    """Parse a `model.sig`. Raises `bad_model_signature`, and `unsupported_model_signature` for what we cannot check."""
    try:
        return _read(fields.parse_object(content.decode(), limit=limits.ATTACHMENT, what="model signature"))
    except ValueError as error:  # of ours, of base64's and of UTF-8's
        raise Invalid("bad_model_signature", f"model signature: {error}") from error


def judge(signature: Signature, files: Mapping[str, str], keys: Sequence[PublicKey]) -> Verdict:
    """Hold a signature to a variant's files (name to sha256) and to the keys that are trusted.

    Every file must be signed, with its digest. What is signed besides is somebody else's: a folder that was signed may
    hold more than one variant.
    """
    if not signature.root_is_right:
        return Verdict(State.MISMATCH, "", "the digest of the whole is not that of the files that it lists")
    for name, digest in sorted(files.items()):
        if name not in signature.digests:
            return Verdict(State.MISMATCH, "", f"it does not sign file {name!r}")
        if signature.digests[name] != digest:
            return Verdict(State.MISMATCH, "", f"does not match: file {name!r}")
    besides = len(signature.digests.keys() - files.keys())
    detail = f"; it signs {besides} more file(s)" if besides else ""
    return _by_whom(signature, keys, detail)


def _by_whom(signature: Signature, keys: Sequence[PublicKey], detail: str) -> Verdict:
    if not signature.by_key:
        return Verdict(State.UNVERIFIED, "a certificate", detail)
    named = [key for key in keys if signature.hint in {"", key.fingerprint}]
    for key in named:
        if _has_signed(key, signature):
            return Verdict(State.VERIFIED, key.name, detail)
    if signature.hint and named:
        return Verdict(State.FORGED, "", f"it names key {named[0].name}, which has not signed it")
    return Verdict(State.UNVERIFIED, f"an unknown key {signature.hint[:16]}".rstrip(), detail)


def _has_signed(key: PublicKey, signature: Signature) -> bool:
    public = serialization.load_pem_public_key(key.pem.encode())
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    try:
        public.verify(signature.signature, _pae(signature.payload), ec.ECDSA(_HASHES[public.curve.name]()))
    except InvalidSignature:
        return False
    return True


def _pae(payload: bytes) -> bytes:
    """What DSSE signs: type and payload, each after its length."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def _read(bundle: fields.Json) -> Signature:
    _expect(bundle, "mediaType", BUNDLE)
    material = fields.take_object(bundle, "verificationMaterial")
    envelope = fields.take_object(bundle, "dsseEnvelope")
    _expect(envelope, "payloadType", PAYLOAD)
    payload = _bytes(envelope, "payload")
    signatures = fields.take_list(envelope, "signatures", limit=1)
    if not signatures:
        raise ProtocolError("malformed", "signatures: expected one; got none")
    digests, root_is_right = _statement(payload)
    key = material.get("publicKey")
    hint = fields.as_object(key, "publicKey").get("hint") if key is not None else ""
    return Signature(
        payload=payload,
        signature=_bytes(fields.as_object(signatures[0], "signature"), "sig"),
        hint=fields.take_text({"hint": hint or ""}, "hint", limit=200),
        by_key=key is not None,
        digests=digests,
        root_is_right=root_is_right,
    )


def _statement(payload: bytes) -> tuple[dict[str, str], bool]:
    """Digests by file name, and whether the subject's is the one over all of them, in the order in which they stand."""
    statement = fields.parse_object(payload, limit=limits.ATTACHMENT, what="statement")
    _expect(statement, "_type", STATEMENT)
    _expect(statement, "predicateType", PREDICATE)
    predicate = fields.take_object(statement, "predicate")
    how = fields.take_object(predicate, "serialization")
    _expect(how, "method", "files")
    _expect(how, "hash_type", "sha256")
    subjects = fields.take_list(statement, "subject", limit=1)
    subject = fields.as_object(subjects[0] if subjects else None, "subject")
    name = fields.take_text(subject, "name", limit=1_000)
    root, digests = sha256(), {}
    for value in fields.take_list(predicate, "resources", limit=RESOURCES):
        resource = fields.as_object(value, "resource")
        _expect(resource, "algorithm", "sha256")
        file, digest = fields.take_text(resource, "name", limit=1_000), resource.get("digest")
        file = name if file == "." else file  # a model that is one file is the subject itself
        if file in digests or not _is_sha256(digest):
            raise ProtocolError("malformed", f"resources: expected each file once, with its sha256; got {file!r:.80}")
        digests[file] = str(digest)
        root.update(bytes.fromhex(str(digest)))
    return digests, fields.take_object(subject, "digest").get("sha256") == root.hexdigest()


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def _expect(source: fields.Json, name: str, value: str) -> None:
    if source.get(name) != value:
        message = f"model signature: {name}: only {value!r} can be checked here; got {source.get(name)!r:.80}"
        raise Invalid("unsupported_model_signature", message)


def _bytes(source: fields.Json, name: str) -> bytes:
    return base64.b64decode(fields.take_text(source, name, limit=limits.ATTACHMENT), validate=True)
