"""What the templates of all rooms' admin pages take from the dashboard, beside unfold's own tags."""

from datetime import datetime

from django import template

from fleet import adminkit
from fleet.dashboard import selectors
from fleet.rollouts.models import Rollout

register = template.Library()


@register.filter
def ago(moment: datetime | None) -> str:
    return adminkit.ago(moment)


@register.filter
def filesize(number: float) -> str:
    return adminkit.size(number)


@register.filter
def digest(value: str) -> str:
    return adminkit.short(value)


@register.filter
def state(value: str) -> str:
    return adminkit.state(value)


@register.filter
def colour(value: str) -> str:
    """The label colour of a state."""
    return adminkit.STATE_COLOURS.get(value, "")


@register.simple_tag
def rollout_card(rollout: Rollout) -> selectors.RolloutCard:
    return selectors.rollout_card(rollout)
