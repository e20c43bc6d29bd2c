"""The guards on a rollout's page: who is compared with whom, how the evidence grew, and what it cannot see."""

import json
import math
from datetime import UTC, datetime
from typing import Any

from django.utils import timezone
from django.utils.html import format_html

from fleet.rollouts import evidence, guards
from fleet.rollouts.models import GuardReading, Rollout

TICKS = {"color": "#8b95a5", "maxRotation": 0, "autoSkip": True, "autoSkipPadding": 28, "font": {"size": 11}}


def evidence_of(rollout: Rollout) -> dict[str, Any]:
    """Nothing where the rollout has no guards; `problem` where they cannot be read, which holds it."""
    if not rollout.guards:
        return {}
    terms = evidence.terms_of(rollout)
    if terms is None:
        return {"problem": "The guards' terms cannot be read: the rollout holds."}
    found = evidence.looked_at(rollout, terms)
    rows = evidence.readings(rollout)
    chart = _chart(rows, terms)
    return {
        "table": {"headers": _HEADERS, "rows": [_row(each, terms, rollout) for each in found]},
        "chart": json.dumps(chart) if len(chart["labels"]) > 1 else "",
        "options": json.dumps(_OPTIONS),
        "said": "; ".join(row.sentence for row in rows) or "no evidence yet",
        "false_alarm": f"{100 * terms.false_alarm:g}",
        "bound": guards.odds(terms.bound),
        "tested": len(terms.tested),
        "run": rollout.evidence_run,
        "terms": ", ".join(guards.to_text(terms)),
    }


_HEADERS = ["Guard", "Exposed", "Unexposed", "Change since before", "Evidence", "What it can see"]


def _row(each: guards.Reading, terms: guards.Terms, rollout: Rollout) -> list[Any]:
    scale, at = guards.SCALES[each.name], each.strongest
    updates = each.name == guards.FAILURES
    exposed = _side(scale, at.exposed, "began" if updates else "devices")
    unexposed = f"tolerated {scale.show(terms.effect(each.name))}" if updates else _side(scale, at.unexposed, "devices")
    change = (
        "-"
        if updates
        else f"{guards.change_text(each.name, at.exposed)} / {guards.change_text(each.name, at.unexposed)}"
    )
    return [scale.label, exposed, unexposed, change, _evidence(each, terms), _sight(each, terms, rollout)]


def _side(scale: guards.Scale, side: guards.Side, word: str) -> str:
    if not side.devices:
        return "no device yet"
    text = '<span class="fleet-number">{}</span> <span class="fleet-quiet">{} {}</span>'
    return format_html(text, scale.show(side.mean), f"{side.devices:,}", word)


def _evidence(each: guards.Reading, terms: guards.Terms) -> str:
    if not terms.guards[each.name].test:
        return "limit only"
    beyond = each.peak >= terms.bound
    return format_html('<strong class="{}">{}</strong>', "text-red-600" if beyond else "", guards.odds(each.peak))


def _sight(each: guards.Reading, terms: guards.Terms, rollout: Rollout) -> str:
    """What the test could tell with the devices that are compared now: small fleets are told the truth."""
    exposed, unexposed = each.strongest.exposed.devices, each.strongest.unexposed.devices
    if not terms.guards[each.name].test:
        return ""
    if not exposed:
        return "nothing yet: no exposed device was compared"
    least = guards.fewest(each.name, terms, exposed, unexposed, rollout.stages.count())
    others = "" if each.name == guards.FAILURES else f" and {unexposed:,} unexposed"
    if least is None:
        return f"cannot halt with {exposed} exposed{others}, not even if all were {guards.worst(each.name)}"
    return f"halts where {least} of {exposed:,} are {guards.worst(each.name)}"


def _chart(rows: list[GuardReading], terms: guards.Terms) -> dict[str, Any]:
    """Powers of ten over time, each guard a line, the bound dashed."""
    moments = sorted({at for row in rows for at, _ in row.points})
    shown = [row for row in rows if terms.guards[row.guard].test]
    lines = [_line(row, moments, place) for place, row in enumerate(shown)]
    bound = {
        "label": "halts", "data": [round(terms.bound / math.log(10), 2)] * len(moments), "borderColor": "#dc2626",
        "borderDash": [6, 4], "borderWidth": 1.5, "pointStyle": False,
    }  # fmt: skip
    return {"labels": [_label(at) for at in moments], "datasets": [*lines, bound]}


def _line(row: GuardReading, moments: list[int], place: int) -> dict[str, Any]:
    values, last, told = [], 0.0, dict(row.points)
    for at in moments:
        last = told.get(at, last)
        values.append(round(last / math.log(10), 2))
    return {
        "label": guards.SCALES[row.guard].label, "data": values, "borderColor": f"var(--series-{place})",
        "stepped": "before", "borderWidth": 1.5, "pointStyle": False,
    }  # fmt: skip


def _label(at: int) -> str:
    return f"{timezone.localtime(datetime.fromtimestamp(at, UTC)):%-d %b %H:%M}"


_OPTIONS: dict[str, Any] = {
    "animation": False,
    "responsive": True,
    "maintainAspectRatio": False,
    "interaction": {"mode": "index", "intersect": False},
    "plugins": {
        "legend": {
            "display": True, "position": "bottom", "labels": {"boxWidth": 10, "boxHeight": 2, "color": TICKS["color"]},
        },
    },
    "scales": {
        "x": {"grid": {"display": False}, "border": {"display": False}, "ticks": TICKS},
        "y": {
            "border": {"display": False}, "grid": {"tickWidth": 0}, "ticks": TICKS | {"maxTicksLimit": 5},
            "title": {"display": True, "text": "powers of ten", "color": TICKS["color"], "font": {"size": 10}},
        },
    },
}  # fmt: skip
