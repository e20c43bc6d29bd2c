"""`manage.py check --deploy` finds nothing in a production configuration with TLS, and something in each worse one."""

import subprocess
import sys

import pytest

from tests.live import ROOT, environment, production_environment


@pytest.fixture(scope="module")
def sound(tmp_path_factory, postgres, redis_server, s3) -> dict[str, str]:
    """As `deploy/fleet.env.example` has it, on real services; the online key alone is on the server."""
    from securesystemslib.signer import CryptoSigner

    from fleet.trust import keys

    folder = tmp_path_factory.mktemp("deploy")
    signer = CryptoSigner.generate_ed25519()
    (folder / "online.pem").write_bytes(signer.private_bytes)
    (folder / "online.pub.json").write_text(keys.public_to_json(signer.public_key))
    return (
        environment(folder / "var", "https://fleet.example.org")
        | production_environment(postgres, redis_server, s3)
        | {
            "FLEET_BEHIND_TLS": "1",
            "FLEET_WEBHOOK_PRIVATE": "0",
            "FLEET_ALLOWED_HOSTS": "fleet.example.org",
            "FLEET_ONLINE_KEY_URI": f"file2:{folder / 'online.pem'}",
            "FLEET_ONLINE_KEY_PUBLIC": str(folder / "online.pub.json"),
        }
    )


def check(env: dict[str, str]) -> tuple[int, str]:
    command = [sys.executable, "manage.py", "check", "--deploy", "--fail-level", "WARNING"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_production_is_clean_and_silences_nothing(sound):
    code, told = check(sound)
    assert (code, told.strip()) == (0, "System check identified no issues (0 silenced).")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"FLEET_BEHIND_TLS": "0"}, "security.W008"),  # no redirect to TLS
        ({"FLEET_DEBUG": "1"}, "fleet.E011"),
        ({"FLEET_SECRET_KEY": "short"}, "security.W009"),
    ],
)
def test_what_is_worse_is_found(sound, change, found):
    code, told = check(sound | change)
    assert code != 0
    assert found in told
