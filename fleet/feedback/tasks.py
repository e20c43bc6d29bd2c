"""Wake-up calls for the feedback room. The sweep alone would do all the work, a little later.

Compaction is imported where it runs: whoever merely sends a wake-up call should not load pyarrow.
"""

from celery import shared_task

from fleet.feedback import services


@shared_task
def ingest(pk: int) -> None:
    from fleet.feedback import compaction

    compaction.ingest(pk=pk)


@shared_task
def sweep() -> None:
    """Compact what was received; forget what never came."""
    from fleet.feedback import compaction

    compaction.compact_due()
    services.expire()


@shared_task
def retention() -> None:
    services.retire()
