"""Pictures of the pages people use, in light, dark and on a phone. `make screenshots` keeps them for the docs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import PHONE
from tests.browser.world import World

pytestmark = pytest.mark.browser
TALLEST = 2400
SCREENSHOTS = Path(__file__).resolve().parents[2] / "deploy" / "screenshots"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept = SCREENSHOTS if os.environ.get("FLEET_SCREENSHOTS") else tmp_path
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def shots(world: World) -> list[tuple[str, str, dict[str, int | bool]]]:
    rollout, halted, device = world.running.pk, world.halted.pk, world.busy_device().pk
    return [
        ("overview", "/admin/", {}),
        ("overview-dark", "/admin/", {"dark": True}),
        ("overview-phone", "/admin/", PHONE),
        ("rollout", f"/admin/rollouts/rollout/{rollout}/change/", {}),
        ("rollout-halted", f"/admin/rollouts/rollout/{halted}/change/", {"dark": True}),
        ("rollout-phone", f"/admin/rollouts/rollout/{rollout}/change/", PHONE),
        ("rollouts", "/admin/rollouts/rollout/", {}),
        ("devices", "/admin/devices/device/", {}),
        ("devices-phone", "/admin/devices/device/", PHONE),
        ("device", f"/admin/devices/device/{device}/change/", {}),
        ("release", f"/admin/releases/release/{world.running.release_id}/change/", {}),
    ]


@pytest.mark.django_db(transaction=True, reset_sequences=True)
def test_every_page_can_be_pictured(visit: Callable[..., Page], fleet: World, folder: Path) -> None:
    for name, path, look in shots(fleet):
        page = visit("olga", path, **look)
        assert page.title() != "", name
        stretch(page)
        page.screenshot(path=folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 5_000, name
        page.context.close()


def stretch(page: Page) -> None:
    """Make the window as tall as the page, within reason: bars that stick to its edge then stand at the page's."""
    size = page.viewport_size or {"width": 1440, "height": 900}
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": max(size["height"], min(height, TALLEST))})
