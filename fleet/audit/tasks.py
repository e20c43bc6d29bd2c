"""The sweep: what a process that died after its commit left unsealed."""

from celery import shared_task

from fleet.audit import services


@shared_task
def seal() -> None:
    services.seal()
