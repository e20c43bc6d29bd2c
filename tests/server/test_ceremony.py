"""The key ceremony: files on a stick that nobody believes, signatures one at a time, and what the server takes in."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.management import CommandError, call_command
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Key, Metadata, Root, Snapshot, TargetFile, Targets

from device_sdk import signing
from device_sdk.protocol.assignment import Assignment
from fleet.errors import FleetError, Unavailable
from fleet.releases.models import Model
from fleet.trust import ceremony, keys, selectors, services
from fleet.trust import stick as sticks
from fleet.trust.models import RoleMetadata
from fleet.trust.stick import Stick
from tests.registry import make_device

ROOTS = ("anna", "boris", "carla")
TARGETS_KEYS = ("dora", "emil")
TOP = Path(__file__).resolve().parents[2]


class World:
    """People, each with a folder of their own, and the stick that goes from one to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "stick"
        self.path.mkdir(parents=True)

    def run(self, step: str, *arguments: str) -> str:
        out = StringIO()
        call_command("ceremony", step, str(self.path), *arguments, stdout=out)
        return out.getvalue()

    def key(self, name: str) -> str:
        return str(self.folder / name / f"{name}.pem")

    def people(self, *names: str) -> None:
        for name in names:
            arguments = ["--private", str(self.folder / name), "--stick", str(self.path), "--no-passphrase"]
            call_command("ceremony", "make-key", name, *arguments, stdout=StringIO())

    def sign(self, *names: str) -> str:
        return "".join(self.run("sign", "--key", self.key(name), "--yes") for name in names)

    def init(self) -> None:
        self.people(*ROOTS, *TARGETS_KEYS, "online")
        options = [part for name in ROOTS for part in ("--root", name)]
        options += [part for name in TARGETS_KEYS for part in ("--targets", name)]
        self.run("init", *options, "--online", "online")

    def first(self) -> "World":
        """As after the first ceremony. Made anew each time where no two must be the same."""
        self.init()
        self.sign("anna", "boris", "dora")
        return self

    def take(self) -> str:
        out = StringIO()
        call_command("trust_import", str(self.path), stdout=out)
        return out.getvalue()

    def public(self, name: str) -> Key:
        return Stick(self.path).public(name).key

    def edit(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads((self.path / name).read_text())
        change(content)
        (self.path / name).write_text(json.dumps(content))


class Copied(World):
    """A ceremony costs a third of a second, a copy of one nothing."""

    def __init__(self, folder: Path, models: Path) -> None:
        super().__init__(folder)
        self.models = models

    def init(self) -> None:
        shutil.copytree(self.models / "init", self.folder, dirs_exist_ok=True)

    def first(self) -> World:
        shutil.copytree(self.models / "first", self.folder, dirs_exist_ok=True)
        return self


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    made = World(folder / "first")
    made.init()
    shutil.copytree(made.folder, folder / "init")
    made.sign("anna", "boris", "dora")
    return folder


@pytest.fixture
def world(tmp_path: Path, models: Path) -> World:
    return Copied(tmp_path, models)


@pytest.fixture
def server(world: World, db: None, settings: Any) -> World:
    """A server that has imported the first ceremony and holds nothing but the online key."""
    world.first()
    settings.ONLINE_KEY_URI = f"file:{world.key('online')}"
    settings.ONLINE_KEY_PUBLIC = world.path.parent / "online" / "online.pub.json"
    world.take()
    return world


def held() -> list[tuple[str, int]]:
    return sorted(RoleMetadata.objects.values_list("role", "version"))


def refused(call: Callable[[], object]) -> str:
    """The code that a command gives."""
    with pytest.raises(CommandError) as caught:
        call()
    return str(caught.value).partition("[")[2].partition("]")[0]


# --- signing, one person at a time ---


def test_a_first_ceremony_tells_who_has_signed_and_who_is_missing(world: World) -> None:
    world.init()
    assert "Still needs 2 more of the keys of root 1: anna" in world.run("show")
    assert "Signed root version 1. Still needs 1 more of the keys of root 1: boris" in world.sign("anna")
    assert "Signed root version 1. Complete." in world.sign("carla")
    assert "Not ready yet." in world.run("show")
    assert "Signed targets version 1. Complete." in world.sign("emil")
    told = world.run("show")
    assert "signed by: anna" in told
    assert "Ready: trust_import takes it." in told


def test_before_a_signature_everything_that_changes_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.first().people("frida", "ci")
    world.run("rotate-root", "--remove", "anna", "--add", "frida", "--threshold", "3")
    world.run("set-model", "digits", "--key", "ci")
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    told = world.run("sign", "--key", world.key("boris")) + world.run("sign", "--key", world.key("dora"))
    assert questions == ["Sign root version 2? [y/N] ", "Sign targets version 2? [y/N] "]
    frida, anna = world.public("frida").keyid[:12], world.public("anna").keyid[:12]
    assert f"+ root: key frida ({frida}) may sign" in told
    assert f"- root: key anna ({anna}) may no longer sign" in told
    assert "root: 3 of 3 must sign (was 2 of 3)" in told
    assert "+ model digits: key ci" in told


@pytest.mark.parametrize("answer", ["", "n", "no", "yess"])
def test_whoever_does_not_say_yes_has_not_signed(world: World, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    world.init()
    before = (world.path / "1.root.json").read_bytes()
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert refused(lambda: world.run("sign", "--key", world.key("anna"))) == "not_signed"
    assert (world.path / "1.root.json").read_bytes() == before


def test_a_key_without_a_say_is_refused(world: World) -> None:
    world.init()
    world.people("mallory")
    assert refused(lambda: world.sign("mallory")) == "no_say"
    assert refused(lambda: world.run("sign", "--key", world.key("dora"), "--role", "root", "--yes")) == "no_say"
    assert json.loads((world.path / "1.root.json").read_text())["signatures"] == []


def test_one_person_does_not_sign_twice(world: World) -> None:
    world.init()
    world.sign("anna")
    assert refused(lambda: world.sign("anna")) == "signed_already"
    world.sign("boris", "dora")
    assert refused(lambda: world.sign("carla")) == "nothing_to_sign"


def test_what_was_changed_after_it_was_shown_is_not_signed(world: World) -> None:
    world.init()
    signer = signing.load_signer(world.key("anna"))
    version = ceremony.to_sign(ceremony.read(Stick(world.path)), signer.public_key)[0]
    world.edit("1.root.json", lambda content: content["signed"].update(expires="2099-01-01T00:00:00Z"))
    with pytest.raises(FleetError) as caught:
        ceremony.add_signature(Stick(world.path), version, signer)
    assert caught.value.code == "changed_meanwhile"


def test_a_version_that_somebody_signed_is_not_edited(world: World) -> None:
    world.first()
    world.run("renew", "root")
    world.run("renew", "root", "--days", "30")  # nobody has signed yet
    world.sign("anna")
    assert refused(lambda: world.run("renew", "root")) == "signed_already"
    (world.path / "2.root.json").unlink()
    world.run("renew", "root")
    assert Stick(world.path).versions("root") == [1, 2]


def test_what_one_user_writes_the_next_one_may_read(world: World) -> None:
    world.first()
    modes = {path.name: path.stat().st_mode & 0o777 for path in world.path.iterdir()}
    assert set(modes.values()) == {0o644}


def test_a_second_root_is_not_made_over_the_first(world: World) -> None:
    world.first()
    assert refused(lambda: world.run("init", "--root", "anna", "--targets", "dora", "--online", "online")) == (
        "root_exists"
    )


def test_another_first_root_is_found_by_its_mark(world: World) -> None:
    world.first()
    mark = world.run("show").partition("First root: ")[2][:19]
    assert "Ready" in world.run("show", "--first-root", mark)
    other = "0000-0000-0000-0000"
    assert refused(lambda: world.run("show", "--first-root", other)) == "foreign_root"
    world.run("renew", "root")
    assert refused(lambda: world.run("sign", "--key", world.key("anna"), "--yes", "--first-root", other)) == (
        "foreign_root"
    )


def test_a_root_needs_enough_of_the_old_and_of_the_new_keys(world: World) -> None:
    world.first().people("frida", "gustav")
    world.run("rotate-root", "--remove", "anna", "--remove", "boris", "--add", "frida", "--add", "gustav")
    told = world.sign("frida", "gustav")
    assert "2 more of the keys of root 1: anna" in told.splitlines()[-1]
    assert "root 2" not in told.splitlines()[-1].partition("needs")[2]
    assert "Complete." in world.sign("anna", "boris").splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["rotate-root", "--threshold", "4"], "wrong_threshold"),
        (["rotate-root", "--threshold", "0"], "wrong_threshold"),
        (["rotate-root", "--remove", "anna", "--remove", "boris"], "wrong_threshold"),
        (["rotate-root", "--remove", "dora"], "unknown_key"),
        (["rotate-root", "--add", "anna"], "same_key_twice"),
        (["rotate-root", "--add", "../anna"], "no_such_file"),
        (["rotate-root", "--add", "nobody"], "no_such_file"),
        (["set-model", "director", "--key", "dora"], "invalid_name"),
        (["set-model", "../x", "--key", "dora"], "invalid_name"),
        (["set-model", "digits", "--key", "dora", "--key", "dora"], "wrong_threshold"),
        (["remove-model", "digits"], "unknown_model"),
        (["remove-model", "director"], "unknown_model"),
    ],
)
def test_a_wrong_edit_is_refused_and_writes_nothing(world: World, arguments: list[str], code: str) -> None:
    world.first()
    before = sorted(path.name for path in world.path.iterdir())
    extra = ["--threshold", "2"] if arguments[-2:] == ["--key", "dora"] and code == "wrong_threshold" else []
    assert refused(lambda: world.run(*arguments, *extra)) == code
    assert sorted(path.name for path in world.path.iterdir()) == before


# --- a stick comes from elsewhere ---


def test_foreign_files_are_named_and_left_alone(world: World) -> None:
    world.first()
    (world.path / "autorun.inf").write_text("x")
    (world.path / "01.root.json").write_text("{")
    os.mkfifo(world.path / "9.snapshot.json")
    told = world.run("show")
    assert [line for line in told.splitlines() if "Not ours" in line] == [
        f"Not ours, not read: {name!r}" for name in ("01.root.json", "9.snapshot.json", "autorun.inf")
    ]
    assert (world.path / "autorun.inf").read_text() == "x"


def a_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_huge_file(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1024**3)


@pytest.mark.parametrize("plant", [a_symlink, a_pipe, a_folder, a_huge_file])
@pytest.mark.parametrize("name", ["1.root.json", "1.targets.json", "anna.pub.json"])
def test_only_plain_files_of_a_sane_size_are_read(world: World, plant: Callable[[Path], None], name: str) -> None:
    world.first()
    plant(world.path / name)
    step = ["rotate-root", "--add", "anna"] if name == "anna.pub.json" else ["show"]
    assert refused(lambda: world.run(*step)) == "hostile_stick"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "7", '"x"', "{}", '{"signed": {"_type": "root"}, "signatures": []}', "[" * 5000, "\ud800"],
)
@pytest.mark.parametrize("name", ["1.root.json", "1.targets.json", "anna.pub.json"])
def test_wrong_json_is_an_error_that_names_the_file(world: World, name: str, content: str) -> None:
    world.first()
    (world.path / name).write_bytes(content.encode(errors="surrogatepass"))
    step = ["rotate-root", "--add", "anna"] if name == "anna.pub.json" else ["show"]
    with pytest.raises(CommandError, match=rf"{name}.*\[malformed_(role|key)\]"):
        world.run(*step)


def test_targets_in_the_place_of_root_are_refused(world: World) -> None:
    world.first()
    shutil.copy(world.path / "1.targets.json", world.path / "1.root.json")
    assert refused(lambda: world.run("show")) == "malformed_role"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("1.root.json", lambda content: content["signed"].update(extra=1)),
        ("1.root.json", lambda content: content["signed"].update(consistent_snapshot=False)),
        ("1.root.json", lambda content: content["signed"]["roles"]["root"].update(extra=1)),
        ("1.root.json", lambda content: content["signed"]["x-names"].update(beef="ghost")),
        ("1.root.json", lambda content: content["signed"].update({"x-names": ["anna"]})),
        ("1.root.json", lambda content: next(iter(content["signed"]["keys"].values())).update(extra=1)),
        ("1.root.json", lambda content: content["signed"]["roles"]["snapshot"].update(
            keyids=content["signed"]["roles"]["root"]["keyids"][:1])),
        ("1.root.json", lambda content: content["signed"]["keys"].update(
            ghost=next(iter(content["signed"]["keys"].values())))),
        ("1.root.json", lambda content: content.update(extra=1)),
        ("1.targets.json", lambda content: content["signed"]["targets"].update(
            {"a/1/b": {"length": 1, "hashes": {"sha256": "00"}}})),
        ("1.targets.json", lambda content: content["signed"]["delegations"]["roles"][0].update(paths=["*"])),
        ("1.targets.json", lambda content: content["signed"]["delegations"]["roles"][0].update(terminating=False)),
        ("1.targets.json", lambda content: content["signed"]["delegations"].update(roles=[])),
        ("1.targets.json", lambda content: content["signed"].pop("delegations")),
    ],
)  # fmt: skip
def test_what_nobody_would_be_shown_is_not_signed(world: World, name: str, change: Any) -> None:
    world.init()
    world.edit(name, change)
    assert refused(lambda: world.sign("anna")).startswith("malformed")


def test_one_key_under_two_ids_counts_once(world: World) -> None:
    """Upper-case hex is the same key, and would be a second signature."""
    world.first()
    twin = {"keyid": "f" * 64, **world.public("anna").to_dict()}
    twin["keyval"] = {"public": twin["keyval"]["public"].upper()}
    (world.path / "twin.pub.json").write_text(json.dumps(twin))
    assert refused(lambda: world.run("rotate-root", "--add", "twin")) == "same_key_twice"

    def plant(content: dict[str, Any]) -> None:
        keyid = twin.pop("keyid")
        content["signed"]["keys"][keyid] = twin
        content["signed"]["roles"]["root"]["keyids"].append(keyid)

    world.edit("1.root.json", plant)
    assert refused(lambda: world.run("show")) == "same_key_twice"


def test_two_keys_never_have_one_name(world: World) -> None:
    world.first()
    imposter = World(world.folder / "imposter")
    imposter.people("anna")
    source = imposter.path / "anna.pub.json"
    assert refused(lambda: world.run("rotate-root", "--add", str(source))) == "name_taken"
    assert refused(lambda: imposter_public(world, source)) == "name_taken"


def imposter_public(world: World, source: Path) -> None:
    """An export must not pass another key off under a name that the root knows."""
    shutil.copy(source, world.path / "anna.pub.json")
    named = next(item for item in ceremony.public_keys(ceremony.read(Stick(world.path))) if item.name == "anna")
    try:
        Stick(world.path).write_public(named)
    except FleetError as error:
        raise CommandError(f"[{error.code}]") from error


def test_an_unsigned_root_cannot_hide_what_targets_change(world: World) -> None:
    """A forged root names the attacker's targets key, so that forged targets pass for what was signed before."""
    world.first().people("mallory", "evil")
    mallory = signing.load_signer(world.key("mallory"))
    root = Metadata[Root].from_file(str(world.path / "1.root.json"))
    root.signed.version, root.signatures = 2, {}
    root.signed.add_key(mallory.public_key, "targets")
    root.to_file(str(world.path / "2.root.json"))
    world.run("set-model", "digits", "--key", "evil")
    forged = Metadata[Targets].from_file(str(world.path / "2.targets.json"))
    forged.sign(mallory)
    forged.to_file(str(world.path / "2.targets.json"))
    forged.signed.version, forged.signatures = 3, {}
    forged.to_file(str(world.path / "3.targets.json"))
    assert refused(lambda: world.sign("dora")) == "bad_signature"
    (world.path / "2.targets.json").unlink()
    assert refused(lambda: world.sign("dora")) == "no_such_file"


def test_a_power_cut_leaves_the_old_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.init()
    before = {path.name: path.read_bytes() for path in world.path.iterdir()}

    def cut(*_: object) -> None:
        raise OSError(5, "power cut")

    monkeypatch.setattr(sticks.os, "replace", cut)
    assert refused(lambda: world.sign("anna")) == "stick_failed"
    assert {path.name: path.read_bytes() for path in world.path.iterdir()} == before


def test_the_ceremony_needs_no_settings_no_database_and_no_folder_of_its_own(world: World) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "DJANGO_SETTINGS_MODULE": "no.such.settings",
        "FLEET_VAR": str(world.folder / "never"),
    }
    command = [sys.executable, str(TOP / "manage.py"), "ceremony"]
    done = subprocess.run(
        [*command, "make-key", "anna", "--private", "mine", "--stick", str(world.path), "--no-passphrase"],
        cwd=world.folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (world.path / "anna.pub.json").exists()
    assert not (world.folder / "never").exists()


# --- keys ---


def test_keys_are_encrypted_unless_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = ["make-key", "anna", "--private", str(world.folder)]
    monkeypatch.delenv(signing.PASSPHRASE, raising=False)
    with pytest.raises(CommandError, match="no passphrase"):
        call_command("ceremony", *make)
    monkeypatch.setenv(signing.PASSPHRASE, "short")
    with pytest.raises(CommandError, match="at least 12"):
        call_command("ceremony", *make)
    monkeypatch.setenv(signing.PASSPHRASE, "correct-horse-battery")
    call_command("ceremony", *make)
    path = world.folder / "anna.pem"
    assert b"ENCRYPTED" in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert "correct-horse" not in capsys.readouterr().out
    with pytest.raises(CommandError, match="File exists"):
        call_command("ceremony", *make)


# --- the server ---


def test_the_first_import_sets_a_server_up(server: World) -> None:
    assert held() == [("root", 1), ("targets", 1)]
    server.people("ci")
    server.run("set-model", "digits", "--key", "ci")
    server.sign("emil")
    assert "+ model digits: key ci" in server.take()
    assert Model.objects.get().name == "digits"
    view = services.current_view(make_device(), [Assignment("digits")])
    root = Metadata[Root].from_bytes(selectors.root_text().encode()).signed
    snapshot = Metadata[Snapshot].from_bytes(view.snapshot.encode())
    root.verify_delegate("snapshot", snapshot.signed_bytes, snapshot.signatures)


def test_the_same_stick_twice_changes_nothing(server: World) -> None:
    before = list(RoleMetadata.objects.values())
    assert server.take() == "Nothing new: the server holds all of this.\n"
    assert list(RoleMetadata.objects.values()) == before


def test_ten_roots_and_two_keys_at_once_come_in_by_one_import(server: World) -> None:
    server.people("frida", "gustav")
    for _ in range(9):
        server.run("renew", "root")
        server.sign("anna", "carla")
    server.run("rotate-root", "--remove", "anna", "--remove", "boris", "--add", "frida", "--add", "gustav")
    server.sign("anna", "boris", "frida", "gustav")
    server.take()
    assert held() == [*(("root", version) for version in range(1, 12)), ("targets", 1)]


def test_a_root_signed_by_too_few_changes_nothing(server: World) -> None:
    server.people("frida", "gustav")
    server.run("rotate-root", "--remove", "anna", "--remove", "boris", "--add", "frida", "--add", "gustav")
    server.sign("frida", "gustav")  # enough of the new keys, none of the old
    assert refused(server.take) == "bad_signature"
    server.sign("anna")
    assert refused(server.take) == "bad_signature"
    assert held() == [("root", 1), ("targets", 1)]


def test_a_root_in_the_middle_signed_by_too_few_is_refused(server: World) -> None:
    for _ in range(2):
        server.run("renew", "root")
        server.sign("anna", "boris")
    server.edit("2.root.json", lambda content: content["signatures"].pop())
    assert refused(server.take) == "bad_signature"
    assert refused(lambda: server.run("show")) == "bad_signature"
    assert held() == [("root", 1), ("targets", 1)]


def test_a_gap_in_the_roots_is_refused(server: World) -> None:
    for _ in range(2):
        server.run("renew", "root")
        server.sign("anna", "boris")
    (server.path / "2.root.json").unlink()
    assert refused(server.take) == "root_gap"
    assert refused(lambda: server.run("show")) == "root_gap"


def test_a_file_that_lies_about_its_version_is_refused(server: World) -> None:
    shutil.copy(server.path / "1.root.json", server.path / "2.root.json")
    assert refused(server.take) == "wrong_version"


def test_another_fleets_stick_is_refused(server: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = World(tmp_path_factory.mktemp("other")).first()
    other.run("renew", "root")
    other.sign("anna", "boris")
    assert refused(other.take) == "forked"
    assert held() == [("root", 1), ("targets", 1)]


def test_an_older_stick_is_refused(server: World, tmp_path: Path) -> None:
    old = World(tmp_path / "old")
    for name in ("1.root.json", "1.targets.json"):
        shutil.copy(server.path / name, old.path / name)
    server.run("renew", "targets")
    server.sign("dora")
    server.take()
    assert refused(old.take) == "rollback"
    server.run("renew", "root")
    server.sign("anna", "boris")
    server.take()
    assert refused(old.take) == "rollback"


def test_another_version_of_the_same_number_is_refused(server: World) -> None:
    kept = server.folder / "kept.json"
    server.run("renew", "targets")
    shutil.copy(server.path / "2.targets.json", kept)
    server.sign("dora")
    server.take()
    shutil.copy(kept, server.path / "2.targets.json")
    server.edit("2.targets.json", lambda content: content["signed"].update(expires="2040-01-01T00:00:00Z"))
    server.sign("dora")
    assert refused(server.take) == "forked"


@pytest.mark.parametrize("role", ["root", "targets"])
def test_what_has_expired_is_refused(server: World, role: str) -> None:
    server.run("renew", role, "--days", "-1")
    server.sign(*(("anna", "boris") if role == "root" else ("dora",)))
    assert "EXPIRED" in server.run("show")
    assert refused(server.take) == "role_expired"
    assert held() == [("root", 1), ("targets", 1)]


def test_all_or_nothing_of_a_stick_is_taken(server: World) -> None:
    server.people("online-2")
    server.run("set-online", "online-2")
    server.sign("anna", "boris")
    assert refused(server.take) == "bad_signature"  # targets 2 is not signed
    (server.path / "2.targets.json").unlink()
    assert refused(server.take) == "online_mismatch"
    assert held() == [("root", 1), ("targets", 1)]


def test_new_targets_keys_must_sign_targets(server: World) -> None:
    server.people("frida")
    server.run("set-targets", "--remove", "dora", "--remove", "emil", "--add", "frida")
    server.sign("anna", "boris")
    assert refused(lambda: server.sign("dora")) == "no_say"
    assert refused(server.take) == "bad_signature"
    server.sign("frida")
    server.take()
    assert held() == [("root", 1), ("root", 2), ("targets", 1), ("targets", 2)]


def test_signatures_without_a_say_are_not_stored(server: World) -> None:
    server.people("mallory")
    server.run("renew", "targets")
    metadata = Metadata[Targets].from_file(str(server.path / "2.targets.json"))
    metadata.sign(signing.load_signer(server.key("mallory")), append=True)
    metadata.sign(signing.load_signer(server.key("dora")), append=True)
    metadata.to_file(str(server.path / "2.targets.json"))
    server.take()
    stored = Metadata[Targets].from_bytes(RoleMetadata.objects.get(role="targets", version=2).content.encode())
    assert set(stored.signatures) == {server.public("dora").keyid}


def test_the_next_ceremony_starts_from_an_export(server: World) -> None:
    server.run("renew", "root")
    server.sign("anna", "boris")
    server.take()
    shutil.rmtree(server.path)
    server.path.mkdir()
    out = StringIO()
    call_command("trust_export", str(server.path), stdout=out)
    assert sorted(path.name for path in server.path.iterdir()) == sorted(
        ["1.root.json", "2.root.json", "1.targets.json", "online.pub.json"]
        + [f"{name}.pub.json" for name in (*ROOTS, *TARGETS_KEYS)]
    )
    call_command("trust_export", str(server.path), stdout=out)
    assert "has all of it already" in out.getvalue()
    server.run("rotate-root", "--remove", "anna", "--threshold", "1")
    with pytest.raises(CommandError, match="stick_is_ahead"):
        call_command("trust_export", str(server.path))
    server.sign("boris", "carla")
    server.take()
    assert held() == [("root", 1), ("root", 2), ("root", 3), ("targets", 1)]


def test_a_ci_key_that_is_replaced_tells_what_ci_has_to_do(server: World) -> None:
    server.people("ci", "ci-2")
    server.run("set-model", "digits", "--key", "ci")
    server.sign("dora")
    server.take()
    role = Metadata(Targets(expires=datetime.now(UTC).replace(microsecond=0) + timedelta(days=9)))
    role.signed.targets["digits/1.0.0/x"] = TargetFile(1, {"sha256": "a" * 64}, "digits/1.0.0/x")
    role.sign(signing.load_signer(server.key("ci")))
    services.accept_role("digits", role.to_bytes())
    server.run("set-model", "digits", "--key", "ci", "--key", "ci-2")
    server.sign("dora")
    assert "fleet-publish renew" not in server.take()
    server.run("set-model", "digits", "--key", "ci-2")
    server.sign("dora")
    assert "fleet-publish renew --model digits" in server.take()


def test_a_removed_model_stays_in_every_snapshot(server: World) -> None:
    server.people("ci")
    server.run("set-model", "digits", "--key", "ci")
    server.sign("dora")
    server.take()
    role = Metadata(Targets(expires=datetime.now(UTC).replace(microsecond=0) + timedelta(days=9)))
    role.sign(signing.load_signer(server.key("ci")))
    services.accept_role("digits", role.to_bytes())
    server.run("remove-model", "digits")
    server.sign("dora")
    assert "- model digits: no longer exists" in server.take()
    assert not selectors.is_delegated("digits")
    assert [ref.role for ref in selectors.snapshot_roles()] == ["digits", "targets"]


# --- the online key, and roots that must reach devices ---


def test_a_new_root_makes_a_new_view_at_the_next_poll(server: World) -> None:
    device, assignments = make_device(), [Assignment("digits")]
    first = services.current_view(device, assignments)
    assert services.current_view(device, assignments).version == first.version
    server.run("renew", "root")
    server.sign("anna", "boris")
    server.take()
    second = services.current_view(device, assignments)
    assert second.version > first.version
    assert "root.json" not in second.snapshot


def test_an_online_key_is_changed_without_a_gap(server: World, settings: Any) -> None:
    """The next key is set first; importing the root is the change; then the settings are cleaned up."""
    device, assignments = make_device(), [Assignment("digits")]
    server.people("online-2")
    settings.NEXT_ONLINE_KEY_URI = server.key("online-2")
    settings.NEXT_ONLINE_KEY_PUBLIC = server.folder / "online-2" / "online-2.pub.json"
    assert signer_of(services.current_view(device, assignments)) == server.public("online").keyid
    server.run("set-online", "online-2")
    server.sign("anna", "boris", "dora")
    server.take()
    assert signer_of(services.current_view(device, assignments)) == server.public("online-2").keyid
    assert [found.id for found in checked()] == ["fleet.W008"]
    settings.ONLINE_KEY_URI, settings.ONLINE_KEY_PUBLIC = settings.NEXT_ONLINE_KEY_URI, settings.NEXT_ONLINE_KEY_PUBLIC
    settings.NEXT_ONLINE_KEY_URI = ""
    assert signer_of(services.current_view(device, assignments)) == server.public("online-2").keyid
    assert checked() == []


def test_a_server_without_the_key_that_root_names_says_what_to_do(server: World) -> None:
    server.people("online-2")
    server.run("set-online", "online-2")
    server.sign("anna", "boris", "dora")
    server.take()
    with pytest.raises(Unavailable, match=f"Set FLEET_ONLINE_KEY_URI .*{server.public('online-2').keyid}") as caught:
        services.current_view(make_device(), [Assignment("digits")])
    assert caught.value.code == "bad_online_key"
    assert [found.id for found in checked()] == ["fleet.W007"]


def test_a_next_key_that_does_not_work_is_told_before_it_is_needed(server: World, settings: Any) -> None:
    settings.NEXT_ONLINE_KEY_URI = server.key("anna")
    settings.NEXT_ONLINE_KEY_PUBLIC = server.path / "boris.pub.json"
    found = [item for item in run_checks(tags=["security"]) if item.id == "fleet.E003"]
    assert len(found) == 1
    assert "FLEET_NEXT_ONLINE_KEY_URI" in str(found[0].hint)


def test_a_key_file_that_is_replaced_is_not_kept_in_memory(server: World) -> None:
    """The same URI and the same public half, another private key: its signatures would be refused by every device."""
    keys.online_signer()
    path = Path(server.key("online"))
    path.unlink()
    signing.write_private(path, CryptoSigner.generate_ed25519().private_bytes)
    with pytest.raises(Unavailable, match="is not the private half"):
        keys.online_signer()


def signer_of(view: Any) -> str:
    (signature,) = json.loads(view.timestamp)["signatures"]
    keyid: str = signature["keyid"]
    return keyid


def checked() -> list[Any]:
    found = run_checks(tags=["database"], databases=["default"], include_deployment_checks=False)
    return [item for item in found if item.id in {"fleet.W007", "fleet.W008"}]
