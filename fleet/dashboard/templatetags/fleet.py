"""What the templates of all rooms' admin pages take from the dashboard, beside unfold's own tags."""

from datetime import datetime

from django import template
from django.utils import timezone

from fleet import presentation
from fleet.dashboard import guard_page, pages, selectors, why
from fleet.rollouts import services
from fleet.rollouts.models import Rollout

register = template.Library()


@register.filter
def ago(moment: datetime | None) -> str:
    return presentation.ago(moment)


@register.filter
def filesize(number: float) -> str:
    return presentation.size(number)


@register.filter
def digest(value: str) -> str:
    return presentation.short(value)


@register.filter
def clock_time(moment: datetime | None) -> str:
    """`2026-11-21 17:42 CET`, in the viewer's zone."""
    return f"{timezone.localtime(moment):%Y-%m-%d %H:%M %Z}" if moment else "-"


@register.filter
def key_chip(value: str) -> str:
    """The beginning of a key's id; the whole on hover."""
    return presentation.short(value, 16)


@register.filter
def state(value: str) -> str:
    return presentation.state(value)


@register.filter
def colour(value: str) -> str:
    """The label colour of a state."""
    return presentation.STATE_COLOURS.get(value, "")


@register.simple_tag
def rollout_card(rollout: Rollout) -> selectors.RolloutCard:
    return selectors.rollout_card(rollout)


@register.filter
def count(number: int) -> str:
    """`1,000,000`: nobody counts digits."""
    return f"{number:,}"


@register.filter
def words(value: str) -> str:
    """`rolled_back` as people say it, with a capital."""
    return value.replace("_", " ").replace("-", " ").capitalize()


# What the history of a rollout says of an action, and in which colour.
_ACTIONS = {
    services.CREATE: ("Created", ""),
    services.SUBMIT: ("Submitted for approval", "warning"),
    services.SCHEDULE: ("Scheduled", "info"),
    services.APPROVE: ("Approved", "success"),
    services.REJECT: ("Rejected", "danger"),
    services.APPROVE_STAGE: ("Stage approved", "success"),
    services.START: ("Started", "info"),
    services.PAUSE: ("Paused", "warning"),
    services.RESUME: ("Resumed", "info"),
    services.CANCEL: ("Cancelled", "danger"),
    services.ROLL_BACK: ("Rolled back", "danger"),
    services.ADVANCE: ("Advanced", "success"),
    services.COMPLETE: ("Completed", "success"),
    services.HALT: ("Halted", "danger"),
}


@register.filter
def done(action: str) -> str:
    return _ACTIONS.get(action, (words(action), ""))[0]


@register.filter
def action_tone(action: str) -> str:
    return _ACTIONS.get(action, ("", ""))[1]


register.simple_tag(pages.guards, name="rollout_guards")
register.simple_tag(guard_page.evidence_of, name="rollout_evidence")
register.simple_tag(pages.aim, name="rollout_aim")
register.simple_tag(pages.outcomes, name="rollout_outcomes")
register.simple_tag(pages.device, name="device_page")
register.simple_tag(why.device_why)
register.simple_tag(pages.variants, name="release_variants")
register.simple_tag(pages.revoked, name="release_revoked")
register.simple_tag(pages.provenance, name="release_provenance")
register.simple_tag(pages.proposal, name="proposal_of")
register.simple_tag(pages.model, name="model_page")
register.simple_tag(pages.provisioning, name="provisioning")
