"""Each misconfiguration has its id; the embedded default has none."""

import re
from pathlib import Path

import pytest
from django.core.checks import run_checks

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = {f"fleet.{kind}{number:03}" for kind in "EW" for number in range(10, 30)}
SOUND = {
    "PRODUCTION": True,
    "BEHIND_TLS": True,
    "SECRET_KEY": "s" * 50,
    "DEVICE_SECRETS": ["prod-2:" + "ab" * 32, "prod-1:" + "cd" * 32],
    "PUBLIC_URL": "https://fleet.example.org",
    "REDIS_URL": "redis://cache/0",
    "S3_BUCKET": "fleet",
    "ENGINE": "django.db.backends.postgresql",
}


@pytest.fixture
def found(settings, monkeypatch):
    def run(**changes) -> set[str]:
        engine = changes.pop("ENGINE", "django.db.backends.sqlite3")
        monkeypatch.setattr("fleet.operations.checks.database_engine", lambda: engine)
        for name, value in changes.items():
            setattr(settings, name, value)
        return {message.id for message in run_checks(tags=["security"]) if message.id in OURS}

    return run


def test_the_embedded_default_is_sound(found):
    assert found() == set()


def test_a_whole_production_configuration_is_sound(found):
    assert found(**SOUND) == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"DEVICE_SECRETS": []}, "fleet.E010"),
        ({"DEVICE_SECRETS": ["prod-1"]}, "fleet.E010"),
        ({"DEVICE_SECRETS": ["prod-1:abcd"]}, "fleet.E010"),
        ({"DEVICE_SECRETS": ["a:" + "ab" * 32, "a:" + "cd" * 32]}, "fleet.E010"),
        ({"DEBUG": True}, "fleet.E011"),
        ({"PUBLIC_URL": "fleet.example.org"}, "fleet.E012"),
        ({"PUBLIC_URL": "http://fleet.example.org"}, "fleet.E013"),
        ({"ALLOWED_HOSTS": ["*"]}, "fleet.E014"),
        ({"POLL_INTERVAL": 0}, "fleet.E015"),
        ({"BEHIND_TLS": False}, "fleet.W010"),
        ({"ENGINE": "django.db.backends.sqlite3"}, "fleet.W011"),
        ({"REDIS_URL": ""}, "fleet.W012"),
        ({"S3_BUCKET": ""}, "fleet.W013"),
    ],
)
def test_each_mistake_is_named(found, changes, expected):
    assert found(**SOUND | changes) == {expected}


def test_no_two_modules_use_the_same_id():
    """Of errors and warnings alike: an id leads a reader to one place."""
    uses = {
        (path.relative_to(ROOT), found)
        for path in (ROOT / "fleet").rglob("*.py")
        for found in re.findall(r'id="(fleet\.[EW]\d+)"', path.read_text())
    }
    assert sorted(found for _, found in uses) == sorted({found for _, found in uses})
