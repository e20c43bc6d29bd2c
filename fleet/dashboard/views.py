"""The first page: turns selectors' values into what unfold's components and its bundled Chart.js take."""

import json
from datetime import datetime, timedelta
from typing import Any

from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html

from fleet import presentation
from fleet.dashboard import pages, selectors
from fleet.dashboard.selectors import History, Laggards, ModelSpread, Presence
from fleet.devices import selectors as devices
from fleet.feedback.models import Batch
from fleet.rollouts.selectors import Laggard
from fleet.trust import selectors as trust

WINDOWS = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30)}
DEFAULT_WINDOW = "7d"


def first_page(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """UNFOLD's DASHBOARD_CALLBACK. Each part is there only for those who may see its rows."""
    now = timezone.now()
    chosen = request.GET.get("window", DEFAULT_WINDOW)
    chosen = chosen if chosen in WINDOWS else DEFAULT_WINDOW
    may = request.user.has_perm
    context |= {"now": now, "windows": list(WINDOWS), "window": chosen, "zone": timezone.get_current_timezone_name()}
    if may("devices.view_device"):
        context |= {
            "steps": selectors.first_steps(),
            "presence": (presence := selectors.presence(now)),
            "refusing": devices.refusing().count(),
            "presence_bar": _presence_bar(presence),
            "spreads": [spread_context(spread) for spread in selectors.spreads(now, WINDOWS[chosen])],
        }
    if may("rollouts.view_rollout") and may("devices.view_device"):
        moving = selectors.in_flight()
        context |= {
            "rollouts": moving.rollouts,
            "laggards": moving.laggards,
            "laggards_table": _laggards_table(moving.laggards),
        }
    if may("feedback.view_batch"):
        context |= {
            "batches": (batches := list(selectors.newest_batches())),
            "batches_table": {"headers": _BATCH_HEADERS, "rows": [_batch(batch) for batch in batches]},
            "samples_today": selectors.samples_since(now - timedelta(hours=24)),
            "data_set_rows": selectors.data_set_rows(),
        }
    if may("trust.view_rolemetadata"):
        context["role_warnings"] = trust.expiring(now)
        context["proposals"] = [pages.proposal(waits.row) for waits in trust.proposals()]
    return context


def spread_context(spread: ModelSpread) -> dict[str, Any]:
    return {
        "of": spread,
        "bar": [_part(s.label, s.percent, f"series-{s.series}") for s in spread.slices if s.devices],
        "chart": json.dumps(_chart(spread.history)) if len(spread.history.moments) > 1 else "",
        "options": json.dumps(_OPTIONS),
        "said": f"{spread.model.name} over time: " + ", ".join(f"{s.label} {s.devices}" for s in spread.slices),
    }


def _part(title: str, value: float, css: str) -> dict[str, Any]:
    """One coloured part of unfold's progress component."""
    return {"title": title, "value": value, "progress_class": css}


def _presence_bar(presence: Presence) -> list[dict[str, Any]]:
    return [_part(row.label, row.percent, f"tone-{row.tone}") for row in presence.rows if row.devices]


def _laggards_table(laggards: Laggards) -> dict[str, Any]:
    headers = ["Device", "Runs", "Why", "Since"]
    return {"headers": headers, "rows": [_laggard(row) for row in laggards.rows]}


def _laggard(row: Laggard) -> list[str]:
    kind = selectors.REASONS.get(row.why, row.why)
    why = format_html('<span><span class="fleet-chip">{}</span> {}</span>', kind, row.detail)
    since = presentation.ago(row.since) if row.since else "-"
    runs = format_html(
        '<span class="fleet-number">{} {} <span class="fleet-quiet">→ {}</span></span>',
        row.model,
        row.runs or "none",
        row.target,
    )
    return [presentation.link(row.device), runs, why, since]


_BATCH_HEADERS = ["Device", "Samples", "State", "When"]


def _batch(batch: Batch) -> list[str]:
    dropped = f", {batch.dropped} dropped on the device" if batch.dropped else ""
    return [
        presentation.link(batch, f"{batch.device.name} {batch.model.name}"),
        f"{batch.samples} in {presentation.size(batch.length)}{dropped}",
        presentation.state(batch.state),
        presentation.ago(batch.announced_at),
    ]


def _chart(history: History) -> dict[str, Any]:
    return {
        "labels": [_label(moment, history.step) for moment in history.moments],
        "datasets": [
            {
                "label": line.label,
                "data": line.points,
                "borderColor": f"var(--series-{line.series})",
                "backgroundColor": f"var(--fill-{line.series})",
                "fill": "-1" if place else "origin",  # each band stands on the one below it
                "stepped": "middle",
                "borderWidth": 1.5,
                "pointStyle": False,
            }
            for place, line in enumerate(reversed(history.lines))
        ],
    }


def _label(moment: datetime, step: timedelta) -> str:
    local = timezone.localtime(moment)
    if step >= timedelta(days=1):
        return f"{local:%-d %b}"
    return f"{local:%H:%M}" if step < timedelta(hours=1) else f"{local:%-d %b %H:%M}"


_TICKS = {"color": "#8b95a5", "maxRotation": 0, "autoSkip": True, "autoSkipPadding": 28, "font": {"size": 11}}
_OPTIONS: dict[str, Any] = {
    "animation": False,
    "responsive": True,
    "maintainAspectRatio": False,
    "interaction": {"mode": "index", "intersect": False},
    "plugins": {"legend": {"display": False}, "tooltip": {"reverse": True, "boxWidth": 8, "boxHeight": 8}},
    "scales": {
        "x": {"stacked": True, "grid": {"display": False}, "border": {"display": False}, "ticks": _TICKS},
        "y": {
            "stacked": True,
            "beginAtZero": True,
            "border": {"display": False},
            "grid": {"tickWidth": 0},
            "ticks": _TICKS | {"precision": 0, "maxTicksLimit": 4},
        },
    },
}
