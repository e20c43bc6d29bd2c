"""Four eyes: what needs approval, and who may give it. Approval is never by the author, whoever that is.

A superuser who wrote a rollout is its author like anybody else; a token's account is nobody; and where the author is
not known, nobody can be told apart from them: such a rollout is not submitted.
"""

from fnmatch import fnmatchcase

from django.conf import settings
from django.contrib.auth.models import User

from fleet.accounts.services import SERVICE_PREFIX
from fleet.errors import Denied, Invalid
from fleet.rollouts.models import Rollout, RolloutAction

PERMISSION = "rollouts.approve_rollout"
WROTE = ("create", "submit")  # the actions of an author


def is_needed(rollout: Rollout) -> bool:
    """By the rollout itself, or by the setting as it is now."""
    model = rollout.release.model.name
    return rollout.needs_approval or any(fnmatchcase(model, pattern) for pattern in settings.APPROVAL)


def check_author(rollout: Rollout) -> None:
    """Before it waits for an approval that nobody could give."""
    if rollout.created_by_id is None:
        raise Invalid("author_unknown", f"rollout {rollout.pk} needs approval, and who wrote it is not known")


def stage_waits(rollout: Rollout) -> bool:
    """Whether the stage in force needs a person's word that it has not got."""
    return any(
        stage.index == rollout.stage_index and stage.needs_approval and stage.approved_at is None
        for stage in rollout.stages.all()
    )


def check_approver(rollout: Rollout, actor: User | str) -> None:
    if not isinstance(actor, User) or actor.get_username().startswith(SERVICE_PREFIX):
        raise Denied("not_a_person", "approval takes a person, named; a token's account or a shell is none")
    if not actor.is_active or not actor.has_perm(PERMISSION):
        raise Denied("not_an_approver", f"{actor.get_username()} has no right to approve rollouts")
    if rollout.created_by_id is None:
        raise Denied("author_unknown", f"who wrote rollout {rollout.pk} is not known any more: nobody can approve it")
    if is_author(rollout, actor):
        raise Denied("own_rollout", "approval is never by the author, nor by who submitted it")


def is_author(rollout: Rollout, user: User) -> bool:
    """Whether they wrote or submitted it: by their row, and by name in its history."""
    wrote = RolloutAction.objects.filter(rollout=rollout, action__in=WROTE)
    return user.pk == rollout.created_by_id or wrote.filter(actor=user.get_username()).exists()
