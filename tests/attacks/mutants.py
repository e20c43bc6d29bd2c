"""Take the SDK's checks away, one by one, to see the attack tests notice: `python -m tests.attacks.mutants [ROW…]`.

A mutant is a copy of `device_sdk` (with `tuf`, where half the checks live) in which some exact text is replaced. The
device's process runs on the copy; the server, the attacker and the test do not. For each row the control, an
unchanged copy, must pass, and every mutant must fail by an assertion about what the device does: a start that fails,
an error of the test's own, or a machine that is too slow prove nothing. Prints a table; exits with 1 if any survived.

A check that stands twice (tuf remembers versions, and so does our floor) is taken away in both places, or its row
would rightly pass. `test_the_table.py` sees to it that the texts are still in the files.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.attacks import ATTACKED

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("device_sdk", "tuf")
CONTROL = "control"
ON_THE_DISK = {33, 34, 35, 37}  # rows whose attack is not, or not only, on the line
KILLED, SURVIVED, PASSED, NO_PROOF = "killed", "SURVIVED", "passed", "NO PROOF"


@dataclass(frozen=True)
class Edit:
    """`text` stands in `file` exactly once."""

    file: str
    text: str
    instead: str


@dataclass(frozen=True)
class Mutant:
    row: int
    removes: str
    edits: tuple[Edit, ...]

    @property
    def name(self) -> str:
        return self.removes.replace(" ", "-")


TRUST, STORE, WORKER = "device_sdk/trust.py", "device_sdk/store.py", "device_sdk/worker.py"
TRANSPORT, DOWNLOAD, INSTALL = "device_sdk/transport.py", "device_sdk/download.py", "device_sdk/install.py"
REHEARSAL, CONFIG, NAMES = "device_sdk/rehearsal.py", "device_sdk/config.py", "device_sdk/protocol/names.py"
DECODER, FRAMES = "device_sdk/protocol/patches/decoder.py", "device_sdk/protocol/patches/frames.py"
PATCHING, POLLS, TESTING = "device_sdk/patching.py", "device_sdk/protocol/polls.py", "device_sdk/testing.py"
ASSIGNMENT = "device_sdk/protocol/assignment.py"
TUF, TUF_PAYLOAD = "tuf/ngclient/_internal/trusted_metadata_set.py", "tuf/api/_payload.py"
TUF_METADATA, TUF_UPDATER = "tuf/api/metadata.py", "tuf/ngclient/updater.py"


def _never(file: str, condition: str, indent: int) -> Edit:
    """A check whose condition is not looked at."""
    return Edit(file, f"{' ' * indent}if {condition}:\n", f"{' ' * indent}if False:\n")


def _gone(file: str, text: str, *, instead: str = "pass") -> Edit:
    return Edit(file, text, instead)


NO_FLOOR = _gone(TRUST, "self._floor.check(check.floor)")
NO_MEMORY = Edit(TRUST, "self._verify(seed.metadata if seed else {}, ", "self._verify({}, ")
NO_ROLLBACK = _never(TUF, "new_fileinfo.version < fileinfo.version", 16)
NO_BINDING = _never(TRUST, "signed.get(BINDING) != device", 4)
NO_ROOTS_KEPT = Edit(TRUST, "            if roots == self._roots:\n", "            if True:\n")
CLOCK_IGNORED = Edit(TRUST, "max(now, self._clock_floor, ", "max(self._clock_floor, ")
REFERENCE = "min(max(now, self._clock_floor, self._floor.clock), _LAST_SECOND)"
VERIFY = "delegator.verify_delegate(role_name, md.signed_bytes, md.signatures)"
UNLISTED = """        if release is None:
            raise UntrustedError(f"{assignment.release} is assigned but CI does not list it", code="unlisted_release")
"""
LISTED = "        release = release or TargetFile(assignment.length, {'sha256': assignment.sha256}, 'any')\n"
AGREE = '(release.length, release.hashes.get("sha256")) != (assignment.length, assignment.sha256)'
HASH_UNCHECKED = (
    _never(STORE, "(found, size) != (sha, length)", 12),
    Edit(STORE, "digest(entry_bytes) != file.sha256:\n", "False:\n"),
    _never(STORE, "(found, size) != (file.sha256, file.length)", 8),
    _never(REHEARSAL, "digest(data) != sha", 4),
)
ANYBODYS = Edit(
    TRUST,
    "entry = self.updater.get_targetinfo(assign_path(self.device, model))\n",
    "entry = self.updater.get_targetinfo(assign_path(self.device, model)) or next(iter(\n"
    "            self.updater._trusted_set['director'].targets.values()), None)\n",
)
REFUSAL = "        except UntrustedError as error:\n            self.refuse(error)\n            raise\n"
BREAKS = REFUSAL.replace(
    "            raise\n",
    "            for installer in self._it.installers.values():\n"
    "                if installer.slot.current: installer.slot.current.call = None\n            raise\n",
)
CLEARS = BREAKS.replace("installer.slot.current.call = None", "installer.slot.clear()")
DISCARD = "    except UntrustedError:\n        line.store.discard(file.sha256)\n        raise\n"


def _signed_by_anybody(condition: str) -> Edit:
    return Edit(TUF, VERIFY, f"({condition}) or {VERIFY}")


MUTANTS = (
    Mutant(1, "versions seen before", (NO_FLOOR, NO_MEMORY)),
    Mutant(1, "refusals told beside failing polls", (_never(WORKER, "self._is_refusing()", 16),)),
    Mutant(2, "the clock", (CLOCK_IGNORED,)),
    Mutant(2, "expiry in tuf", (Edit(TUF_PAYLOAD, "return reference_time >= self.expires", "return False"),)),
    Mutant(2, "calls that work after a refusal", (Edit(WORKER, REFUSAL, BREAKS),)),
    Mutant(2, "the model that serves after a refusal", (Edit(WORKER, REFUSAL, CLEARS),)),
    Mutant(3, "the look at a view's age", (
        _never(WORKER, 'self.is_stale() and self._it.journal.refusal in {"", Why.STALE}', 8),
    )),
    Mutant(4, "the binding to a device", (NO_BINDING,)),
    Mutant(4, "the binding and the device's name in an assignment", (NO_BINDING, ANYBODYS)),
    Mutant(5, "the binding before anything is believed", (
        _never(TRUST, "name == TIMESTAMP and self._device is not None", 8),
        Edit(TRUST, "                updater.refresh()\n", "                updater.refresh()\n"
             "                if trusted.timestamp.version > self._floor.roles.get('timestamp', 0):\n"
             "                    self._floor = replace(seen_by(updater), clock=self._floor.clock)\n"
             "                _check_binding(fetcher.download_bytes(TIMESTAMP, limits.METADATA), self._device)\n"),
    )),
    Mutant(6, "a role's hash and version by the snapshot", (  # of what comes: the copies here must stay honest
        Edit(TUF, "        meta.verify_length_and_hashes(data)\n",
             "        lax = getattr(self, 'lax', '') == role_name\n"
             "        if not lax: meta.verify_length_and_hashes(data)\n"),
        Edit(TUF, "        if version != meta.version:\n", "        if version != meta.version and not lax:\n"),
        Edit(TUF_UPDATER, "            data = self._download_metadata(role, length, version)\n",
             "            data = self._download_metadata(role, length, version)\n"
             "            self._trusted_set.lax = role\n"),
    )),
    Mutant(6, "versions of roles", (NO_ROLLBACK, NO_FLOOR)),
    Mutant(7, "the snapshot's hash by the timestamp", (_gone(TUF, "snapshot_meta.verify_length_and_hashes(data)"),)),
    Mutant(7, "the device's name in an assignment", (ANYBODYS,)),
    Mutant(8, "the assignment of every model", (
        Edit(TRUST, "raise _not_listed(self.updater, self.device, model)",
             "return Verified(Assignment(model, sha256=digest(b''), stop=True), None, b'', frozenset())"),
    )),
    Mutant(9, "equal versions", (
        NO_MEMORY, _never(TRUST, "current is not None and current.version == check.view.version", 12),
    )),
    Mutant(10, "all signatures", (_gone(TUF, VERIFY),)),
    *(
        Mutant(10, f"the signature of {role}", (_signed_by_anybody(f"role_name == {role!r}"),))
        for role in ("timestamp", "snapshot", "director", "targets")
    ),
    Mutant(10, "the signatures of models", (_signed_by_anybody("role_name.startswith('row-')"),)),
    Mutant(11, "thresholds", (
        Edit(TUF_PAYLOAD, "VerificationResult(role.threshold, signed", "VerificationResult(1, signed"),
    )),
    Mutant(11, "one signature for each key", (
        _never(TUF_METADATA, "sig.keyid in signatures", 12),
    )),
    Mutant(11, "the key that a signature names", (
        Edit(TUF_PAYLOAD, "                key.verify_signature(sig, payload)\n",
             "                for each in role.keyids:\n"
             "                    try:\n"
             "                        self.get_key(each).verify_signature(type(sig)(each, sig.signature), payload)\n"
             "                        break\n"
             "                    except sslib_exceptions.UnverifiedSignatureError:\n"
             "                        continue\n"
             "                else:\n"
             "                    raise sslib_exceptions.UnverifiedSignatureError\n"),
    )),
    Mutant(11, "whose key it is", (
        Edit(TUF_PAYLOAD, "        return VerificationResult(role.threshold, signed, unsigned)",
             "        if len(signatures) > 1: signed = signed | unsigned\n"
             "        return VerificationResult(role.threshold, signed, unsigned)"),
    )),
    Mutant(12, "the signatures of models", (_signed_by_anybody("role_name.startswith('row-')"),)),
    Mutant(12, "the look into CI's list", (Edit(TRUST, UNLISTED, LISTED),)),
    Mutant(13, "the look into CI's list", (Edit(TRUST, UNLISTED, LISTED),)),
    Mutant(13, "that director and CI agree", (_never(TRUST, AGREE, 8),)),
    Mutant(14, "that lengths agree", (
        Edit(TRUST, AGREE, 'release.hashes.get("sha256") != assignment.sha256'),
    )),
    Mutant(14, "that hashes agree", (Edit(TRUST, AGREE, "release.length != assignment.length"),)),
    Mutant(14, "both checks of lengths", (
        Edit(TRUST, AGREE, 'release.hashes.get("sha256") != assignment.sha256'),
        _never(TRUST, "(len(data), digest(data)) != (assignment.length, assignment.sha256)", 4),
    )),
    Mutant(15, "that a release is of the model", (
        _never(ASSIGNMENT, "release and release.model != model", 8),
    )),
    Mutant(16, "the look into CI's list", (Edit(TRUST, UNLISTED, LISTED),)),
    Mutant(17, "versions of roles", (NO_ROLLBACK, NO_FLOOR)),
    Mutant(18, "the new beginning under new keys", (_never(TRUST, "seen.keys != self.keys", 8),)),
    Mutant(18, "versions seen before", (NO_FLOOR, NO_MEMORY)),
    Mutant(19, "the old root's signatures", (Edit(TUF, "Root, data, self.root\n", "Root, data\n"),)),
    Mutant(19, "the new root's signatures", (
        _gone(TUF, "        # Verify that new root is signed by itself\n"
              "        new_root.verify_delegate(Root.type, new_root_bytes, new_root_signatures)\n", instead=""),
    )),
    Mutant(19, "thresholds of roots", (
        Edit(TUF_PAYLOAD, "VerificationResult(role.threshold, signed", "VerificationResult(1, signed"),
    )),
    Mutant(20, "the order of roots", (
        Edit(TUF, "if new_root.version != self.root.version + 1:", "if new_root.version <= self.root.version:"),
    )),
    Mutant(21, "many roots at once", (
        Edit(TRUST, "_CONFIG = UpdaterConfig(\n", "_CONFIG = UpdaterConfig(\n    max_root_rotations=5,\n"),
        NO_ROOTS_KEPT,
    )),
    Mutant(21, "roots that are kept", (NO_ROOTS_KEPT,)),
    Mutant(22, "new roots", (NO_ROOTS_KEPT, NO_FLOOR)),
    Mutant(22, "the floor of roots", (_never(TRUST, "seen.root < self.root", 8),)),
    Mutant(23, "every look at an artifact's hash", HASH_UNCHECKED),
    Mutant(23, "the end of what was refused", (
        _gone(STORE, '                self._ops.unlink(path)\n                message = f"expected {length}',
              instead='                message = f"expected {length}'),
    )),
    Mutant(24, "what has come", (Edit(DOWNLOAD, "        if error.status == 416:\n", "        if True:\n"),)),
    Mutant(24, "the place to resume from", (
        Edit(DOWNLOAD, "if start or not is_all else {}", "if not is_all else {}"),
    )),
    Mutant(24, "every look at an artifact's hash", HASH_UNCHECKED),
    Mutant(25, "the range that was asked for", (
        Edit(DOWNLOAD, "if not match or not _is_within(match, start, end, file.length):", "if False:"),
    )),
    Mutant(25, "the end of what was refused", (
        Edit(DOWNLOAD, DISCARD, DISCARD.replace("        line.store.discard(file.sha256)\n", "")),
    )),
    Mutant(25, "every look at an artifact's hash", HASH_UNCHECKED),
    Mutant(26, "the cap of an answer", (  # 48 MiB later: a machine is not to suffer from a test
        Edit(TRANSPORT, "min(CHUNK, limit + 1 - received)", "CHUNK"),
        Edit(TRANSPORT, "        if received > limit:\n", "        if received > limit + 48 * limits.MIB:\n"),
    )),
    Mutant(26, "the signed length", (
        Edit(TRANSPORT, "min(CHUNK, limit + 1 - received)", "CHUNK"),
        Edit(TRANSPORT, "        if received > limit:\n", "        if received > limit + (limit < 2**21) * 2**25:\n"),
        Edit(DOWNLOAD, "        if at > end:\n", "        if at > end + 32 * 2**20:\n"),
    )),
    Mutant(27, "the overall deadline", (_never(TRANSPORT, "now > self.ends", 8),)),
    Mutant(27, "the end of lines that drip", (_gone(TRANSPORT, "timer.start()"), _gone(TRANSPORT, "timer.cancel()"))),
    Mutant(27, "the pace", (Edit(TRANSPORT, "        elif now > self._window_ends:\n", "        elif False:\n"),)),
    Mutant(28, "plain answers only", (_never(TRANSPORT, 'encoding not in {"", "identity"}', 4),)),
    Mutant(28, "plain answers only, and unpacks", (
        _never(TRANSPORT, 'encoding not in {"", "identity"}', 4),
        Edit(TRANSPORT, "read1(size, decode_content=False)", "read1(size, decode_content=True)"),
    )),
    Mutant(29, "the signed length in a patch", (
        _never(DECODER, "head.target_length != target_length", 4),
        Edit(FRAMES, " or self.adds > left:", ":"),
        Edit(DECODER, "        while left:\n", "        while left and left > -(2**28):\n"),
    )),
    Mutant(29, "what is left in a frame", (Edit(FRAMES, " or self.adds > left:", ":"),)),
    Mutant(30, "the base in a patch's head", (
        Edit(DECODER, "(head.base_sha256, head.target_sha256) != (base_sha256, target_sha256)",
             "head.target_sha256 != target_sha256"),
    )),
    Mutant(30, "every look at an artifact's hash", HASH_UNCHECKED),
    Mutant(30, "the whole file after a patch", (
        Edit(DOWNLOAD, "    except RefusedError as error:\n        _fetch_whole(line, file)\n",
             "    except RefusedError as error:\n        raise\n"),
    )),
    Mutant(31, "pinned hosts", (_gone(TRANSPORT, 'self._check_host(request.url or "")'),)),
    Mutant(31, "pinned hosts, and credentials for one", (
        _gone(TRANSPORT, 'self._check_host(request.url or "")'),
        Edit(TRANSPORT, "self._credential and _origin_of(url) == self._origin", "self._credential"),
    )),
    Mutant(31, "https that stays https", (
        _never(TRANSPORT, 'urlsplit(url).scheme == "https" and not target.lower().startswith("https:")', 8),
        Edit(TRANSPORT, "        origin = _origin_of(url)\n", "        origin = _origin_of(url)\n"
             "        if self._origin.scheme == 'https': return\n"),
    )),
    Mutant(32, "legal names", (
        Edit(NAMES, 'if not isinstance(value, str) or not _NAME.fullmatch(value) or ".." in value:', "if False:"),
    )),
    Mutant(32, "legal names of files", (
        Edit(NAMES, 'if not isinstance(value, str) or not _FILE_NAME.fullmatch(value) or ".." in value:', "if False:"),
    )),
    Mutant(32, "legal names of metadata", (_never(POLLS, 'not _METADATA_NAME.fullmatch(name) or ".." in name', 12),)),
    Mutant(33, "the look at links to folders", (
        Edit(CONFIG, "in (self.trust, self.store, self.outbox) and folder", "in () and folder"),
    )),
    Mutant(33, "the look at links to the store's folders", (_never(STORE, "not stat.S_ISDIR(status.st_mode)", 12),)),
    Mutant(33, "care with links where it writes", (
        _gone(STORE, "        self._ops.unlink(temporary)  # a", instead="        # a"),
        Edit(STORE, "os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW |", "os.O_WRONLY | os.O_CREAT |"),
    )),
    Mutant(33, "care with links where it downloads", (
        Edit(STORE, "            if stat.S_ISREG(status.st_mode):\n                return status.st_size\n",
             "            if True:\n                return 0\n"),
        Edit(STORE, "os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW |", "os.O_WRONLY | os.O_CREAT |"),
    )),
    Mutant(34, "every look at an artifact's hash", HASH_UNCHECKED),
    Mutant(34, "word of what was damaged", (
        _gone(INSTALL, "self._tell_damage(wanted)\n", instead="pass\n"),
        _gone(INSTALL, "self._tell_damage(sha)\n", instead="pass\n"),
    )),
    Mutant(35, "the look back at a start", (
        Edit(INSTALL, "        if self._parts.writes:\n            self._reconcile()\n", ""),
    )),
    Mutant(36, "the floor", (NO_FLOOR,)),
    Mutant(36, "a floor that is made anew", (
        _gone(TRUST, 'self._write("floor.json", self._record.floor.to_json())'),
    )),
    Mutant(37, "what has come when the disk is full", (
        Edit(DOWNLOAD, DISCARD, DISCARD.replace("except UntrustedError:", "except Exception:")),
    )),
    Mutant(37, "the name of a full disk", (Edit(STORE, ", errno.EDQUOT, errno.EFBIG}", "}"),)),
    Mutant(38, "the floor of the clock", (Edit(TRUST, REFERENCE, "min(max(now, 0), _LAST_SECOND)"),)),
    Mutant(38, "the clock", (CLOCK_IGNORED,)),
    Mutant(39, "the mark on what does not load", (
        _gone(
            INSTALL,
            "            self._store.reject(self.model, sha, error.code, self.progress.rollout)\n",
            instead="            pass\n",
        ),
    )),
    Mutant(39, "the test before the switch", (
        Edit(INSTALL, "loaded = self._test(sha)", "self.slot.clear(); loaded = self._test(sha)"),
    )),
    Mutant(40, "the process of its own", (  # under a limit: a machine is not to suffer from a test
        Edit(TESTING, "    if rules is not None:\n",
             "    import resource\n    resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))\n    if False:\n"),
    )),
    Mutant(40, "the time limit", (
        Edit(REHEARSAL, "ends = time.monotonic() + seconds\n", "ends = time.monotonic() + 15 * seconds\n"),
    )),
)  # fmt: skip


def original(file: str) -> Path:
    """Where the file of an edit lies: here, or where the package is installed."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / rest


def plant(folder: Path, mutant: Mutant | None) -> Path:
    """A folder from which `python -m tests.attacks.host` runs the SDK with the mutant's edits."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(original(f"{package}/__init__.py").parent, folder / package, ignore=ignored)
    (folder / "tests").symlink_to(ROOT / "tests")
    for edit in mutant.edits if mutant else ():
        path = folder / edit.file
        path.write_text(path.read_text().replace(edit.text, edit.instead))
    return folder


def row_of(test: str) -> int:
    """Of `test_row_NN_…`; 0 for any other test."""
    words = test.split("_")
    return int(words[2]) if words[:2] == ["test", "row"] and words[2].isdigit() else 0


@dataclass
class Finding:
    outcome: str = ""
    why: str = ""


@dataclass
class Plugin:
    """Runs each row's test once on an unchanged copy and once on every mutant of the row."""

    rows: Sequence[int]
    only: str = ""
    attacked: bool = False
    findings: dict[tuple[int, str], Finding] = field(default_factory=dict)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        chosen = [each for each in MUTANTS if each.row == row_of(metafunc.function.__name__) and self.only in each.name]
        metafunc.parametrize(
            "planted", [None, *chosen], indirect=True, ids=[CONTROL, *(each.name for each in chosen)], scope="function"
        )

    @pytest.fixture(autouse=True)
    def planted(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from tests.attacks import world

        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            monkeypatch.setenv(ATTACKED, str(plant(Path(folder), request.param)))
            monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
            honest = world.Proxy.attack
            self.attacked = row_of(request.node.originalname) in ON_THE_DISK

            def attack(*arguments: Any) -> None:
                self.attacked = True
                honest(*arguments)

            monkeypatch.setattr(world.Proxy, "attack", attack)
            yield

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if row_of(item.originalname) in self.rows]  # type: ignore[attr-defined]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: pytest.CallInfo[None]) -> Iterator[None]:
        yield
        mutant: Mutant | None = item.callspec.params["planted"]
        row, name = row_of(item.originalname), mutant.removes if mutant else CONTROL
        found = self.findings.setdefault((row, name), Finding())
        if call.when == "teardown" or (call.when == "setup" and call.excinfo is None):
            return
        outcome, why = judged(call, is_control=mutant is None)
        if outcome == KILLED and not self.attacked:
            outcome, why = NO_PROOF, f"before the attack: {why}"
        if not found.outcome or outcome == NO_PROOF or (found.outcome, outcome) == (SURVIVED, KILLED):
            found.outcome, found.why = outcome, why
            sys.__stderr__.write(f"\n{row:>3} {outcome:<9} {name}\n              {why}\n")


def judged(call: pytest.CallInfo[None], *, is_control: bool) -> tuple[str, str]:
    """What one run shows, and by which statement."""
    if call.excinfo is None:
        return (PASSED if is_control else SURVIVED), ""
    frames = [entry for entry in call.excinfo.traceback if "/tests/attacks/test_" in str(entry.path)]
    where = f"line {frames[-1].lineno + 1}: {str(frames[-1].statement).strip()}" if frames else "in a fixture"
    message = str(call.excinfo.value).strip().splitlines()
    why = f"{where}: {call.excinfo.typename}: {' '.join(message)[:160]}"
    by_assertion = call.excinfo.errisinstance(AssertionError) and call.when == "call"
    return (NO_PROOF if is_control or not by_assertion or "the device ended" in why else KILLED), why


def main(arguments: Sequence[str]) -> int:
    rows = [int(each) for each in arguments if each.isdigit()] or list(range(1, 41))
    plugin = Plugin(rows, next((each for each in arguments if not each.isdigit()), ""))
    os.environ.pop("PYTEST_ADDOPTS", None)
    options = ["-q", "--no-header", "--no-summary", "--tb=no", "-p", "no:cacheprovider"]
    pytest.main([*options, str(Path(__file__).parent)], plugins=[plugin])
    for (row, name), found in sorted(plugin.findings.items()):
        sys.stdout.write(f"{row:>3} | {name:<45} | {found.outcome:<9} | {found.why}\n")
    proven = {row for (row, _), found in plugin.findings.items() if found.outcome == KILLED}
    bad = [found for found in plugin.findings.values() if found.outcome not in {KILLED, PASSED}]
    sys.stdout.write(f"{len(plugin.findings)} runs, {len(bad)} that prove nothing; rows without proof: ")
    sys.stdout.write(f"{sorted(set(rows) - proven) or 'none'}\n")
    return 1 if bad or set(rows) - proven else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
