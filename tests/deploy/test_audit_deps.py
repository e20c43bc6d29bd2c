"""The check of the locked packages finds what it is for, and says so when it could ask nobody."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy import audit_deps
from tests.sdk.loopback import Asked, Reply, loopback

HASH = "    --hash=sha256:" + "a" * 64
GOOD = f"# by uv\nattrs==25.1.0 \\\n{HASH}\ndjango==5.2.19 ; python_full_version >= '3.11' \\\n{HASH}\n"


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def audit(*locks: str, answer: Reply | None = None) -> tuple[int, str]:
        for index, lock in enumerate(locks):
            (tmp_path / f"{index}.txt").write_text(lock)

        def honest(asked: Asked) -> Reply:
            return Reply(body=json.dumps({"results": [{} for _ in json.loads(asked.body)["queries"]]}).encode())

        with loopback() as server:
            server.on("/v1/querybatch", answer or honest)
            code = audit_deps.main(["--locks", str(tmp_path), "--url", f"{server.url}/v1/querybatch"])
        return code, capsys.readouterr().out

    return audit


def test_our_own_locks_are_pinned_hashed_and_above_every_known_floor() -> None:
    found = [pin for lock in sorted(audit_deps.ROOT.glob("requirements/*.txt")) for pin in audit_deps.pins(lock)]
    floors = json.loads((audit_deps.ROOT / "requirements" / "advisories.json").read_bytes())["floors"]
    assert {pin.lock for pin in found} == {"demo.txt", "device.txt", "server.txt", "test.txt"}
    assert list(audit_deps.offline_findings(found, floors)) == []
    assert {floor["package"] for floor in floors} <= {pin.package for pin in found}
    assert all(floor["ids"] and floor["source"] for floor in floors)


def test_clean_locks_and_a_database_that_knows_of_nothing_are_clean(audit: Callable[..., tuple[int, str]]) -> None:
    code, said = audit(GOOD)
    assert (code, said.splitlines()[0]) == (audit_deps.CLEAN, "no findings")
    assert "was asked" in said


@pytest.mark.parametrize(
    ("locks", "says"),
    [
        (["attrs==25.1.0\n"], "has no hash"),
        ([f"attrs>=25.1.0 \\\n{HASH}\n"], "expected package==version"),
        (["attrs @ git+https://example.org/attrs\n"], "expected package==version"),
        ([GOOD, GOOD.replace("25.1.0", "25.2.0")], "the locks differ"),
        ([GOOD.replace("5.2.19", "5.2.8")], "below 5.2.17"),
    ],
)
def test_a_lock_that_is_not_good_is_found(audit: Callable[..., tuple[int, str]], locks: list[str], says: str) -> None:
    code, said = audit(*locks)
    assert code == audit_deps.FOUND
    assert says in said


def test_what_the_database_knows_is_a_finding(audit: Callable[..., tuple[int, str]]) -> None:
    answer = Reply(body=json.dumps({"results": [{}, {"vulns": [{"id": "PYSEC-2026-1"}]}]}).encode())
    code, said = audit(GOOD, answer=answer)
    assert code == audit_deps.FOUND
    assert "django 5.2.19: PYSEC-2026-1" in said


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"results": []}', b'{"results": [{}, {"vulns": [{}]}]}'])
def test_a_database_that_gives_no_answer_is_said_to_have_given_none(
    audit: Callable[..., tuple[int, str]], body: bytes
) -> None:
    code, said = audit(GOOD, answer=Reply(body=body))
    assert code == audit_deps.NOT_ASKED
    assert "NOBODY WAS ASKED" in said


def test_without_a_network_the_rest_is_checked_all_the_same(audit: Callable[..., tuple[int, str]]) -> None:
    assert audit(GOOD, answer=Reply(503))[0] == audit_deps.NOT_ASKED
    assert audit("attrs==25.1.0\n", answer=Reply(503))[0] == audit_deps.FOUND
