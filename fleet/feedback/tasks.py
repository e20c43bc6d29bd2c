"""Wake-up calls for the feedback room. The sweep alone would do all the work, a little later."""

from celery import shared_task

from fleet.feedback import services


@shared_task
def ingest(pk: int) -> None:
    services.ingest(pk=pk)


@shared_task
def sweep() -> None:
    """Compact what was received; forget what never came."""
    services.compact_due()
    services.expire()


@shared_task
def retention() -> None:
    services.retire()
