"""The page of settings is what the settings are."""

import re
from pathlib import Path

import pytest
from django.core.management import call_command

from fleet.operations.reference import render, settings_of

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = ROOT / "fleet" / "settings.py"


def test_the_page_of_settings_is_current(capsys):
    call_command("settings_reference")

    assert (ROOT / "deploy" / "SETTINGS.md").read_text() == capsys.readouterr().out, "run: settings_reference --write"


def test_every_variable_in_the_source_is_on_the_page_with_a_meaning():
    rows = settings_of(SETTINGS)

    assert {row.name for row in rows} == set(re.findall(r'"(FLEET_\w+)"', SETTINGS.read_text()))
    assert [row.name for row in rows if not row.text] == []


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ('A = env.int("FLEET_A", 3)  # how many\n', "| `FLEET_A` | int | `3` | how many |"),
        (
            '# One,\n# and more.\nA = env.str("FLEET_A")\n',
            "| `FLEET_A` | str | required | One, and more |",
        ),
        ('A = env.bool("FLEET_A", False)  # a | b\n', r"| `FLEET_A` | bool | off | a \| b |"),
        ('A = env.str("FLEET_A", "")  # x  # noqa: S105\n', "| `FLEET_A` | str | empty | x |"),
    ],
)
def test_a_setting_becomes_a_row(tmp_path, source, row):
    path = tmp_path / "settings.py"
    path.write_text("# --- first part ---\n" + source)
    page = render(settings_of(path))

    assert "## First part" in page
    assert row in page.splitlines()
