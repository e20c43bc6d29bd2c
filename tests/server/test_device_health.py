"""What a device's page says of its models' numbers, and of a provider that is missing."""

import re
from html import unescape

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from fleet.dashboard import quality
from fleet.devices.models import ModelStatus
from tests.fleet_world import device

TOLD = {
    "calls": 1200, "errors": 2, "p50_us": 900.0, "p95_us": 2500.0, "confidence": 0.874, "classes": "0:9 1:3",
    "missing_providers": "CUDAExecutionProvider", "providers": "CPUExecutionProvider",
}  # fmt: skip


def plain(markup: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", markup)).split())


@pytest.mark.django_db
def test_page_of_a_device_says_what_its_model_does_not_run_on(client: Client) -> None:
    row = device(runs={"digits": "1.0.0/default"})
    ModelStatus.objects.create(device=row, model="digits", state="committed", since=timezone.now(), health=TOLD)
    client.force_login(User.objects.create_superuser("olga"))
    shown = plain(client.get(f"/admin/devices/device/{row.pk}/change/").content.decode())
    assert "No CUDAExecutionProvider : it runs on CPUExecutionProvider." in shown
    assert "1,200 calls 2 errors p50 900 us, p95 2.5 ms confidence 0.87 classes 0:9 1:3" in shown


def test_numbers_that_are_none_or_hostile_are_left_out() -> None:
    assert plain(quality.health({"calls": "many", "p50_us": True, "errors": 0})) == "-"
    assert "<b>" not in quality.health({"missing_providers": "<b>", "classes": "<b>"})
    assert "2 errors" not in plain(quality.health({"errors": 0}))
