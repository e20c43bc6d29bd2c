"""What approvers do: approve, reject, let a stage pass. Who may is `approval`'s; the moves are the services'."""

from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from fleet.errors import Conflict, Denied
from fleet.rollouts import approval, services, snapshots
from fleet.rollouts.models import Rollout, Stage


@transaction.atomic
def approve(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Let it begin: now, or when its time comes. Of two who decide at once one does, the other gets Conflict."""
    row = services.fetch(rollout)
    services.after(row, services.APPROVE)
    approval.check_approver(row, actor)
    services.check_release(row.release)
    approved = services.claim(row, services.APPROVE, actor, comment)
    if not services.is_early(approved):
        return services.begin(approved, actor, comment)  # which stamps the change
    snapshots.bump()
    return approved


@transaction.atomic
def reject(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """For good: no device is ever offered it. Who wants it all the same writes another."""
    row = services.fetch(rollout)
    services.after(row, services.REJECT)
    if not isinstance(actor, User) or not actor.has_perm(approval.PERMISSION):
        raise Denied("not_an_approver", "rejecting a rollout takes a person with the right to approve")
    return services.move(row, services.REJECT, actor, comment)


@transaction.atomic
def approve_stage(*, rollout: Rollout | int, actor: User | str, comment: str = "") -> Rollout:
    """Let the stage in force pass once it has done well. It may be given before that."""
    row = services.fetch(rollout)
    services.after(row, services.APPROVE_STAGE)
    if not approval.stage_waits(row):
        raise _not_waiting(row)
    approval.check_approver(row, actor)
    moved = services.move(row, services.APPROVE_STAGE, actor, comment)
    waiting = Stage.objects.filter(rollout=row, index=row.stage_index, needs_approval=True, approved_at=None)
    if not waiting.update(approved_at=timezone.now(), approved_by=services.name_of(actor)):
        raise _not_waiting(row)
    services.wake_engine()
    return moved


def _not_waiting(row: Rollout) -> Conflict:
    return Conflict("wrong_state", f"stage {row.stage_index + 1} of rollout {row.pk} does not wait for approval")
