"""What `fleet.rollouts.counting` counts, counted one device after the other by the policy itself: the reference."""

from collections.abc import Iterator
from typing import Any

from fleet.devices.models import Device
from fleet.devices.selectors import members, offline_before
from fleet.rollouts import policy, selectors, targeting
from fleet.rollouts.models import Outcome, Rollout
from fleet.rollouts.selectors import COMMITTED, FAILED, UPDATING, Progress, outcome_counts


def assigned(rollout: Rollout) -> Iterator[Device]:
    """Active devices that should run the release because of this rollout."""
    return selectors.assigned_among(rollout, members(None))


def tally(rollout: Rollout) -> policy.Tally:
    counts, pending = outcome_counts(rollout), selectors.to_be_retried(rollout)
    committed, failed = counts[COMMITTED], max(counts[FAILED] - pending - rollout.forgiven, 0)
    said = dict(Outcome.objects.filter(rollout=rollout).values_list("device_id", "state"))
    horizon = min(rollout.stage_since or offline_before(), offline_before())
    undecided = sum(
        said.get(device.pk, UPDATING) not in {COMMITTED, FAILED}
        and (device.pk in said or (device.last_seen is not None and device.last_seen >= horizon))
        for device in assigned(rollout)
    )
    return policy.Tally(committed=committed, failed=failed, admitted=committed + failed + undecided + pending)


def progress(rollout: Rollout) -> Progress:
    said = set(Outcome.objects.filter(rollout=rollout).values_list("device_id", flat=True))
    total = sum(rollout.release.model.name in device.model_names for device in targeting.devices(rollout))
    counts: dict[str, Any] = {str(state): number for state, number in outcome_counts(rollout).items()}
    return Progress(total=total, admitted=len(said | {device.pk for device in assigned(rollout)}), **counts)


def laggards() -> set[tuple[int, str, str]]:
    return {(each.device.pk, each.model, each.why) for each in selectors.laggards()}
