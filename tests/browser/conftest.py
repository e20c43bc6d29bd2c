"""A real Chromium against a live server. Without Chromium: skipped on a developer's machine, a failure in CI."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.cache import cache
from django.utils import timezone
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser import world

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


PHONE = {"width": 375, "height": 812}


@pytest.fixture(scope="session", autouse=True)
def _sync_playwright_beside_the_orm() -> Iterator[None]:
    """Playwright's loop runs in this thread, and Django would take it for an async view."""
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
    yield
    del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.fixture(autouse=True)
def _fresh_pages() -> None:
    """A page that took long is kept for a while: on a busy machine, into the next test."""
    cache.clear()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        no_browser = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        no_browser("no Chromium on PATH: browser tests need one")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, headless=True, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def fleet(transactional_db: None) -> world.World:
    return world.build(timezone.now())


@pytest.fixture
def people(transactional_db: None) -> None:
    """Nobody and nothing but the people."""
    world.people()


@pytest.fixture
def visit(browser: Browser, live_server: Any) -> Iterator[Callable[..., Page]]:
    """Open a page as somebody: `visit("olga", "/admin/", width=375)`. An error on the console fails the test."""
    contexts, troubles = [], []

    def open_page(
        user: str, path: str = "/admin/", *, width: int = 1440, height: int = 900, dark: bool = False
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            timezone_id="Europe/Vienna",
            device_scale_factor=1,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url:.200}"))
        page.goto(f"{live_server.url}/admin/login/?next={path}")
        page.fill("#id_username", user)
        page.fill("#id_password", world.PASSWORD)
        page.click("#login-form button[type=submit]")
        page.wait_for_load_state("networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
