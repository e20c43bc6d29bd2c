"""Wake-up calls. See `services` for the work; losing one loses nothing."""

from celery import shared_task

from fleet.rollouts import services
from fleet.rollouts.counting import summary


@shared_task
def tick() -> None:
    services.tick()


@shared_task
def summarise() -> None:
    summary.count()
