"""The Celery application. A task is a wake-up call: the sweeps in `CELERY_BEAT_SCHEDULE` find what is undone."""

import os
from typing import Any

from celery import Celery
from celery.signals import setup_logging
from django_structlog.celery.steps import DjangoStructLogInitStep
from kombu.transport import TRANSPORT_ALIASES

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fleet.settings")
TRANSPORT_ALIASES["fleet-files"] = "fleet.operations.broker:Transport"

app = Celery("fleet")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(DjangoStructLogInitStep)


@setup_logging.connect
def _leave_logging_alone(**kwargs: Any) -> None:
    """Django has set it up; a receiver is what keeps Celery from doing it again."""
