"""Name what a view is made of, but for time. In three parts, so that whoever names many views names each part once:
the device, what it is assigned, and what is the same for every device.
"""

from collections.abc import Iterable
from hashlib import sha256

from device_sdk.protocol import fields
from device_sdk.protocol.assignment import Assignment
from fleet.trust import keys, selectors


def of_assignments(assignments: Iterable[Assignment]) -> str:
    ordered = sorted(assignments, key=lambda item: item.model)
    parts = [[item.model, item.length, item.sha256, item.to_custom()] for item in ordered]
    return sha256(fields.canonical({"assignments": parts})).hexdigest()


def of_trust(trusted: selectors.InForce) -> str:
    """The online key, and every role. No snapshot lists the root, and yet a new root counts: devices must learn of it
    at their next poll, not when the view runs out.
    """
    parts = {
        "key": keys.online_public(selectors.holders(trusted)).keyid,
        "root": [trusted.root.version, trusted.root.sha256] if trusted.root else [],
        "roles": [[ref.role, ref.version, ref.sha256] for ref in trusted.roles],
    }
    return sha256(fields.canonical(parts)).hexdigest()


def of_view(device: str, assignments: str, trust: str) -> str:
    """`assignments` and `trust` as named above."""
    return sha256(f"{device}\0{assignments}\0{trust}".encode()).hexdigest()
