"""A model's numbers on one device, for people: what it did since it was loaded, and what it does not run on."""

from collections.abc import Mapping
from typing import Any

from django.utils.html import format_html
from django.utils.safestring import SafeString

from fleet import presentation

_COUNTS = ("calls", "errors", "invalid", "rejected", "samples_waiting", "samples_dropped")


def health(told: Mapping[str, Any]) -> str:
    """From a report of the device's: any key may be missing, any value of another kind than it should be."""
    said = [f"{told[name]:,} {name.replace('_', ' ')}" for name in _COUNTS if _is_number(told, name) and told[name]]
    if _is_number(told, "p50_us") and _is_number(told, "p95_us"):
        said.append(f"p50 {_time(told['p50_us'])}, p95 {_time(told['p95_us'])}")
    if _is_number(told, "confidence"):
        said.append(f"confidence {told['confidence']:.2f}")
    if told.get("classes"):
        said.append(f"classes {told['classes']}")
    return SafeString(" ".join([*filter(None, [fallback(told)]), presentation.chips(said)]))


def fallback(told: Mapping[str, Any]) -> str:
    """Where it was asked to run, and does not."""
    if not told.get("missing_providers"):
        return ""
    runs_on = told.get("providers") or "what there is"
    return format_html(
        '<span class="text-red-700 dark:text-red-400"><strong>No {}</strong>: it runs on {}.</span>',
        told["missing_providers"],
        runs_on,
    )


def _is_number(told: Mapping[str, Any], name: str) -> bool:
    return isinstance(told.get(name), (int, float)) and not isinstance(told[name], bool)


def _time(microseconds: float) -> str:
    if microseconds < 1_000:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"
