"""A release's page in a real browser: who still runs a revoked one, and what CI attached to it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone
from playwright.sync_api import Page

from device_sdk.protocol.manifest import FileEntry, Manifest, digest
from fleet.devices.models import Device
from fleet.releases import bom, provenance, services
from fleet.releases.models import Artifact, Release, Variant
from fleet.rollouts import selectors as rollouts
from tests.browser.conftest import PHONE
from tests.browser.test_pictures import stretch
from tests.browser.world import World
from tests.server.test_bom import BOM
from tests.server.test_model_signing import VECTORS, vector

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True, reset_sequences=True)]
LOOKS: list[dict[str, int | bool]] = [{}, {"dark": True}, dict(PHONE)]


def attach(release: Release) -> None:
    """As a push would have: one attachment of each kind."""
    content, variant = json.dumps(BOM).encode(), release.variants.get(name="default")
    files = (
        ("model.onnx", b"not a real model\n"),
        ("model.onnx.data", b"not real weights\n"),
    )
    manifest = Manifest.parse(variant.manifest.encode())
    entries = tuple(FileEntry(name, len(data), digest(data)) for name, data in files)
    Variant.objects.filter(pk=variant.pk).update(manifest=replace(manifest, files=entries).to_bytes().decode())
    for kind, data, summary in (
        ("ml-bom", content, bom.read_bom(content)),
        ("provenance", b"{}", {"values": {"pipeline": "train.yml", "run": "4711", "accuracy": "0.973"}}),
        ("model-signature", vector("p256"), {}),
    ):
        artifact = Artifact.objects.create(sha256=digest(data), length=len(data))
        signature = data.decode() if kind == "model-signature" else ""
        named = {"kind": kind, "name": f"{kind}.json", "artifact": artifact}
        variant.attachments.create(**named, summary=summary, signature=signature)
    pem = (VECTORS / "p256.pub.pem").read_text()
    provenance.add_key(model=release.model, name="research", pem=pem, actor="admin")


def picture(page: Page, name: str, folder: Path) -> None:
    folder = Path(os.environ.get("FLEET_PICTURES", folder))
    stretch(page)
    page.screenshot(path=folder / f"{name}.png")


@pytest.mark.parametrize("look", LOOKS, ids=["light", "dark", "phone"])
def test_a_revoked_release_says_who_runs_it_and_what_was_attached(
    visit: Callable[..., Page],
    fleet: World,
    tmp_path: Path,
    look: dict[str, int | bool],
    request: pytest.FixtureRequest,
) -> None:
    release = fleet.running.release
    attach(release)
    services.revoke(release=release, reason="olga: it takes cyclists for trees")
    Release.objects.filter(pk=release.pk).update(revoked_at=timezone.now() - timedelta(minutes=9))

    silent, waits, *_ = [each.device for each in rollouts.still_running(release)]
    Device.objects.filter(pk=silent.pk).update(last_seen=timezone.now() - timedelta(days=3))
    waits.statuses.filter(model="detector").update(state="waiting", reason="window", release="detector/1.3.1/default")

    page = visit("olga", f"/admin/releases/release/{release.pk}/change/", **look)

    said = page.locator("[data-revoked]").inner_text()
    assert "Withdrawn on this server" in said
    assert "it takes cyclists for trees" in said
    assert "offline" in said
    assert "window" in said
    attached = page.locator("[data-provenance]").inner_text()
    assert "scikit-learn" in attached
    assert "9f1c2ab" in attached
    assert "verified by key research" in attached
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture(page, f"release-{request.node.callspec.id}", tmp_path)


def test_a_release_is_withdrawn_after_saying_why(visit: Callable[..., Page], fleet: World, tmp_path: Path) -> None:
    release = fleet.running.release
    page = visit("olga", f"/admin/releases/release/{release.pk}/change/")
    page.get_by_text("Withdraw here").first.click()
    page.fill("textarea[name=comment]", "it takes cyclists for trees")
    picture(page, "withdraw", tmp_path)
    page.get_by_role("button", name="Withdraw for good").click()
    page.wait_for_selector("[data-revoked]")
    release.refresh_from_db()
    assert release.reason == "olga: it takes cyclists for trees"
    fleet.running.refresh_from_db()
    assert fleet.running.state == "cancelled"


def test_a_model_says_what_happens_when_nothing_may_run(
    visit: Callable[..., Page], fleet: World, tmp_path: Path
) -> None:
    model = fleet.running.release.model
    page = visit("admin", f"/admin/releases/model/{model.pk}/change/")
    page.select_option("[name=when_nothing]", "stop")
    picture(page, "model", tmp_path)
    page.click("button[name=_save]")
    page.wait_for_load_state("networkidle")
    model.refresh_from_db()
    assert model.when_nothing == "stop"
    page.goto(page.url.split("/admin/")[0] + "/admin/releases/provenancekey/add/")
    picture(page, "key", tmp_path)
    assert "P-256" in page.content()
