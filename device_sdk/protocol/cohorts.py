"""Sticky, uniform cohorts. Golden vectors in tests/protocol pin the values for server, SDK and docs alike."""

from hashlib import blake2b

COHORTS = 10_000


def cohort(salt: str, device: str) -> int:
    """Place `device` in 0..9999 for a rollout's `salt`: the same for ever, independent between salts.

    A stage of `p` percent admits `cohort < p * 100`, so a later, larger stage contains every earlier one.
    """
    key = f"{salt}\0{device}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") % COHORTS


def jitter(device: str, purpose: str) -> float:
    """A fixed fraction in [0, 1) of an interval by which this device shifts `purpose`: no stampede, stable tags."""
    return cohort(purpose, device) / COHORTS
