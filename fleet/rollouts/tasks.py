"""Wake-up calls. See `services` for the work; losing one loses nothing."""

from celery import shared_task

from fleet.rollouts import services


@shared_task
def tick() -> None:
    services.tick()
