"""Each misconfiguration has its id; the embedded default has none."""

import pytest
from django.core.checks import run_checks

SOUND = {
    "PRODUCTION": True,
    "BEHIND_TLS": True,
    "SECRET_KEY": "s" * 50,
    "DEVICE_SECRETS": ["prod-2:" + "ab" * 32, "prod-1:" + "cd" * 32],
    "PUBLIC_URL": "https://fleet.example.org",
    "REDIS_URL": "redis://cache/0",
    "S3_BUCKET": "fleet",
    "ONLINE_KEY_URI": "hsm:2",
    "ENGINE": "django.db.backends.postgresql",
}


@pytest.fixture
def found(settings, monkeypatch):
    def run(**changes) -> set[str]:
        engine = changes.pop("ENGINE", "django.db.backends.sqlite3")
        monkeypatch.setattr("fleet.operations.checks.database_engine", lambda: engine)
        for name, value in changes.items():
            setattr(settings, name, value)
        return {message.id for message in run_checks(tags=["security"]) if message.id.startswith("fleet.")}

    return run


def test_the_embedded_default_is_sound(found):
    assert found() == set()


def test_a_whole_production_configuration_is_sound(found):
    assert found(**SOUND) == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"SECRET_KEY": "demonstration-only-" + "0" * 40}, "fleet.E001"),
        ({"DEVICE_SECRETS": []}, "fleet.E002"),
        ({"DEVICE_SECRETS": ["prod-1"]}, "fleet.E002"),
        ({"DEVICE_SECRETS": ["prod-1:abcd"]}, "fleet.E002"),
        ({"DEVICE_SECRETS": ["a:" + "ab" * 32, "a:" + "cd" * 32]}, "fleet.E002"),
        ({"DEVICE_SECRETS": ["new:" + "ab" * 32, "demo:" + "00" * 32]}, "fleet.E003"),
        ({"DEBUG": True}, "fleet.E004"),
        ({"PUBLIC_URL": "fleet.example.org"}, "fleet.E005"),
        ({"PUBLIC_URL": "http://fleet.example.org"}, "fleet.E006"),
        ({"ALLOWED_HOSTS": ["*"]}, "fleet.E007"),
        ({"POLL_INTERVAL": 0}, "fleet.E008"),
        ({"BEHIND_TLS": False}, "fleet.W001"),
        ({"ENGINE": "django.db.backends.sqlite3"}, "fleet.W002"),
        ({"REDIS_URL": ""}, "fleet.W003"),
        ({"S3_BUCKET": ""}, "fleet.W004"),
    ],
)
def test_each_mistake_is_named(found, changes, expected):
    assert found(**SOUND | changes) == {expected}


def test_an_online_key_in_the_demonstrations_keystore_is_named(found, settings):
    assert found(**SOUND | {"ONLINE_KEY_URI": f"file2:{settings.VAR}/keystore/online.pem"}) == {"fleet.W005"}
