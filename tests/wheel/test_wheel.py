"""The wheel holds the SDK and nothing else, and works where nothing of the server is."""

import json
import re
import zipfile

import pytest

from tests.wheel import __main__ as of_the_sdk

pytestmark = pytest.mark.e2e
# What a device never needs: the server's framework, its tools, and heavy things that only the server uses.
FOREIGN = {"django", "fleet", "celery", "rest_framework", "boto3", "pyarrow", "onnx", "psycopg", "structlog", "deploy"}


def test_the_wheel_holds_the_sdk_and_its_licence_papers_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"

    assert {name.split("/")[0] for name in names} == {"device_sdk", info}
    assert "device_sdk/protocol/manifest.py" in names
    assert [name for name in names if name.endswith(".pyc") or "/tests/" in name] == []


def test_the_wheel_names_its_commands_and_what_it_depends_on(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if ".dist-" in name
        }
    needed = {
        re.match(r"[\w-]+", line.removeprefix("Requires-Dist: "))[0]
        for line in texts["METADATA"].splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }

    assert needed == {"cryptography", "numpy", "onnxruntime", "requests", "securesystemslib", "tuf"}
    assert "fleet-device = device_sdk.__main__:main" in texts["entry_points.txt"]
    assert "fleet-publish = device_sdk.publish:main" in texts["entry_points.txt"]


def test_nothing_of_the_server_is_in_the_devices_world(bare_venv):
    script = f"import importlib.util as u, json; print(json.dumps([n for n in {sorted(FOREIGN)} if u.find_spec(n)]))"

    assert json.loads(bare_venv.run("-c", script).stdout) == []


def test_the_dependencies_of_the_wheel_are_satisfied_and_no_more_is_installed(bare_venv):
    bare_venv.run("-m", "pip", "check")
    installed = {row["name"].lower() for row in json.loads(bare_venv.run("-m", "pip", "list", "--format=json").stdout)}

    assert "fleet-device-sdk" in installed
    assert len(installed) < 25, installed


def test_the_sdk_comes_from_the_wheel_and_imports_lightly(bare_venv):
    script = "import device_sdk, sys; print(device_sdk.__file__, 'onnxruntime' in sys.modules)"
    path, heavy = bare_venv.run("-c", script).stdout.split()

    assert path.startswith(str(bare_venv.folder))
    assert heavy == "False"


def test_every_module_of_the_sdk_can_be_imported_there(bare_venv):
    script = (
        "import device_sdk, importlib, pkgutil\n"
        "names = [m.name for m in pkgutil.walk_packages(device_sdk.__path__, 'device_sdk.')]\n"
        "[importlib.import_module(name) for name in names if not name.endswith('__main__')]\n"
        "print(len(names))"
    )
    assert int(bare_venv.run("-c", script).stdout) > 10


@pytest.mark.parametrize("command", [["-m", "device_sdk", "--help"], ["-m", "device_sdk.publish", "--help"]])
def test_the_commands_explain_themselves(bare_venv, command):
    assert "usage" in bare_venv.run(*command).stdout.lower()


def test_the_sdks_tests_run_there(bare_venv):
    """A few of them; `python -m tests.wheel` runs all."""
    done = of_the_sdk.run(bare_venv, ["-q", "tests/sdk/test_unload_first.py", "-k", "auto"], capture_output=True)

    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
