"""Wake-up calls. See `services` for the work; losing one loses nothing."""

from celery import shared_task

from fleet.notices import services


@shared_task
def deliver(pk: int) -> None:
    services.deliver(pk)


@shared_task
def sweep() -> None:
    services.sweep()


@shared_task
def retention() -> None:
    services.retire()
