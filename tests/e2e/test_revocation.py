"""A release is revoked by one command of CI: the real command, the real server, the real device."""

import json
import urllib.request

import pytest

from tests.e2e.test_device import Shop
from tests.sdk.world import scaling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def shop(embedded, bare_venv, tmp_path_factory):
    return Shop(embedded, bare_venv, tmp_path_factory.mktemp("shop"))


def release(shop, version, factor):
    shop.push(version, scaling(factor))
    shop.roll_out(version)


def revoke(shop, version):
    named = ["--model", shop.model, "--version", version, "--server", shop.live.url]
    secret = ["--key", str(shop.key), "--token", shop.token]
    return shop.venv.run("-m", "device_sdk.publish", "revoke", *named, *secret)


def asked(shop, where):
    token = shop.live.manage("api_token", f"{shop.model}-read", "--scope", "read").strip()
    request = urllib.request.Request(f"{shop.live.url}/api/v1/{where}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["results"]


def test_a_device_leaves_a_revoked_release_within_one_poll_and_a_stopped_model_starts_again(shop):
    release(shop, "1.0.0", 2.0)
    home = shop.enrol("cam")
    shop.device("update", home)
    release(shop, "1.1.0", 3.0)
    shop.device("update", home)
    assert shop.answer(home) == 3.0

    revoke(shop, "1.1.0")
    shop.device("update", home)
    assert shop.answer(home) == 2.0
    told = asked(shop, f"events/?device={shop.model}-cam")
    assert {(event["kind"], event["release"]) for event in told} >= {("probation", f"{shop.model}/1.0.0/default")}
    assert {event["kind"] for event in told}.isdisjoint({"failed", "rolled_back", "refused"})
    (device,) = asked(shop, f"devices/?name={shop.model}-cam")
    assert device["runs"] == {shop.model: "1.0.0/default"}
    ended = {row["version"]: (row["state"], row["reason"]) for row in asked(shop, f"rollouts/?model={shop.model}")}
    assert ended["1.1.0"][0] in {"cancelled", "completed"}
    with pytest.raises(RuntimeError, match="only a valid release"):
        shop.roll_out("1.1.0")
    again = shop.push("1.1.0", scaling(3.0), check=False)
    assert (again.returncode, "revoked" in again.stderr) == (5, True)

    shop.live.manage("model_policy", shop.model, "stop")
    revoke(shop, "1.0.0")
    shop.device("update", home)
    stopped = shop.device("run", home, shop.model, str(shop.folder / "x.npy"), check=False)
    assert "stopped" in stopped.stderr
    assert "nothing of it may run" in stopped.stderr
    status = json.loads(shop.device("status", home, "--json").stdout)["models"][shop.model]
    assert (status["state"], status["reason"], status["release"]) == ("stopped", "nothing_may_run", "")
    assert asked(shop, f"events/?device={shop.model}-cam")[0]["kind"] == "stopped"
    assert asked(shop, f"devices/?name={shop.model}-cam")[0]["runs"] == {}

    release(shop, "1.2.0", 5.0)
    shop.device("update", home)
    assert shop.answer(home) == 5.0
