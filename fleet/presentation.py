"""How a date, a size, a digest or a state looks on every admin page. No unfold here: template tags load this early."""

import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django.db.models import Model
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.timesince import timesince

# How a state looks, everywhere: the names of unfold's label colours.
STATE_COLOURS = {
    "active": "success", "pending": "warning", "revoked": "danger",
    "withdrawn": "", "validating": "info", "valid": "success", "invalid": "danger",
    "draft": "", "awaiting_approval": "warning", "scheduled": "info", "running": "info", "paused": "warning",
    "halted": "danger", "cancelled": "", "completed": "success",
    "updating": "info", "committed": "success", "failed": "danger", "rolled_back": "danger", "refused": "danger",
    "refusing": "danger", "accepted": "success",
    "waiting": "warning", "downloading": "info", "verifying": "info", "testing": "info", "activating": "info",
    "probation": "info", "health": "",
    "announced": "info", "received": "info", "ingested": "success", "rejected": "danger",
    "ready": "success", "useless": "", "sent": "success", "dead": "danger",
}  # fmt: skip


CHOSEN = "dashboard/parts/chosen.html"


def page_of(row: Model) -> str:
    """The admin's address of a row."""
    meta = row._meta  # noqa: SLF001  # Django's documented name for it
    return reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[row.pk])


def audit_link(kind: str, target: str) -> str:
    """To what the audit trail says of a thing."""
    query = urlencode({"target_kind": kind, "target": target})
    return format_html(
        '<a class="fleet-link" href="{}?{}">Audit trail</a>', reverse("admin:audit_auditentry_changelist"), query
    )


def link(row: Model | None, text: str = "") -> str:
    if row is None:
        return "-"
    return format_html('<a class="fleet-link" href="{}">{}</a>', page_of(row), text or str(row))


def ago(moment: datetime | None, *, never: str = "never") -> str:
    """`5 minutes ago`, with the exact time in the viewer's zone on hover."""
    if moment is None:
        return format_html('<span class="fleet-quiet">{}</span>', never)
    local = timezone.localtime(moment)
    return format_html(
        '<time datetime="{}" title="{}" class="fleet-time">{}</time>',
        moment.isoformat(),
        f"{local:%Y-%m-%d %H:%M:%S %Z}",
        distance(moment, timezone.now()),
    )


def moment(at: datetime | None, *, never: str) -> str:
    """The exact time in the viewer's zone, and how far away it is."""
    if at is None:
        return format_html('<span class="fleet-quiet">{}</span>', never)
    return format_html(
        '<time datetime="{}" class="fleet-time">{}</time> <span class="fleet-quiet">{}</span>',
        at.isoformat(),
        f"{timezone.localtime(at):%Y-%m-%d %H:%M %Z}",
        distance(at, timezone.now()),
    )


def distance(moment: datetime, now: datetime) -> str:
    """`just now`, `5 minutes ago`, `in 3 days`: the largest unit only."""
    if abs((now - moment).total_seconds()) < 60:
        return "just now"
    if moment > now:
        return f"in {timesince(now, moment, depth=1)}"
    return f"{timesince(moment, now, depth=1)} ago"


def presence(seen: datetime | None, offline_before: datetime) -> str:
    """A dot and when: green while the device answers, grey while it is a little late, red after a day."""
    day_ago = timezone.now() - timedelta(days=1)
    tone = "good" if seen and seen >= offline_before else "quiet" if seen and seen > day_ago else "bad"
    return format_html('<span class="fleet-row"><span class="fleet-dot tone-{}"></span>{}</span>', tone, ago(seen))


def json_block(text: str) -> str:
    """JSON, indented, in a scrolling block."""
    with suppress(ValueError):  # shown as it came
        text = json.dumps(json.loads(text), indent=2)
    return format_html('<pre class="fleet-json" tabindex="0">{}</pre>', text)


def chosen(found: Any) -> SafeString:
    """A `devices.selectors.Preview`: how many, and some of them."""
    return render_to_string(CHOSEN, {"found": found, "more": found.total - len(found.first)})


def not_chosen(error: str) -> SafeString:
    """What is wrong with how devices are chosen."""
    return render_to_string(CHOSEN, {"error": error})


def state(value: str, words: str = "") -> str:
    """A state as unfold's label, in its colour."""
    return label(words or value.replace("_", " "), STATE_COLOURS.get(value, ""))


def label(text: str, colour: str) -> str:
    """Unfold's label, in one of its colours."""
    return render_to_string("unfold/helpers/label.html", {"text": text, "type": colour, "size": "md"})


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def span(seconds: float) -> str:
    """`90 s`, `2 h`, `7 d`."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:g} s"


def clock(minute: int) -> str:
    """A minute of the day as `01:30`."""
    return f"{minute // 60:02}:{minute % 60:02}"


def short(digest: str, length: int = 12) -> str:
    """A digest that nobody reads whole; the whole stands on hover."""
    return format_html('<code class="fleet-code" title="{}">{}</code>', digest, digest[:length])


def chips(labels: Iterable[str]) -> str:
    """Small grey tags in a row."""
    parts = [format_html('<span class="fleet-chip">{}</span>', text) for text in labels]
    return SafeString(" ".join(parts)) if parts else "-"


def selector(text: str) -> str:
    """A label selector as it is written."""
    return format_html('<code class="fleet-code">{}</code>', text) if text else "every device"


def label_chips(labels: dict[str, Any]) -> str:
    """`site=north` tags of a label mapping."""
    return chips(f"{key}={value}" for key, value in sorted(labels.items()))
