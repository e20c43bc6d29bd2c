"""The command that CI runs, against a live server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import requests
from django.core.management import call_command
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Targets

from device_sdk import publish
from device_sdk.errors import TransferError
from device_sdk.protocol.manifest import Manifest
from device_sdk.publishing import server as publishing_server
from fleet.releases import storage
from fleet.releases.models import Artifact, Release, Variant
from fleet.trust import keys, keystore
from fleet.trust.models import RoleMetadata
from tests.registry import MODEL, external_model, onnx_model, publish_token, set_up_trust

pytestmark = pytest.mark.django_db(transaction=True)
Push = Callable[..., int]


class Runner:
    """A CI runner with its files, its key and its token."""

    def __init__(self, folder: Path, server: str, signer: CryptoSigner) -> None:
        self.folder, self.server, self.token = folder, server, publish_token(MODEL)
        self.key = folder / "ci.key"
        self.key.write_bytes(signer.private_bytes)
        self.write("model.onnx", onnx_model())

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def __call__(self, command: str, *arguments: object, **options: object) -> int:
        chosen = {"model": MODEL, "server": self.server, "key": self.key, "token": self.token, **options}
        flags = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return publish.main([command, *map(str, arguments), *flags])

    def push(self, version: str = "1.0.0", *more: object, **options: object) -> int:
        return self("push", self.folder / "model.onnx", *more, version=version, **options)


@pytest.fixture
def ci(live_server: Any, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(publishing_server, "BACKOFF", 0.0)
    monkeypatch.delenv("FLEET_API_TOKEN", raising=False)
    return Runner(own_folder, live_server.url, set_up_trust())


def states() -> dict[str, str]:
    return dict(Release.objects.values_list("version", "state"))


def newest_role() -> Targets:
    row = RoleMetadata.objects.filter(role=MODEL).order_by("-version")[0]
    return Metadata[Targets].from_bytes(row.content.encode()).signed


# --- the good way ---


def test_push_publishes_a_release_that_validates(ci: Runner, capsys: Any) -> None:
    assert ci.push("1.0.0", "--wait", "--meta", "commit=abc") == publish.OK
    assert states() == {"1.0.0": "valid"}
    said = capsys.readouterr().err
    assert "published digits 1.0.0: 1 variant(s)" in said
    assert "digits 1.0.0 is valid" in said
    manifest = Manifest.parse(Variant.objects.get().manifest.encode())
    assert (manifest.metadata, manifest.inputs[0].dtype) == ({"commit": "abc"}, "float32")


def test_pushing_twice_is_harmless(ci: Runner, capsys: Any) -> None:
    assert ci.push() == publish.OK
    assert ci.push() == publish.OK
    assert "is published already (valid)" in capsys.readouterr().err
    assert RoleMetadata.objects.filter(role=MODEL).count() == 1


def test_pushing_again_from_a_machine_without_onnxruntime_is_harmless(ci: Runner, monkeypatch: Any) -> None:
    assert ci.push() == publish.OK
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert ci.push() == publish.OK


def test_without_onnxruntime_the_server_reads_inputs_and_outputs(ci: Runner, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert ci.push("1.0.0", "--wait") == publish.OK
    variant = Variant.objects.get()
    assert Manifest.parse(variant.manifest.encode()).inputs == ()
    assert variant.inputs[0]["name"] == "x"


def test_a_second_release_is_signed_upon_the_first(ci: Runner) -> None:
    assert ci.push("1.0.0") == publish.OK
    ci.write("model.onnx", onnx_model(3.0))
    assert ci.push("1.1.0") == publish.OK
    role = newest_role()
    assert (role.version, sorted(role.targets)) == (2, ["digits/1.0.0/default", "digits/1.1.0/default"])


def test_a_release_of_several_files(ci: Runner) -> None:
    model, data = external_model()
    ci.write("model.onnx", model)
    assert ci.push("1.0.0", ci.write("model.onnx.data", data), "--wait") == publish.OK
    manifest = Manifest.parse(Variant.objects.get().manifest.encode())
    assert (manifest.entry, [file.name for file in manifest.files]) == ("model.onnx", ["model.onnx", "model.onnx.data"])


def test_a_release_of_several_variants(ci: Runner) -> None:
    model, data = external_model()
    files = f"{ci.write('ext/model.onnx', model)},{ci.write('ext/model.onnx.data', data)}"
    arguments = ["--variant", f"plain={ci.folder / 'model.onnx'}", "--variant", f"external={files}", "--wait"]
    assert ci("push", *arguments, version="1.0.0") == publish.OK
    assert sorted(Variant.objects.values_list("name", "state")) == [("external", "valid"), ("plain", "valid")]


def test_an_upload_is_cut_into_pieces_and_resumed(ci: Runner, monkeypatch: Any, own_folder: Path) -> None:
    monkeypatch.setattr(publishing_server, "CHUNK", 30)
    data, sent = onnx_model(), []
    name = sha256(data).hexdigest()
    (own_folder / "incoming").mkdir()
    (own_folder / "incoming" / f"{name}.part").write_bytes(data[:40])
    real = publish.Server._send

    def record(self: Any, method: str, where: str, body: Any, headers: Any) -> Any:
        if method == "PUT":
            sent.append((int(headers["Upload-Offset"]), len(body)))
        return real(self, method, where, body, headers)

    monkeypatch.setattr(publish.Server, "_send", record)
    assert ci.push() == publish.OK
    assert sent[0] == (40, 30)
    assert sum(length for _, length in sent) == len(data) - 40
    with storage.open_object(storage.blob_name(name)) as file:
        assert file.read() == data


def test_a_broken_line_is_tried_again(ci: Runner, monkeypatch: Any) -> None:
    real, failures = requests.Session.request, [requests.ConnectionError("reset"), requests.Timeout("slow")] * 2

    def flaky(self: Any, method: str, url: str, **extra: Any) -> Any:
        if method in {"PUT", "POST"} and failures:
            raise failures.pop()
        return real(self, method, url, **extra)

    monkeypatch.setattr(requests.Session, "request", flaky)
    assert ci.push() == publish.OK
    assert failures == []


def test_an_answer_that_got_lost_does_no_harm(ci: Runner, monkeypatch: Any) -> None:
    real, lost = requests.Session.request, []

    def lossy(self: Any, method: str, url: str, **extra: Any) -> Any:
        answer = real(self, method, url, **extra)
        if method == "POST" and not lost:
            lost.append(answer.status_code)
            raise requests.ConnectionError("reset")
        return answer

    monkeypatch.setattr(requests.Session, "request", lossy)
    assert ci.push() == publish.OK
    assert (lost, states()) == ([201], {"1.0.0": "valid"})


def test_a_runner_that_was_overtaken_signs_again(ci: Runner, monkeypatch: Any) -> None:
    real, raced = publish.Server.role, []

    def overtaken(self: Any, model: str) -> Any:
        role = real(self, model)
        if not raced:
            raced.append(True)
            monkeypatch.setattr(publish.Server, "role", real)
            ci.write("model.onnx", onnx_model(5.0))
            assert ci.push("0.9.0") == publish.OK
        return role

    monkeypatch.setattr(publish.Server, "role", overtaken)
    assert ci.push("1.0.0") == publish.OK
    assert sorted(newest_role().targets) == ["digits/0.9.0/default", "digits/1.0.0/default"]


def test_revoke_takes_a_release_out_of_the_role(ci: Runner) -> None:
    ci.push("1.0.0")
    ci.write("model.onnx", onnx_model(3.0))
    ci.push("1.1.0")
    assert ci("revoke", version="1.0.0") == publish.OK
    assert states() == {"1.0.0": "revoked", "1.1.0": "valid"}
    assert sorted(newest_role().targets) == ["digits/1.1.0/default"]
    assert ci("revoke", version="1.0.0") == publish.USAGE


def test_renew_signs_the_same_for_another_half_year(ci: Runner) -> None:
    ci.push()
    before = newest_role()
    assert ci("renew") == publish.OK
    after = newest_role()
    assert (after.version, after.targets) == (before.version + 1, before.targets)


def test_keygen_makes_a_private_key_and_prints_the_public_half(ci: Runner, own_folder: Path, capsys: Any) -> None:
    made = own_folder / "new.key"
    assert publish.main(["keygen", str(made)]) == publish.OK
    public = keys.public_from_json(capsys.readouterr().out)
    assert made.stat().st_mode & 0o777 == 0o600
    assert publish.main(["keygen", str(made)]) == publish.USAGE
    (own_folder / "new.pub.json").write_text(keys.public_to_json(public))
    call_command("trust_add_model", MODEL, "--ci-public", str(own_folder / "new.pub.json"))
    assert ci.push(key=made) == publish.OK


def test_a_key_may_be_a_uri_with_its_public_half(ci: Runner, own_folder: Path) -> None:
    public = keystore.signer_from_pem(ci.key.read_bytes()).public_key
    (own_folder / "ci.pub.json").write_text(keys.public_to_json(public))
    assert ci.push(key=f"file2:{ci.key}") == publish.USAGE
    assert ci.push(key=f"file2:{ci.key}", public=own_folder / "ci.pub.json") == publish.OK


# --- refusals and exit codes ---


def test_the_same_version_with_other_bytes_is_refused(ci: Runner, capsys: Any) -> None:
    ci.push()
    ci.write("model.onnx", onnx_model(7.0))
    assert ci.push() == publish.REFUSED
    assert "[version_exists]" in capsys.readouterr().err
    assert Artifact.objects.count() == 1  # refused before anything was uploaded


def test_what_is_no_model_is_published_and_found_invalid(ci: Runner, capsys: Any) -> None:
    ci.write("model.onnx", b"not a model")
    assert ci.push("1.0.0", "--wait") == publish.INVALID
    assert "digits 1.0.0 is invalid: default: " in capsys.readouterr().err


def test_the_wrong_key_is_refused(ci: Runner, own_folder: Path, capsys: Any) -> None:
    (own_folder / "other.key").write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    assert ci.push(key=own_folder / "other.key") == publish.REFUSED
    assert "[bad_signature]" in capsys.readouterr().err


def test_a_role_that_none_of_our_keys_signed_is_never_signed_on(ci: Runner, own_folder: Path, capsys: Any) -> None:
    """A server that was broken into adds an entry of its own and hopes that CI signs it."""
    ci.push("1.0.0")
    row = RoleMetadata.objects.get(role=MODEL)
    role = json.loads(row.content)
    role["signed"]["targets"]["digits/6.6.6/default"] = role["signed"]["targets"]["digits/1.0.0/default"]
    RoleMetadata.objects.filter(pk=row.pk).update(content=json.dumps(role))
    ci.write("model.onnx", onnx_model(3.0))
    assert ci.push("1.1.0") == publish.REFUSED
    assert "[foreign_role]" in capsys.readouterr().err
    assert states() == {"1.0.0": "valid"}


def test_after_a_change_of_keys_the_old_public_key_lets_the_role_be_signed_anew(ci: Runner, own_folder: Path) -> None:
    ci.push("1.0.0")
    old = keystore.signer_from_pem(ci.key.read_bytes()).public_key
    (own_folder / "old.pub.json").write_text(keys.public_to_json(old))
    new = CryptoSigner.generate_ed25519()
    (own_folder / "new.key").write_bytes(new.private_bytes)
    keystore.add_model(keystore.at(None), model=MODEL, public_keys=[new.public_key])
    ci.write("model.onnx", onnx_model(3.0))
    assert ci.push("1.1.0", key=own_folder / "new.key") == publish.REFUSED
    assert ci.push("1.1.0", key=own_folder / "new.key", role_key=own_folder / "old.pub.json") == publish.OK


@pytest.mark.parametrize("token", ["flt_" + "0" * 64, "nonsense"])
def test_an_unknown_token_is_refused(ci: Runner, token: str, capsys: Any) -> None:
    assert ci.push(token=token) == publish.REFUSED
    assert "[authentication_failed]" in capsys.readouterr().err


def test_a_token_for_another_model_is_refused(ci: Runner, capsys: Any) -> None:
    assert ci.push(token=publish_token("detector")) == publish.REFUSED
    assert "[wrong_model]" in capsys.readouterr().err


def test_an_over_large_file_is_refused(ci: Runner, settings: Any, capsys: Any) -> None:
    settings.MAX_ARTIFACT_BYTES = 10
    assert ci.push() == publish.REFUSED
    assert "[too_large]" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_a_network_failure(ci: Runner) -> None:
    assert ci.push(server="http://127.0.0.1:9") == publish.FAILED


def test_a_file_that_changes_while_it_is_uploaded_is_refused(ci: Runner, monkeypatch: Any, capsys: Any) -> None:
    real = publish.Server.upload

    def meddle(self: Any, file: Any, report: Any) -> None:
        file.path.write_bytes(file.path.read_bytes()[::-1])
        real(self, file, report)

    monkeypatch.setattr(publish.Server, "upload", meddle)
    assert ci.push() == publish.REFUSED
    assert "[hash_mismatch]" in capsys.readouterr().err
    assert not Release.objects.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["push", "--version", "1.0.0"],
        ["push", "missing.onnx", "--version", "1.0.0"],
        ["push", "{model}", "--version", "../1"],
        ["push", "{model}", "--version", "1", "--meta", "novalue"],
        ["push", "{model}", "--version", "1", "--variant", "a={model}"],
        ["push", "--version", "1", "--variant", "a={model}", "--variant", "a={model}"],
        ["push", "{model}", "{model}", "--version", "1"],
        ["push", "{model}", "--version", "1", "--key", "missing.key"],
        ["push", "{model}", "--version", "1", "--model", "director"],
        ["push", "{model}", "--version", "1", "--token", ""],
    ],
)
def test_wrong_use_is_told_without_a_trace(ci: Runner, arguments: list[str], capsys: Any) -> None:
    shared = ["--model", MODEL, "--server", ci.server, "--key", str(ci.key), "--token", ci.token]
    given = [text.format(model=ci.folder / "model.onnx") for text in arguments]
    assert publish.main([given[0], *shared, *given[1:]]) == publish.USAGE
    assert capsys.readouterr().err.startswith("error: ")


def test_the_token_comes_from_the_environment_and_netrc_does_not_replace_it(
    ci: Runner, monkeypatch: Any, own_folder: Path
) -> None:
    netrc = ci.write("netrc", b"default login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("FLEET_API_TOKEN", ci.token)
    assert ci.push(token="") == publish.OK


def test_a_redirect_is_not_followed_with_the_token(ci: Runner, monkeypatch: Any) -> None:
    def redirect(self: Any, method: str, url: str, **extra: Any) -> Any:
        assert extra["allow_redirects"] is False
        answer = requests.Response()
        answer.status_code, answer.url, answer.reason = 302, url, "Found"
        answer.request = requests.Request(method, url).prepare()
        return answer

    monkeypatch.setattr(requests.Session, "request", redirect)
    assert ci.push() == publish.FAILED


def test_it_runs_as_a_module_without_django(ci: Runner) -> None:
    script = (
        "import sys; import device_sdk.publish; print(sorted({'django', 'fleet', 'onnxruntime'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    environment = {**os.environ, "FLEET_API_TOKEN": ci.token}
    command = [sys.executable, "-m", "device_sdk.publish", "push", str(ci.folder / "model.onnx"), "--model", MODEL]
    rest = ["--version", "1.0.0", "--server", ci.server, "--key", str(ci.key), "--wait"]
    done = subprocess.run([*command, *rest], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (publish.OK, ""), done.stderr


def test_retrying_stops_in_the_end() -> None:
    pauses: list[float] = []
    server = publish.Server("http://127.0.0.1:9", "token", pause=pauses.append)
    with pytest.raises(TransferError):
        server.role(MODEL)
    assert len(pauses) == publishing_server.TRIES - 1
