"""Targeting as people see it: a group is counted as one types, and a device's page says why it runs what it runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from fleet.devices.models import Group
from tests.browser.conftest import PHONE
from tests.browser.test_pictures import folder, stretch  # noqa: F401  # a fixture
from tests.browser.world import World

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]
Visit = Callable[..., Page]


def test_a_group_is_counted_and_shown_as_one_types(visit: Visit, fleet: World, folder: Path) -> None:  # noqa: F811
    page = visit("olga", "/admin/devices/group/add/")
    everyone = int(page.locator("[data-count]").get_attribute("data-count") or 0)
    page.get_by_label("Chosen by labels").press_sequentially("site=graz, kind!=camera")
    expect(page.locator("#chosen")).not_to_contain_text(f"{everyone} devices")
    page.get_by_label("Chosen by labels").fill("site in (graz")
    expect(page.locator("#chosen")).to_contain_text("at character 14: expected a comma or )")
    page.get_by_label("Chosen by labels").fill("site in (graz, linz)")
    expect(page.locator("[data-count]")).to_be_visible()
    chosen = page.locator("[data-count]").get_attribute("data-count")
    page.get_by_label("Name").fill("alps")
    page.screenshot(path=folder / "group.png")
    page.get_by_role("button", name="Save", exact=True).click()
    made = Group.objects.get(name="alps")
    assert made.selector == "site in (graz, linz)"
    assert 0 < int(chosen or 0) < everyone


@pytest.mark.parametrize(("name", "look"), [("device-why", {}), ("device-why-phone", {**PHONE, "dark": True})])
def test_a_devices_page_says_why(visit: Visit, fleet: World, folder: Path, name: str, look: dict[str, int]) -> None:  # noqa: F811
    page = visit("olga", f"/admin/devices/device/{fleet.busy_device().pk}/change/", **look)
    why = page.locator("[data-why=detector]")
    expect(why).to_contain_text("gives it")
    expect(why).to_contain_text("decides")
    stretch(page)
    page.screenshot(path=folder / f"{name}.png")
