"""What people do in the admin, in a real browser: look, operate, on a phone, in the dark, by keyboard."""

import json
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from device_sdk.config import Provision
from fleet.devices.models import EnrolmentToken
from fleet.rollouts.models import Rollout, RolloutAction
from tests.browser.conftest import PHONE
from tests.browser.world import World

pytestmark = pytest.mark.browser
Visit = Callable[..., Page]


def rollout_page(fleet: World) -> str:
    return f"/admin/rollouts/rollout/{fleet.running.pk}/change/"


def test_logging_in_leads_to_a_first_page_with_the_version_spread(visit: Visit, fleet: World) -> None:
    page = visit("victor")

    card = page.locator('[data-model="detector"]')
    committed = fleet.running.outcomes.filter(state="committed").count()
    expect(page).to_have_title("Overview | Fleet")
    expect(card.locator('[data-version="1.4.0"]')).to_contain_text(f"{committed} {100 * committed / 33:.1f} %")
    expect(card).to_contain_text(f"{committed} of 33 on 1.4.0")
    expect(card.get_by_role("img", name="detector over time")).to_be_visible()


def test_the_charts_draw_every_version(visit: Visit, fleet: World) -> None:
    page = visit("victor")

    drawn = page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('article[data-model] canvas')].map((canvas) =>"
        " [canvas.closest('article').dataset.model, Chart.getChart(canvas).data.datasets.map((line) => line.label)]))"
    )

    assert drawn["detector"] == ["1.2.0", "1.3.0", "1.3.1", "1.4.0"]
    assert set(drawn) == {"detector", "keyword", "vibration"}


def test_a_paused_rollout_is_recorded_with_its_comment(visit: Visit, fleet: World) -> None:
    page = visit("olga", rollout_page(fleet))

    page.get_by_role("link", name="Pause").click()
    page.get_by_label("Comment").fill("error rate looks odd in Graz")
    page.get_by_role("button", name="Pause").click()

    expect(page.locator("[data-state=paused]")).to_contain_text("Paused")
    expect(page.locator(".fleet-timeline")).to_contain_text("Paused by olga")
    expect(page.locator(".fleet-timeline")).to_contain_text("error rate looks odd in Graz")
    fleet.running.refresh_from_db()
    assert fleet.running.state == Rollout.State.PAUSED
    kept = RolloutAction.objects.filter(rollout=fleet.running, action="pause").get()
    assert (kept.actor, kept.comment) == ("olga", "error rate looks odd in Graz")


def test_a_dialog_without_a_comment_stays_open_and_says_why(visit: Visit, fleet: World) -> None:
    page = visit("olga", rollout_page(fleet))

    page.get_by_role("link", name="Roll back").click()
    page.get_by_role("button", name="Roll back").click()

    expect(page.locator("#dialog")).to_contain_text("This field is required")
    fleet.running.refresh_from_db()
    assert fleet.running.state == Rollout.State.RUNNING


def test_a_viewer_sees_no_buttons_to_act(visit: Visit, fleet: World) -> None:
    page = visit("victor", rollout_page(fleet))

    expect(page.locator("[data-state=running]").first).to_be_visible()
    for name in ("Start", "Pause", "Resume", "Cancel", "Roll back", "Save"):
        expect(page.get_by_role("link", name=name, exact=True)).to_have_count(0)
        expect(page.get_by_role("button", name=name, exact=True)).to_have_count(0)


@pytest.mark.parametrize(
    "path",
    [
        "/admin/", "/admin/rollouts/rollout/", "/admin/rollouts/rollout/add/", "/admin/devices/device/", "ROLLOUT",
        "/admin/releases/release/", "/admin/trust/rolemetadata/", "/admin/feedback/batch/", "DEVICE", "RELEASE",
    ],
)  # fmt: skip
def test_nothing_scrolls_sideways_on_a_phone(visit: Visit, fleet: World, path: str) -> None:
    rows = {
        "ROLLOUT": rollout_page(fleet),
        "DEVICE": f"/admin/devices/device/{fleet.busy_device().pk}/change/",
        "RELEASE": f"/admin/releases/release/{fleet.running.release_id}/change/",
    }

    page = visit("olga", rows.get(path, path), **PHONE)

    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1] == PHONE["width"]


def test_the_actions_are_reached_and_done_by_keyboard_alone(visit: Visit, fleet: World) -> None:
    page = visit("olga", rollout_page(fleet))

    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()").endswith("Pause"):
            break
    else:
        pytest.fail("forty tabs do not reach Pause")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Comment")).to_be_focused()
    page.keyboard.type("by keyboard")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    expect(page.locator(".fleet-timeline")).to_contain_text("by keyboard")
    assert outline == "solid"


def test_escape_leaves_a_dialog_and_changes_nothing(visit: Visit, fleet: World) -> None:
    page = visit("olga", rollout_page(fleet))
    page.get_by_role("link", name="Pause").click()
    expect(page.get_by_label("Comment")).to_be_focused()

    page.keyboard.press("Escape")

    expect(page.get_by_label("Comment")).to_be_hidden()
    fleet.running.refresh_from_db()
    assert fleet.running.state == Rollout.State.RUNNING


def test_the_dark_follows_the_system(visit: Visit, fleet: World) -> None:
    page = visit("victor", dark=True)

    assert "dark" in (page.locator("html").get_attribute("class") or "")
    lightness = page.evaluate(
        "() => { const paint = document.createElement('canvas').getContext('2d');"
        " paint.fillStyle = getComputedStyle(document.querySelector('#main')).backgroundColor;"
        " paint.fillRect(0, 0, 1, 1); return Math.max(...paint.getImageData(0, 0, 1, 1).data.slice(0, 3)) }"
    )
    assert lightness < 64  # of 255


def test_dates_stand_in_the_zone_of_the_browser(visit: Visit, fleet: World) -> None:
    page = visit("victor")

    expect(page.get_by_text("Times are in Europe/Vienna")).to_be_visible()


def test_the_provisioning_file_of_a_new_token_is_downloaded(visit: Visit, fleet: World) -> None:
    page = visit("olga", "/admin/devices/enrolmenttoken/add/")
    page.get_by_label("Name").fill("lot 9")
    page.locator("#id_model_names").fill("detector")
    page.get_by_role("button", name="Save", exact=True).click()

    with page.expect_download() as download:
        page.get_by_role("link", name="Download provision.json").click()
    provision = Provision.parse(download.value.path().read_bytes())

    assert download.value.suggested_filename == "provision.json"
    assert provision.models == ("detector",)
    assert json.loads(provision.root)["signed"]["_type"] == "root"
    assert EnrolmentToken.objects.filter(name="lot 9").exists()


def test_an_empty_fleet_is_told_what_to_do_first(visit: Visit, people: None) -> None:
    page = visit("admin", **PHONE)

    expect(page.get_by_role("heading", name="From nothing to the first signed model on a device")).to_be_visible()
    expect(page.locator("#step-1")).to_have_text("python manage.py trust_init")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
