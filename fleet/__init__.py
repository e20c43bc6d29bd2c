"""The server. Django finds the Celery application here, so that `@shared_task` binds to it."""

from fleet.celery import app as celery_app

__all__ = ["celery_app"]
