"""Figures for Prometheus, for those who may see them."""

from datetime import timedelta

import pytest
from django.contrib.auth.models import Permission, User
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from fleet.devices.models import Device
from fleet.trust.models import RoleMetadata

pytestmark = pytest.mark.django_db


def test_a_stranger_is_refused(client):
    answer = client.get("/metrics")

    assert (answer.status_code, answer.json()["code"]) == (403, "denied")


def test_without_a_token_in_the_settings_no_token_is_right(client, settings):
    settings.METRICS_TOKEN = ""

    for header in ("Bearer", "Bearer ", "Bearer x"):
        assert client.get("/metrics", headers={"authorization": header}).status_code == 403


def test_the_token_of_the_settings_lets_a_scraper_in(client, settings):
    settings.METRICS_TOKEN = "geheim"

    assert client.get("/metrics", headers={"authorization": "Bearer falsch"}).status_code == 403
    assert client.get("/metrics", headers={"authorization": "Bearer geheim"}).status_code == 200


def test_a_user_needs_the_right_to_see_devices(client):
    user = User.objects.create_user("viewer")
    client.force_login(user)
    assert client.get("/metrics").status_code == 403

    user.user_permissions.add(Permission.objects.get(codename="view_device"))
    assert client.get("/metrics").status_code == 200


def test_the_figures_are_those_of_the_database(client, settings):
    settings.METRICS_TOKEN = "geheim"
    now = timezone.now()
    Device.objects.create(name="a", last_seen=now)
    Device.objects.create(name="b", last_seen=now - timedelta(days=1))
    Device.objects.create(name="c", last_seen=now, state=Device.State.REVOKED)
    for version, days in ((1, 1), (2, 10)):
        RoleMetadata.objects.create(role="root", version=version, length=1, expires_at=now + timedelta(days=days))
    RoleMetadata.objects.create(role="digits", version=1, length=1, expires_at=now + timedelta(days=2))

    page = client.get("/metrics", headers={"authorization": "Bearer geheim"}).content.decode()
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert values["fleet_devices", "active"] == 2
    assert values["fleet_devices", "revoked"] == 1
    assert values["fleet_devices_online",] == 1
    assert values["fleet_role_expiry_seconds", "root"] == pytest.approx(10 * 86400, abs=60)
    assert values["fleet_role_expiry_seconds", "digits"] == pytest.approx(2 * 86400, abs=60)
    assert any(name[0].startswith("django_http_requests") for name in values)
