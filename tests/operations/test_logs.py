"""No secret leaves in a log, whoever wrote it and in whichever form."""

import io
import json
import logging

import pytest
import structlog

from fleet.operations.logs import HIDDEN, configure, formatter, redact_text

MAC = "A" * 16 + "b_-9" * 4
CREDENTIAL = f"42.3.demo.{MAC}"


@pytest.fixture
def log():
    """The formatter under test behind a real handler; `log(json=True)` gives (logger, lines)."""
    root = logging.getLogger("tests.redaction")
    root.setLevel(logging.DEBUG)
    root.propagate = False

    def start(*, as_json: bool = True):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter(json=as_json))
        root.handlers = [handler]
        return root, stream

    yield start
    root.handlers = []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"Authorization: Bearer {CREDENTIAL}", "Authorization: "),
        (f"{{'Authorization': 'Bearer {CREDENTIAL}', 'X': 1}}", "{'Authorization': "),
        (f"authorization=Basic {MAC}", "authorization="),
        (f"sent bearer {MAC}, got 401", ", got 401"),
        (f"the token flt_{MAC} is old", "is old"),
        (f"credential {CREDENTIAL} refused", "refused"),
        (f"GET /tuf/cam-7/{MAC}/metadata/1.root.json", "GET /tuf/cam-7/"),
        (f"PUT https://s3.example.org/b/x?X-Amz-Date=1&X-Amz-Signature={MAC}&y=2", "&y=2"),
        (f"cannot reach postgres://fleet:{MAC}@db.example.org/fleet", "@db.example.org/fleet"),
        (f"-----BEGIN PRIVATE KEY-----\n{MAC}\n-----END PRIVATE KEY-----", "-----END PRIVATE KEY-----"),
        (f"-----BEGIN EC PRIVATE KEY-----\n{MAC}", "-----BEGIN EC PRIVATE KEY-----"),
    ],
)
def test_a_secret_in_a_text_is_hidden_and_the_rest_is_kept(text, kept):
    hidden = redact_text(text)

    assert MAC not in hidden
    assert HIDDEN in hidden
    assert kept in hidden


@pytest.mark.parametrize(
    "text",
    [
        "rollout 3 halted: 4 of 30 devices failed",
        "GET /api/device/v1/blobs/" + "ab" * 32,
        "detector/1.4.0/onnx-int8",
        "2026-11-21T01:56:54.958876Z",
        "http://127.0.0.1:8000/tuf/",
    ],
)
def test_what_is_no_secret_is_left_alone(text):
    assert redact_text(text) == text


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "console"])
def test_secrets_in_every_part_of_a_record_are_hidden(log, as_json):
    logger, stream = log(as_json=as_json)

    class Odd:
        def __str__(self) -> str:
            return f"Bearer {MAC}"

    try:
        raise RuntimeError(f"flt_{MAC} was refused")
    except RuntimeError:
        logger.exception(
            "refused %s for %s",
            f"Bearer {MAC}",
            Odd(),
            extra={"headers": {"Authorization": MAC}, "api_token": MAC, "list": [CREDENTIAL.encode()], "odd": Odd()},
        )

    assert "refused" in stream.getvalue()
    assert "RuntimeError" in stream.getvalue()
    assert MAC not in stream.getvalue()


def test_production_logs_one_json_object_a_line(log):
    logger, stream = log(as_json=True)
    logger.info("first\nwith a break")
    logger.warning("second", extra={"device": "cam-7", "count": 3})

    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "first\nwith a break"
    assert second | {"timestamp": ""} == {
        "message": "second",
        "level": "warning",
        "logger": "tests.redaction",
        "device": "cam-7",
        "count": 3,
        "timestamp": "",
    }


def test_records_of_structlog_pass_the_same_way(capsys):
    handlers = logging.getLogger().handlers[:]
    try:
        configure({"json": True, "level": "INFO"})
        structlog.get_logger("tests.structlog").info("enrolled", device="cam-7", credential=CREDENTIAL)
        (line,) = capsys.readouterr().err.splitlines()
    finally:
        logging.getLogger().handlers = handlers

    assert json.loads(line) | {"timestamp": ""} == {
        "message": "enrolled",
        "level": "info",
        "logger": "tests.structlog",
        "device": "cam-7",
        "credential": HIDDEN,
        "timestamp": "",
    }
