"""Which devices a rollout is for, and its rings: read from its row. Checks what people ask for before it is stored."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

from django.db.models import Q, QuerySet

from fleet.devices import matching, selection, selectors
from fleet.devices.models import Device, Group
from fleet.devices.selection import Selector
from fleet.devices.selectors import Preview
from fleet.errors import Invalid
from fleet.rollouts.models import Rollout, Stage

if TYPE_CHECKING:
    from fleet.rollouts.services import StagePlan


# --- reading: all of these raise Invalid where a stored text does not parse ---------------------------------------


def selector(rollout: Rollout) -> Selector:
    """Its group, narrowed by its own selector."""
    return matching.selector_of(rollout.group).both(selection.parse(rollout.selector))


def excludes(rollout: Rollout) -> tuple[Selector, ...]:
    """Devices that fit any of these are left out. An excluded group of every device leaves out everyone."""
    group = [matching.selector_of(rollout.exclude_group)] if rollout.exclude_group else []
    own = [selection.parse(rollout.exclude)] if rollout.exclude else []
    return (*group, *own)


def rings(stages: Iterable[Stage], upto: int) -> tuple[Selector, ...]:
    """Those of the stages up to the one in force: who was admitted stays."""
    return tuple(matching.selector_of(stage.ring) for stage in stages if stage.ring and stage.index <= upto)


def devices(rollout: Rollout) -> QuerySet[Device]:
    """Active devices that the rollout is for; whether they run its model is not looked at."""
    left_out = Q()
    for each in excludes(rollout):
        left_out &= ~matching.where(each)
    return matching.chosen(selector(rollout)).filter(left_out)


def preview(rollout: Rollout, model: str) -> Preview:
    """How many devices a rollout is for, and some of them; also of one that was not saved yet."""
    return selectors.previewed(devices(rollout).filter(selectors.with_model(model) if model else Q()))


# --- writing -----------------------------------------------------------------------------------------------------

RING = "ring:"


def read_stage(text: str) -> dict[str, Any]:
    """What a stage admits, as people write it: `5` or `5 %`, or a group's name, with `ring:` where it looks like both.

    Raises Invalid `stages_malformed` where no group has the name.
    """
    word = text.strip()
    with suppress(ValueError):
        return {"percent": float(word.removesuffix("%"))}
    group = Group.objects.filter(name=word.removeprefix(RING)).first()
    if group is None:
        raise Invalid(
            "stages_malformed", f"stages: expected a percentage, or a group's name as a ring; got {word!r:.80}"
        )
    return {"ring": group}


def checked(*, selector: str, exclude: str, exclude_group: Group | None) -> dict[str, Any]:
    """The columns, with selectors in their one form. Raises Invalid `selector_malformed`."""
    return {
        "selector": str(selection.parse(selector)),
        "exclude": str(selection.parse(exclude)),
        "exclude_group": exclude_group,
    }


def percents(stages: Sequence["StagePlan"]) -> list[float]:
    """What each stage has reached; a ring adds nothing to the percentage. Raises Invalid `stages_malformed`."""
    given = [plan.percent for plan in stages if not plan.ring]
    rising = all(low < high for low, high in pairwise(given))
    if not stages or stages[-1].ring or not rising or given[0] <= 0 or given[-1] != 100:
        told = [f"ring {plan.ring}" if plan.ring else plan.percent for plan in stages]
        raise Invalid("stages_malformed", f"stages: percentages must rise from over 0 to 100, the last; got {told}")
    named = [plan.ring.pk for plan in stages if plan.ring]
    if len(set(named)) != len(named):
        raise Invalid("stages_malformed", "stages: each ring may stand once")
    reached, so_far = [], 0.0
    for plan in stages:
        so_far = so_far if plan.ring else plan.percent
        reached.append(so_far)
    return reached


def check_guards(stages: Sequence["StagePlan"]) -> None:
    for plan in stages:
        counts = (plan.soak_seconds, plan.min_reports, plan.failure_budget)
        share = plan.success_threshold
        if min(counts) < 0 or not (isfinite(share) and 0 <= share <= 1):
            raise Invalid("stages_malformed", f"stages: expected whole numbers, a threshold from 0 to 1; got {plan}")
