"""The device's page: why it runs what it runs."""

from typing import Any

from django.urls import reverse
from django.utils.html import format_html

from fleet import presentation
from fleet.devices.models import Device
from fleet.rollouts import explaining, selectors

WORDS = {
    explaining.ADMITS: ("admits it", "success"),
    explaining.NOT_IN_FORCE: ("not in force", ""),
    explaining.NOT_IN_GROUP: ("not in its group", ""),
    explaining.EXCLUDED: ("excluded", "warning"),
    explaining.FAILED: ("failed", "danger"),
    explaining.LACKS: ("cannot run it", "warning"),
    explaining.NOT_RUNNING: ("paused", "warning"),
    explaining.NOT_REACHED: ("later stage", "info"),
}


def device_why(row: Device) -> list[dict[str, Any]]:
    """One entry for each of its models: a sentence, and the rollouts in the order in which they are asked."""
    return [
        {"model": told.model, "verdict": told.verdict, "by": told.by, "table": _table(told)}
        for told in selectors.explain(row)
    ]


def _table(told: explaining.Explanation) -> dict[str, Any]:
    return {
        "headers": ["Rollout", "Gives", "State", "For this device", "Because"],
        "rows": [*map(_row, told.considered)],
    }


def _row(each: explaining.Considered) -> list[Any]:
    words, colour = WORDS[each.why]
    page = reverse("admin:rollouts_rollout_change", args=[each.rollout])
    link = format_html('<a class="fleet-link" href="{}">#{}</a>', page, each.rollout)
    label = presentation.label("decides" if each.decides else words, colour)
    return [link, each.gives, presentation.state(each.state), label, each.detail]
