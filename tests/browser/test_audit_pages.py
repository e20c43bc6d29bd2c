"""The audit trail and the lock-out, as people see them; an error on the console (a broken content policy) fails."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from fleet.audit import services
from fleet.audit.models import AuditEntry
from tests.browser.world import World

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]


def test_the_trail_is_looked_at_and_leads_to_an_entry(visit: Callable[..., Page], fleet: World, tmp_path: Path) -> None:
    device = fleet.busy_device()
    detail = {"was": "active", "labels": {"site": "north"}}
    services.record("device.revoked", target=device.name, detail=detail, comment="stolen in Lyon")
    services.seal()
    page = visit("olga", f"/admin/devices/device/{device.pk}/change/")
    page.get_by_role("link", name="Audit trail").last.click()
    page.get_by_text("stolen in Lyon").wait_for()
    page.screenshot(path=tmp_path / "list.png", full_page=True)
    entry = AuditEntry.objects.get(action="device.revoked")
    page.locator(f"a[href*='/admin/audit/auditentry/{entry.pk}/change/']").first.click()
    page.get_by_text(entry.seal.hash).first.wait_for()
    page.screenshot(path=tmp_path / "entry.png", full_page=True)
