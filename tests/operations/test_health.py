"""The probes say what is well, to anybody, under any host name, and no more than that."""

import pytest
from django.test import Client

from fleet.operations import health


@pytest.fixture
def probe():
    return Client(headers={"host": "10.1.2.3:9999"})  # a load balancer knows no name, and no TLS


def test_live_answers_without_database_and_under_any_host(probe):
    assert probe.get("/healthz").json() == {"status": "ok"}


@pytest.mark.django_db
def test_ready_names_every_part(probe, settings):
    settings.SECURE_SSL_REDIRECT = True
    answer = probe.get("/readyz")

    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "database": "ok", "objects": "ok", "broker": "ok"}
    assert answer["Cache-Control"] == "no-store"


@pytest.mark.django_db
@pytest.mark.parametrize("part", ["database", "objects", "broker"])
def test_a_part_that_is_away_is_named_but_its_secrets_are_not(probe, monkeypatch, part):
    def fail() -> None:
        raise OSError("cannot reach postgres://fleet:geheim@db/fleet")

    monkeypatch.setitem(health.PARTS, part, fail)
    answer = probe.get("/readyz")

    assert answer.status_code == 503
    assert {name for name, state in answer.json().items() if state == "unavailable"} == {"status", part}
    assert b"geheim" not in answer.content


def test_a_folder_that_cannot_be_written_is_not_ready(monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)

    with pytest.raises(PermissionError):
        health.PARTS["objects"]()


def test_a_broker_that_cannot_be_reached_is_not_ready(monkeypatch):
    from fleet.celery import app

    monkeypatch.setattr(app.conf, "broker_url", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(app.conf, "broker_write_url", "redis://127.0.0.1:1/0")

    with pytest.raises(Exception, match=r"refused|127\.0\.0\.1"):
        health.PARTS["broker"]()
