"""Wake-up calls. See `services` for the work; losing one loses nothing."""

from celery import shared_task
from django.utils import timezone

from fleet.rollouts import evidence, services
from fleet.rollouts.counting import summary


@shared_task
def tick() -> None:
    services.tick()


@shared_task
def summarise() -> None:
    summary.count()


@shared_task
def retention() -> None:
    evidence.thin(timezone.now())
