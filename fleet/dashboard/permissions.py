"""Two ready-made permission groups, made at migration where they are missing; later changes by people stay.

Viewers see everything of the fleet and do nothing. Operators also act. Users and API tokens stay with superusers.
"""

from typing import Any

from django.contrib.auth.models import Group, Permission
from django.db.models import Q

VIEWERS, OPERATORS = "Viewers", "Operators"
_ROOMS = ("devices", "releases", "rollouts", "feedback", "trust")
_ACTS = (
    "operate_rollout", "add_rollout", "change_device", "add_group", "change_group", "add_enrolmenttoken",
    "change_enrolmenttoken", "add_campaign", "change_campaign", "change_model",
)  # fmt: skip


def ensure_groups(*, using: str = "default", **_signal: Any) -> None:
    seeing = Q(content_type__app_label__in=_ROOMS, codename__startswith="view_")
    acting = Q(content_type__app_label__in=_ROOMS, codename__in=_ACTS)
    for name, granted in ((VIEWERS, seeing), (OPERATORS, seeing | acting)):
        group, made = Group.objects.using(using).get_or_create(name=name)
        if made:
            group.permissions.set(Permission.objects.using(using).filter(granted))
