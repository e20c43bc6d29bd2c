"""Which failures are worth another try, and when. No IO, no clock.

Only what may pass by itself: the network, the disk, memory, a rehearsal that could not be started. A release that does
not load, fails its test or was rolled back by its health is marked bad on the device, and its fate does not change by
trying; what trust refused is never tried again as it is.
"""

from datetime import datetime, timedelta

FAILED = "failed"  # the event; `rolled_back` is never tried again
PASSING = frozenset(
    {
        "network", "disk", "memory", "stale",  # reasons of the device's own, with their detail after a colon
        "transfer", "storage", "no_rehearsal", "device_error",
        "status", "deadline", "truncated", "too_slow", "captive_portal", "missing", "bad_range",
    }
)  # fmt: skip
LONGEST = timedelta(days=7)  # between two tries


def is_passing(step: str, reason: str) -> bool:
    """Whether a failure, by its event and reason, may be none the next time."""
    return step == FAILED and reason.partition(":")[0].strip() in PASSING


def next_try(*, tries: int, retries: int, first: float, now: datetime) -> datetime | None:
    """When to try again after `tries` further tries; None: it stays failed. `first` in seconds, then it doubles."""
    if tries >= retries:
        return None
    return now + timedelta(seconds=min(first * 2.0 ** min(tries, 30), LONGEST.total_seconds()))
