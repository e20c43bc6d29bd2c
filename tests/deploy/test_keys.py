"""deploy/keys.md is followed to the letter: every command runs, in its order, in an empty folder."""

import json
import re
import sqlite3

import pytest

from tests.registry import onnx_model
from tests.walkthrough import ROOT, Walk, blocks

PAGE = ROOT / "deploy" / "keys.md"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_every_command_of_the_page_is_in_a_block_that_is_run():
    run = "".join(text for _, text in blocks(PAGE, "bash", "bash background"))
    assert PAGE.read_text().count("```") == 2 * len(blocks(PAGE, "bash", "bash background"))
    steps = set(re.findall(r"ceremony ([a-z]+(?:-[a-z]+)?) ", run))
    assert steps == {
        "make-key", "init", "sign", "show", "rotate-root", "set-online", "set-targets", "set-model", "remove-model",
        "renew",
    }  # fmt: skip


def test_the_page_can_be_followed_to_the_letter(tmp_path):
    (tmp_path / "model.onnx").write_bytes(onnx_model())
    walk = Walk(tmp_path, {"FLEET_KEY_PASSPHRASE": "correct-horse-battery"})
    told = []
    try:
        for kind, text in blocks(PAGE, "bash", "bash background"):
            if kind == "bash":
                told.append(walk.shell(text))
            else:
                walk.start(text)
    finally:
        walk.stop()
    with sqlite3.connect(tmp_path / "var" / "fleet.sqlite3") as database:
        held = dict(database.execute("SELECT role, max(version) FROM trust_rolemetadata GROUP BY role"))
    database.close()
    root = json.loads((tmp_path / "stick" / f"{held['root']}.root.json").read_text())["signed"]
    people = {root["x-names"][keyid] for keyid in root["roles"]["root"]["keyids"]}
    assert people == {"gustav", "hanna", "ivan"}
    assert {root["x-names"][keyid] for keyid in root["roles"]["timestamp"]["keyids"]} == {"online-3"}
    assert held == {"root": 7, "targets": 10, "digits": 4}
    everything = "\n".join(told)
    assert "fleet-publish renew --model digits" in everything  # the import after the theft says what CI has to do
    assert "correct-horse" not in everything + (tmp_path / "server.log").read_text()
