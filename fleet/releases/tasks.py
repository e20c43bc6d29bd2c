"""Wake-up calls for validation and patches. Losing one loses no work: the sweep finds what is undone."""

from celery import shared_task

from fleet.releases import services, uploads, validation
from fleet.releases.deltas import services as deltas


@shared_task
def validate(release_pk: int) -> None:
    services.validate_release(release_pk)


@shared_task
def make_patch(patch_pk: int) -> None:
    """One patch, and a call for the next."""
    if deltas.make(patch_pk):
        for next_pk in deltas.undone()[:1]:
            make_patch.delay(next_pk)


@shared_task
def sweep() -> int:
    """Start what is due again, and clear away abandoned uploads and copies. Returns how many releases were due."""
    uploads.remove_abandoned()
    validation.remove_leftovers()
    due = services.unvalidated()
    for release_pk in due:
        validate.delay(release_pk)
    for patch_pk in deltas.undone()[:1]:
        make_patch.delay(patch_pk)
    return len(due)
