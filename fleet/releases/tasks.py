"""Wake-up calls for validation. Losing one loses no work: the sweep finds what is undone."""

from celery import shared_task

from fleet.releases import services, uploads, validation


@shared_task
def validate(release_pk: int) -> None:
    services.validate_release(release_pk)


@shared_task
def sweep() -> int:
    """Start what is due again, and clear away abandoned uploads and copies. Returns how many releases were due."""
    uploads.remove_abandoned()
    validation.remove_leftovers()
    due = services.unvalidated()
    for release_pk in due:
        validate.delay(release_pk)
    return len(due)
