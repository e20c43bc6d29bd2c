"""The Celery application. A task is a wake-up call: the sweeps in `CELERY_BEAT_SCHEDULE` find what is undone."""

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fleet.settings")

app = Celery("fleet")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
