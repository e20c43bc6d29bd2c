"""Two people, two machines: CI proposes, the second person reviews and signs. Against a live server."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Targets

from device_sdk import cosign, publish
from device_sdk.errors import TransferError
from fleet.accounts.services import create_token
from fleet.releases.models import Release
from fleet.trust import keys, keystore, repository, selectors
from fleet.trust.models import PendingRole
from tests.publish.test_publish import Runner, ci, states  # noqa: F401
from tests.registry import MODEL, onnx_model

pytestmark = pytest.mark.django_db(transaction=True)
CI, ERIN = CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()


class Person:
    """The second person's machine: their key, CI's public key, and a token that can only sign."""

    def __init__(self, folder: Path, server: str) -> None:
        self.folder, self.server = folder, server
        self.token = create_token(name="erin", scopes=["sign"], lifetime=timedelta(days=1))[1]
        self.key, self.ci = folder / "erin.pem", folder / "ci.pub.json"
        self.key.write_bytes(ERIN.private_bytes)
        self.ci.write_text(keys.public_to_json(CI.public_key))

    def sign(self, *more: object, key: Path | None = None, known: bool = True) -> int:
        role_key = ["--role-key", self.ci] if known else []
        return self("sign", "--key", key or self.key, *role_key, *more)

    def __call__(self, command: str, *arguments: object) -> int:
        given = [command, "--model", MODEL, "--server", self.server, "--token", self.token, *arguments]
        return publish.main([str(argument) for argument in given])


@pytest.fixture
def erin(ci: Runner, own_folder: Path) -> Person:  # noqa: F811
    public = [CI.public_key, ERIN.public_key]
    keystore.add_model(keystore.at(None), model=MODEL, public_keys=public, threshold=2)
    ci.key.write_bytes(CI.private_bytes)
    return Person(own_folder, ci.server)


@pytest.fixture
def said(capsys: Any) -> Callable[[], str]:
    return lambda: capsys.readouterr().err


def test_a_push_that_needs_another_signature_says_so_by_words_and_code(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    assert ci.push() == publish.PENDING == 6
    told = said()
    assert f"pending: 1 of 2 signatures; missing: 1 of {ERIN.public_key.keyid}" in told
    assert f"fleet-publish sign --model digits --server {erin.server}" in told
    assert states() == {"1.0.0": "pending"}


def test_the_second_person_sees_what_changes_and_signs_the_same_bytes(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push("1.0.0", "--meta", "commit=abc")
    before = Metadata[Targets].from_bytes(PendingRole.objects.get().content.encode())
    said()
    assert erin.sign("--yes") == publish.OK
    told = said()
    target = before.signed.targets["digits/1.0.0/default"]
    for part in (
        "let run  digits 1.0.0, variant default",
        f"manifest: {target.length:,} bytes, sha256 {target.hashes['sha256']}",
        "file model.onnx:",
        "commit: abc",
        "the server says: it waits for signatures",
        "keep     0 variants",
        "UTC (in 179 days)",
        "1 of 2.",
        "version 1 of the role of digits is in force",
    ):
        assert part in told
    held = selectors.newest(MODEL)
    assert held is not None
    assert Metadata[Targets].from_bytes(held.content.encode()).signed_bytes == before.signed_bytes
    assert states() == {"1.0.0": "valid"}


def test_after_it_is_signed_pushing_again_finds_it_valid(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push()
    assert ci.push() == publish.PENDING
    assert "pending: 1 of 2" in said()
    erin.sign("--yes")
    assert ci.push() == publish.OK


def test_waiting_ends_when_the_second_person_has_signed(ci: Runner, erin: Person, monkeypatch: Any, said: Any) -> None:  # noqa: F811
    signed = []

    def sleep(_seconds: float) -> None:
        if not signed:
            signed.append(erin.sign("--yes"))

    monkeypatch.setattr(publish.time, "sleep", sleep)
    assert ci.push("1.0.0", "--wait") == publish.OK
    assert signed == [publish.OK]
    assert "digits 1.0.0 is valid" in said()


def test_waiting_in_vain_is_pending(ci: Runner, erin: Person) -> None:  # noqa: F811
    assert ci.push("1.0.0", "--wait", wait_seconds=0) == publish.PENDING
    assert states() == {"1.0.0": "pending"}


def test_a_newer_push_says_what_it_supersedes(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push("1.0.0")
    ci.write("model.onnx", onnx_model(3.0))
    assert ci.push("1.1.0") == publish.PENDING
    assert "the proposal of digits 1.0.0 had too few signatures and is superseded by this one" in said()
    ci.write("model.onnx", onnx_model())
    assert ci.push("1.0.0") == publish.PENDING
    assert states() == {"1.0.0": "pending", "1.1.0": "withdrawn"}


@pytest.mark.parametrize("command", ["renew", "revoke"])
def test_renewing_and_revoking_wait_for_the_second_person(ci: Runner, erin: Person, said: Any, command: str) -> None:  # noqa: F811
    ci.push()
    erin.sign("--yes")
    said()
    more = {"version": "1.0.0"} if command == "revoke" else {}
    assert ci(command, **more) == publish.PENDING
    assert "version 2 of the role of digits is proposed and changes nothing until" in said()
    assert erin.sign("--yes") == publish.OK
    expected = "revoke   digits/1.0.0/default" if command == "revoke" else "change no release"
    assert expected in said()
    assert states() == {"1.0.0": "revoked" if command == "revoke" else "valid"}


def test_a_renewal_does_not_push_a_waiting_release_aside(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push()
    erin.sign("--yes")
    ci.write("model.onnx", onnx_model(3.0))
    ci.push("1.1.0")
    assert ci("renew") == publish.REFUSED
    assert "proposal_waits" in said()
    assert states()["1.1.0"] == "pending"


# --- what the second person does not sign ---


def test_without_a_key_of_the_proposer_nothing_is_signed(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push()
    assert erin.sign("--yes", known=False) == publish.USAGE
    assert "give --role-key" in said()


def test_a_proposal_by_a_key_that_was_not_given_is_not_signed(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push()
    erin.ci.write_text(keys.public_to_json(CryptoSigner.generate_ed25519().public_key))
    assert erin.sign("--yes") == publish.REFUSED
    assert "signed by none of our keys" in said()
    assert states() == {"1.0.0": "pending"}


def lie(monkeypatch: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """A server that was broken into hands over something else."""
    real = publish.Server.proposal

    def proposal(self: Any, model: str) -> dict[str, Any]:
        answer = dict(real(self, model) or {})
        change(answer)
        return answer

    monkeypatch.setattr(publish.Server, "proposal", proposal)


def edited(role: str, edit: Callable[[Targets], None], signer: CryptoSigner | None = None) -> str:
    metadata = Metadata[Targets].from_bytes(role.encode())
    edit(metadata.signed)
    if signer:
        metadata.sign(signer)
    return metadata.to_bytes(repository.COMPACT).decode()


def test_a_proposal_changed_by_the_server_is_not_signed(ci: Runner, erin: Person, monkeypatch: Any) -> None:  # noqa: F811
    ci.push()

    def expire_later(role: Targets) -> None:
        role.expires = role.expires.replace(year=2099)

    lie(monkeypatch, lambda answer: answer.update(role=edited(answer["role"], expire_later)))
    assert erin.sign("--yes") == publish.REFUSED


def test_another_manifest_than_the_one_that_is_signed_is_not_shown(
    ci: Runner,  # noqa: F811
    erin: Person,
    monkeypatch: Any,
    said: Any,
) -> None:
    ci.push()
    lie(monkeypatch, lambda answer: answer.update(manifests={}))
    assert erin.sign("--yes") == publish.REFUSED
    assert "not the one that is proposed" in said()


SENSELESS = {
    "an old version": "expected a proposal of version 2; got 1",
    "other bytes of a release": "the proposal has other bytes for digits/1.0.0/default",
    "a path of another model": "its manifest says that it is digits/1.1.0/default",
    "expired": "has expired",
}


@pytest.mark.parametrize("what", SENSELESS)
def test_even_what_ci_has_signed_must_make_sense(
    ci: Runner,  # noqa: F811
    erin: Person,
    monkeypatch: Any,
    said: Any,
    what: str,
) -> None:
    ci.push()
    erin.sign("--yes")
    ci.write("model.onnx", onnx_model(3.0))
    ci.push("1.1.0")

    def edit(role: Targets) -> None:
        if what == "an old version":
            role.version = 1
        elif what == "expired":
            role.expires = role.expires.replace(year=2020)
        elif what == "other bytes of a release":
            role.targets["digits/1.0.0/default"].hashes = {"sha256": "0" * 64}
        else:
            target = role.targets.pop("digits/1.1.0/default")
            target.path = "wine/1.1.0/default"
            role.targets[target.path] = target

    def change(answer: dict[str, Any]) -> None:
        answer["role"] = edited(answer["role"], edit, CI)
        (text,) = answer["manifests"].values()
        answer["manifests"] = {**answer["manifests"], "wine/1.1.0/default": text}

    lie(monkeypatch, change)
    assert erin.sign("--yes") == publish.REFUSED
    assert SENSELESS[what] in said()
    assert states()["1.1.0"] == "pending"


def test_nobody_to_ask_is_no_consent(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push()
    assert erin.sign() == publish.USAGE
    assert "run it again with --yes" in said()
    assert states() == {"1.0.0": "pending"}


@pytest.mark.parametrize(("answer", "code"), [("y\n", publish.OK), ("\n", publish.PENDING), ("no\n", publish.PENDING)])
def test_a_person_is_asked(ci: Runner, erin: Person, monkeypatch: Any, answer: str, code: int) -> None:  # noqa: F811
    ci.push()

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer

    monkeypatch.setattr(cosign.sys, "stdin", Terminal())
    assert erin.sign() == code
    assert states() == {"1.0.0": "valid" if code == publish.OK else "pending"}


def test_a_key_that_is_not_of_the_role_signs_nothing(ci: Runner, erin: Person, own_folder: Path, said: Any) -> None:  # noqa: F811
    ci.push()
    other = own_folder / "other.pem"
    other.write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    assert erin.sign("--yes", key=other) == publish.USAGE
    assert "is none of the keys of digits" in said()
    assert len(json.loads(PendingRole.objects.get().content)["signatures"]) == 1


def test_signing_twice_with_one_key_is_told(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push()
    assert erin.sign("--yes", key=ci.key) == publish.PENDING
    assert "this key has signed it already" in said()


def test_names_in_a_proposal_cannot_hide_what_was_said(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push("1.0.0", "--meta", "note=\x1b[2Jinnocent")
    said()
    erin.sign("--yes")
    told = said()
    assert "innocent" in told
    assert "\x1b" not in told


# --- the files that were reviewed ---


def test_the_reviewed_files_must_be_those_proposed(ci: Runner, erin: Person, own_folder: Path, said: Any) -> None:  # noqa: F811
    reviewed = own_folder / "reviewed"
    ci.write("reviewed/model.onnx", onnx_model(9.0))
    ci.push()
    assert erin.sign("--yes", "--files", reviewed) == publish.REFUSED
    assert "no model.onnx with sha256" in said()
    ci.write("reviewed/model.onnx", onnx_model())
    assert erin.sign("--yes", "--files", reviewed) == publish.OK
    assert "digits/1.0.0/default: its files are those in" in said()


def test_the_reviewed_manifest_must_be_one_proposed(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    ci.push()
    good = ci.write("good.json", Release.objects.get().variants.get().manifest.encode())
    bad = ci.write("bad.json", b"{}")
    assert erin.sign("--yes", "--manifest", good, "--manifest", bad) == publish.REFUSED
    assert erin.sign("--yes", "--manifest", ci.folder / "none.json") == publish.USAGE
    assert erin.sign("--yes", "--manifest", good) == publish.OK
    assert "is the manifest of digits/1.0.0/default" in said()


# --- status, and bad luck ---


def test_status_says_who_signed_who_is_missing_and_when_it_expires(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    assert erin("status") == publish.OK
    assert "digits: no role yet" in said()
    ci.push()
    said()
    assert erin("status") == publish.PENDING
    told = said()
    assert f"signed   {CI.public_key.keyid}" in told
    assert f"missing  {ERIN.public_key.keyid}" in told
    assert "release 1.0.0 is pending" in told
    erin.sign("--yes")
    said()
    assert erin("status") == publish.OK
    assert "role version 1, 1 variant, expires" in said()


def test_nothing_to_sign_is_fine(ci: Runner, erin: Person, said: Any) -> None:  # noqa: F811
    assert erin.sign("--yes") == publish.OK
    assert "nothing of digits waits for a signature" in said()


def test_an_answer_that_got_lost_is_found_out(ci: Runner, erin: Person, monkeypatch: Any, said: Any) -> None:  # noqa: F811
    ci.push()
    real = publish.Server.add_signatures

    def lose(self: Any, model: str, role: str) -> dict[str, Any]:
        real(self, model, role)
        return real(self, model, role)  # as a retry would be: the server has it already

    monkeypatch.setattr(publish.Server, "add_signatures", lose)
    assert erin.sign("--yes") == publish.OK
    assert "is in force" in said()


def test_a_proposal_that_changes_while_it_is_read_is_not_signed(ci: Runner, erin: Person, monkeypatch: Any) -> None:  # noqa: F811
    ci.push()
    real = publish.Server.add_signatures

    def overtaken(self: Any, model: str, role: str) -> dict[str, Any]:
        ci.write("model.onnx", onnx_model(3.0))
        ci.push("1.1.0")
        return real(self, model, role)

    monkeypatch.setattr(publish.Server, "add_signatures", overtaken)
    assert erin.sign("--yes") == publish.REFUSED
    assert states() == {"1.0.0": "withdrawn", "1.1.0": "pending"}


def test_a_signing_token_reads_no_other_address(erin: Person) -> None:
    with pytest.raises(TransferError) as caught:
        publish.Server(erin.server, erin.token).release(MODEL, "1.0.0")
    assert caught.value.status == 403
