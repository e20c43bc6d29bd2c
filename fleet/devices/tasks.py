"""Wake-up calls. See `services` for the work; losing one loses nothing."""

from celery import shared_task

from fleet.devices import services


@shared_task
def record_spread() -> None:
    services.record_spread()


@shared_task
def retention() -> None:
    services.thin_history()
