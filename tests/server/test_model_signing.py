"""OpenSSF model signatures: those that the real tool made are judged right, and hostile ones are refused by name.

`model_sigs/README.md` says how the vectors were made.
"""

import base64
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import Invalid
from fleet.releases.model_signing import State, judge, read_key, read_signature

VECTORS = Path(__file__).parent / "model_sigs"
FILES = {
    "model.onnx": sha256(b"not a real model\n").hexdigest(),
    "model.onnx.data": sha256(b"not real weights\n").hexdigest(),
}
CURVES = ["p256", "p384", "p521"]


def vector(name: str) -> bytes:
    return (VECTORS / f"{name}.sig").read_bytes()


def key(name: str) -> Any:
    return read_key((VECTORS / f"{name}.pub.pem").read_bytes(), name)


@pytest.mark.parametrize("curve", CURVES)
def test_what_the_real_tool_signed_is_verified_by_its_key(curve: str) -> None:
    verdict = judge(read_signature(vector(curve)), FILES, [key(name) for name in CURVES])
    assert (verdict.state, str(verdict)) == (State.VERIFIED, f"verified by key {curve}")


def test_a_model_of_one_file_is_signed_under_its_own_name() -> None:
    files = {"model.onnx": FILES["model.onnx"]}
    assert judge(read_signature(vector("one-file")), files, [key("p256")]).state is State.VERIFIED
    assert judge(read_signature(vector("one-file")), FILES, [key("p256")]).state is State.MISMATCH


@pytest.mark.parametrize("trusted", [[], ["p384"]])
def test_a_signature_by_a_key_that_nobody_trusts_is_shown_as_unverified(trusted: list[str]) -> None:
    verdict = judge(read_signature(vector("p256")), FILES, [key(name) for name in trusted])
    assert verdict.state is State.UNVERIFIED
    assert str(verdict).startswith("not verified: signed by an unknown key 74e66118")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({**FILES, "model.onnx": "0" * 64}, "does not match: file 'model.onnx'"),
        ({**FILES, "model.onnx.data": "0" * 64}, "does not match: file 'model.onnx.data'"),
        ({**FILES, "labels.txt": "0" * 64}, "it does not sign file 'labels.txt'"),
    ],
)
@pytest.mark.parametrize("trusted", [[], CURVES])
def test_other_files_than_those_that_were_signed_are_named(files: Any, said: str, trusted: list[str]) -> None:
    """Whoever signed it: a signature of something else has no business here."""
    verdict = judge(read_signature(vector("p256")), files, [key(name) for name in trusted])
    assert (verdict.state, verdict.detail) == (State.MISMATCH, said)


def test_a_folder_may_hold_more_than_the_variant() -> None:
    verdict = judge(read_signature(vector("p256")), {"model.onnx": FILES["model.onnx"]}, [key("p256")])
    assert str(verdict) == "verified by key p256; it signs 1 more file(s)"


# --- by hand: what the tool would not write ----------------------------------------------------------------------

OURS = ec.generate_private_key(ec.SECP256R1())


def pem(private: Any) -> bytes:
    public: bytes = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return public


def signed(
    statement: Callable[[dict[str, Any]], object] = lambda _: None,
    bundle: Callable[[dict[str, Any]], object] = lambda _: None,
    payload: bytes | None = None,
) -> bytes:
    """A good signature by OURS but for what is changed, before it is signed (`statement`) or after (`bundle`)."""
    original = json.loads(vector("p256"))
    body = json.loads(base64.b64decode(original["dsseEnvelope"]["payload"]))
    statement(body)
    content = json.dumps(body).encode() if payload is None else payload
    kind = "application/vnd.in-toto+json"
    pae = f"DSSEv1 {len(kind)} {kind} {len(content)} ".encode() + content
    original["dsseEnvelope"]["payload"] = base64.b64encode(content).decode()
    signature = OURS.sign(pae, ec.ECDSA(hashes.SHA256()))
    original["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    original["verificationMaterial"]["publicKey"]["hint"] = sha256(pem(OURS)).hexdigest()
    bundle(original)
    return json.dumps(original).encode()


def verdict_of(content: bytes) -> State:
    return judge(read_signature(content), FILES, [read_key(pem(OURS), "ours")]).state


def test_the_signature_made_by_hand_is_a_good_one() -> None:
    assert verdict_of(signed()) is State.VERIFIED


def test_a_key_that_is_named_and_has_not_signed_is_a_forgery() -> None:
    def swap(bundle: dict[str, Any]) -> None:
        other = ec.generate_private_key(ec.SECP256R1()).sign(b"something else", ec.ECDSA(hashes.SHA256()))
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(other).decode()

    assert verdict_of(signed(bundle=swap)) is State.FORGED


def test_a_changed_payload_is_a_forgery() -> None:
    def change(bundle: dict[str, Any]) -> None:
        body = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        body["predicate"]["note"] = "added later"
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(body).encode()).decode()

    assert verdict_of(signed(bundle=change)) is State.FORGED


def test_an_old_bundle_that_names_no_key_is_tried_with_every_key() -> None:
    content = signed(bundle=lambda b: b["verificationMaterial"]["publicKey"].pop("hint"))
    assert verdict_of(content) is State.VERIFIED
    assert judge(read_signature(content), FILES, [key("p256")]).state is State.UNVERIFIED


def test_a_certificates_signature_is_shown_as_unverified() -> None:
    content = signed(bundle=lambda b: b.update(verificationMaterial={"certificate": {"rawBytes": "AAAA"}}))
    verdict = judge(read_signature(content), FILES, [read_key(pem(OURS), "ours")])
    assert str(verdict) == "not verified: signed by a certificate"


def test_a_digest_of_the_whole_that_is_not_that_of_the_parts_is_a_mismatch() -> None:
    def change(body: dict[str, Any]) -> None:
        body["subject"][0]["digest"]["sha256"] = "0" * 64

    assert verdict_of(signed(change)) is State.MISMATCH


def test_parts_in_another_order_have_another_digest() -> None:
    assert verdict_of(signed(lambda body: body["predicate"]["resources"].reverse())) is State.MISMATCH


def _serialization(**changes: str) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["predicate"]["serialization"].update(changes)


UNREADABLE = [
    (signed(_serialization(method="shards")), "unsupported_model_signature"),
    (signed(_serialization(hash_type="blake3")), "unsupported_model_signature"),
    (signed(lambda b: b.update(predicateType="https://model_signing/Digests/v0.1")), "unsupported_model_signature"),
    (signed(lambda b: b.update(_type="https://in-toto.io/Statement/v0.1")), "unsupported_model_signature"),
    (signed(bundle=lambda b: b.update(mediaType="text/html")), "unsupported_model_signature"),
    (signed(bundle=lambda b: b["dsseEnvelope"].update(payloadType="text/plain")), "unsupported_model_signature"),
    (signed(bundle=lambda b: b["dsseEnvelope"].update(signatures=[])), "bad_model_signature"),
    (signed(bundle=lambda b: b["dsseEnvelope"].update(signatures=[{}] * 9)), "bad_model_signature"),
    (signed(bundle=lambda b: b["dsseEnvelope"].update(payload="not base64 ü")), "bad_model_signature"),
    (signed(bundle=lambda b: b["dsseEnvelope"].update(payload="AAA")), "bad_model_signature"),
    (signed(bundle=lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="!AAAA")), "bad_model_signature"),
    (signed(bundle=lambda b: b.pop("verificationMaterial")), "bad_model_signature"),
    (signed(bundle=lambda b: b["verificationMaterial"].update(publicKey=7)), "bad_model_signature"),
    (signed(lambda b: b.update(subject=[])), "bad_model_signature"),
    (signed(lambda b: b["predicate"].update(resources=[{"name": 1}])), "unsupported_model_signature"),
    (signed(lambda b: b["predicate"]["resources"].append(b["predicate"]["resources"][0])), "bad_model_signature"),
    (signed(lambda b: b["predicate"]["resources"][0].update(digest="xyz")), "bad_model_signature"),
    (signed(payload=b"[" * 200_000), "bad_model_signature"),
    (signed(payload=b"not json"), "bad_model_signature"),
    (signed().decode().encode("utf-16"), "bad_model_signature"),
    (b"[" * 500_000, "bad_model_signature"),
    (b" " * 1_048_577, "bad_model_signature"),
    (b"\xff\x00", "bad_model_signature"),
    (b"", "bad_model_signature"),
]


@pytest.mark.parametrize(("content", "code"), UNREADABLE, ids=range(len(UNREADABLE)))  # keys differ by process
def test_what_cannot_be_read_is_refused_by_name(content: bytes, code: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_signature(content)
    assert caught.value.code == code


@given(
    st.binary(max_size=300)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with pytest.raises(Invalid):
        read_signature(content)


@given(st.data())
def test_a_bundle_with_any_byte_changed_is_never_verified_with_other_content(data: st.DataObject) -> None:
    content = bytearray(vector("p256"))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        signature = read_signature(bytes(content))
    except Invalid:
        return
    verdict = judge(signature, FILES, [key("p256")])
    assert verdict.state is not State.VERIFIED or signature.payload == read_signature(vector("p256")).payload


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-----BEGIN PUBLIC KEY-----",
        pem(ed25519.Ed25519PrivateKey.generate()),
        pem(ec.generate_private_key(ec.SECP256K1())),
    ],
    ids=["empty", "cut", "ed25519", "another curve"],
)
def test_a_key_that_the_tool_would_not_use_is_refused(content: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        read_key(content)
    assert caught.value.code == "bad_key"
