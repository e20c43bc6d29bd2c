"""What the world is told of a rollout, written in the transaction of the change. Sending is the notices' business."""

from typing import Any

from django.conf import settings

from fleet.notices import services as notices
from fleet.rollouts.models import Rollout

WANTED, STAGE_WANTED = "rollout.approval_wanted", "rollout.stage_approval_wanted"
KINDS = {
    "submit": (WANTED, "waits for approval"),
    "approve": ("rollout.approved", "was approved"),
    "reject": ("rollout.rejected", "was rejected"),
    "schedule": ("rollout.scheduled", "will begin by itself"),
    "start": ("rollout.started", "has started"),
    "advance": ("rollout.stage_passed", "has passed a stage"),
    "approve_stage": ("rollout.stage_approved", "may pass its stage"),
    "pause": ("rollout.paused", "was paused"),
    "resume": ("rollout.resumed", "was resumed"),
    "halt": ("rollout.halted", "was halted"),
    "roll_back": ("rollout.rolled_back", "was rolled back"),
    "cancel": ("rollout.cancelled", "was cancelled"),
    "complete": ("rollout.completed", "is complete"),
}
ALL = (*(kind for kind, _ in KINDS.values()), STAGE_WANTED)


def tell(rollout: Rollout, action: str, actor: str, comment: str) -> None:
    """Of a move that was made; `rollout` as it is after it."""
    kind, words = KINDS[action]
    _publish(rollout, kind, f"Rollout {rollout} {words}", actor, comment)


def tell_stage_wanted(rollout: Rollout) -> None:
    _publish(rollout, STAGE_WANTED, f"Rollout {rollout} waits for approval to pass its stage", "", "")


def _publish(rollout: Rollout, kind: str, title: str, actor: str, comment: str) -> None:
    data: dict[str, Any] = {
        "rollout": rollout.pk,
        "model": rollout.release.model.name,
        "version": rollout.release.version,
        "group": rollout.group.name if rollout.group else None,
        "state": rollout.state,
        "stage": rollout.stage_index + 1,
        "actor": actor,
        "comment": comment,
        "url": f"{settings.PUBLIC_URL}/admin/rollouts/rollout/{rollout.pk}/change/",
    }
    notices.publish(kind, f"{title}: {comment}" if comment else title, data)
