"""What the rollout's page says of its guards: who is compared, how the evidence grew, what a small fleet can see."""

import random
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.utils import timezone
from playwright.sync_api import Page, expect

from fleet.rollouts import evidence, guards
from fleet.rollouts.models import Finding, Rollout
from tests.browser.world import World

pytestmark = pytest.mark.browser
Visit = Callable[..., Page]
TERMS = {"failures": {}, "errors": {"limit": 0.5}, "latency": {}, "devices": 3}


def grow(rollout: Rollout, rounds: int, *, worse: float) -> Rollout:
    """Some devices more on either side in each round, an engine's look after each."""
    dice, now = random.Random(4), timezone.now()
    rollout.guards = guards.Terms.parse(TERMS).to_json()
    rollout.save()
    for step in range(rounds):
        for exposed, number in ((True, 2), (False, 6)):
            for _ in range(number):
                change = dice.gauss(0, 0.003) + (worse if exposed else 0)
                found = {
                    "errors": [0.006 + max(change, 0), change],
                    "latency": [12 + dice.random(), dice.gauss(0, 0.1)],
                }
                Finding.objects.create(rollout=rollout, run=0, stage=1, age=0, exposed=exposed, changes=found)
        evidence.ask(rollout, now - timedelta(minutes=5 * (rounds - step)))
    return rollout


def test_the_page_shows_both_sides_the_evidence_the_bound_and_what_few_devices_cannot_show(
    visit: Visit, fleet: World
) -> None:
    where = f"/admin/rollouts/rollout/{fleet.running.pk}/change/"
    grow(fleet.running, 1, worse=0.0)
    card = visit("victor", where).locator("[data-guards]")
    small = "cannot halt with 2 exposed and 6 unexposed, not even if all were worse by 18 %"
    expect(card).to_contain_text(small)

    grow(fleet.running, 8, worse=0.08)
    page = visit("victor", where)
    card = page.locator("[data-guards]")
    for said in ("18 devices", "54 devices", "A guard halts at evidence of 1 in 300"):
        expect(card).to_contain_text(said)
    drawn = page.evaluate(
        "() => Chart.getChart(document.querySelector('[data-guards] canvas')).data.datasets.map((line) =>"
        " [line.label, line.data.length, line.data.at(-1)])"
    )
    assert [line[0] for line in drawn] == ["update failures", "inference errors", "latency p95", "halts"]
    assert drawn[1][1] == 9
    assert drawn[1][2] > drawn[3][2] > drawn[2][2], "the errors crossed the bound, the latency did not"
