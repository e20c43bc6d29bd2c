"""Find devices by what people type. Of a large fleet only what an index or one comparison of labels answers."""

from django.db.models import Q, QuerySet

from fleet.devices import matching, selection
from fleet.devices.models import Device
from fleet.errors import Invalid

SMALL = 20_000  # devices, whose texts are searched for any part in a tenth of a second
HELP = (
    "Part of a name, a label or the SDK's version; or labels, such as: site=berlin, hw in (pi, nuc). "
    f"Of more than {SMALL:,} devices: how the name begins, or labels."
)


def search(rows: QuerySet[Device], typed: str) -> QuerySet[Device] | None:
    """None: the fleet is small, and any part of its texts may be looked for."""
    by_labels = _by_labels(typed)
    if by_labels is not None:
        return rows.filter(by_labels)
    return rows.filter(name__startswith=typed.strip()) if _is_large() else None


def _by_labels(typed: str) -> Q | None:
    if not set(typed) & set("=(!"):
        return None
    try:
        return matching.where(selection.parse(typed))
    except Invalid:
        return None


def _is_large() -> bool:
    """Counts up to the limit, not to the end."""
    return Device.objects.order_by()[: SMALL + 1].count() > SMALL
