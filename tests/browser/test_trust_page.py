"""The Trust page in a real browser: read on a phone and in the dark, its commands copied by keyboard."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from playwright.sync_api import Page, expect

from fleet.devices.models import Device
from fleet.trust.models import DeviceView, PendingRole
from tests.browser import world
from tests.browser.conftest import PHONE
from tests.browser.test_pictures import folder, stretch  # noqa: F401
from tests.browser.world import World

pytestmark = pytest.mark.browser
Visit = Callable[..., Page]
TRUST = "/admin/trust/rolemetadata/overview/"


@pytest.fixture
def waiting(fleet: World) -> World:
    world.propose(fleet.now)
    for number, device in enumerate(Device.objects.filter(state=Device.State.ACTIVE)):
        DeviceView.objects.create(device=device, version=1, expires_at=fleet.now + timedelta(hours=23 - number))
    return fleet


def test_it_is_reached_by_the_sidebar_and_nothing_scrolls_sideways_on_a_phone(visit: Visit, waiting: World) -> None:
    page = visit("victor")
    page.locator(f'a[href="{TRUST}"]').first.click()
    expect(page.locator("[data-role=vibration]")).to_contain_text("expires soon")
    expect(page.get_by_role("meter", name="Lifetime left of root")).to_have_attribute("aria-valuenow", "89")
    release = world.Release.objects.get(version="2.2.0")
    for path in (TRUST, f"/admin/releases/release/{release.pk}/change/", "/admin/trust/pendingrole/"):
        phone = visit("victor", path, **PHONE)
        widths = phone.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1] == PHONE["width"], path


def test_the_command_for_the_second_person_is_copied_by_keyboard(visit: Visit, waiting: World) -> None:
    page = visit("victor", TRUST)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = page.locator("[data-role=keyword]").get_by_role("button", name="Copy the command")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("data-done", "1")
    assert page.evaluate("navigator.clipboard.readText()").startswith("fleet-publish sign --model keyword --server ")


def test_an_operator_withdraws_a_proposal_and_says_why(visit: Visit, waiting: World) -> None:
    page = visit("olga", f"/admin/trust/pendingrole/{PendingRole.objects.get().pk}/change/")
    page.get_by_role("link", name="Withdraw").click()
    page.get_by_label("Comment").fill("trained on the wrong set")
    page.get_by_role("button", name="Withdraw the proposal").click()
    expect(page.locator("body")).to_contain_text("The proposal for keyword is withdrawn.")
    assert not PendingRole.objects.exists()


@pytest.mark.django_db(transaction=True, reset_sequences=True)
def test_trust_can_be_pictured(visit: Visit, waiting: World, folder) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    release = world.Release.objects.get(version="2.2.0")
    for name, path, look in (
        ("trust", TRUST, {}),
        ("trust-dark", TRUST, {"dark": True}),
        ("trust-phone", TRUST, PHONE),
        ("release-pending", f"/admin/releases/release/{release.pk}/change/", {}),
    ):
        page = visit("olga", path, **look)
        stretch(page)
        page.screenshot(path=folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 5_000, name
        page.context.close()
