"""The trail on a real server with several processes: nothing is lost, the chain holds, the database refuses."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from secrets import token_hex

from tests.live import LiveServer


def token(live: LiveServer, *options: str) -> str:
    return live.manage("api_token", f"audit-{token_hex(4)}", *options).strip()


def make_group(live: LiveServer, bearer: str, name: str) -> int:
    request = urllib.request.Request(
        f"{live.url}/api/v1/groups/",
        json.dumps({"name": name, "selector": ""}).encode(),
        {"Authorization": f"Bearer {bearer}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status


def test_changes_at_the_same_time_all_have_their_place(live: LiveServer) -> None:
    bearer, prefix = token(live, "--scope", "operate"), f"g{token_hex(4)}"
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda n: make_group(live, bearer, f"{prefix}-{n}"), range(40)))
    assert statuses == [201] * 40
    lines = [json.loads(line) for line in live.manage("audit", "export").splitlines()[1:]]
    mine = [line["entry"] for line in lines if line["entry"]["target"].startswith(prefix)]
    assert sorted(entry["target"] for entry in mine) == sorted(f"{prefix}-{n}" for n in range(40))
    assert {entry["actor_kind"] for entry in mine} == {"token"}
    assert {entry["address"] for entry in mine} == {"127.0.0.1"}
    assert [line["position"] for line in lines] == list(range(1, len(lines) + 1))
    assert "the audit trail holds" in live.manage("audit", "verify", "--head", live.manage("audit", "head").strip())


ATTEMPTS = """
from django.db import DatabaseError, connection, transaction
verbs = ["UPDATE {0} SET {1} = {1}", "DELETE FROM {0}"]
verbs += ["TRUNCATE {0} CASCADE"] if connection.vendor == "postgresql" else []
for table, column in [("audit_auditentry", "id"), ("audit_auditseal", "position")]:
    for verb in verbs:
        try:
            with transaction.atomic():
                connection.cursor().execute(verb.format(table, column))
            print("LET THROUGH", verb, table)
        except DatabaseError as error:
            print("refused" if "the audit trail is append-only" in str(error) else error)
"""


def test_the_database_refuses_whoever_asks(live: LiveServer) -> None:
    token(live, "--scope", "read")  # there is something to change
    told = live.manage("shell", "--verbosity", "0", "-c", ATTEMPTS).split("\n")
    assert [line for line in told if line] == ["refused"] * (6 if live.backend == "production" else 4)
    assert live.manage("audit", "verify").startswith("the audit trail holds")


def test_the_head_is_in_the_metrics(live: LiveServer) -> None:
    token(live, "--scope", "read")
    headers = {"Authorization": f"Bearer {live.env['FLEET_METRICS_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(f"{live.url}/metrics", headers=headers), timeout=30) as answer:
        text = answer.read().decode()
    position, _, digest = live.manage("audit", "head").strip().partition(":")
    assert f'fleet_audit_head{{hash="{digest}"}} {float(position)}' in text
