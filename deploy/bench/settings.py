"""The server's own settings, with the baselines' addresses beside the real ones, and tasks that run at once."""

from fleet.settings import *  # noqa: F403
from fleet.settings import INSTALLED_APPS, STATIC_ROOT

ROOT_URLCONF = "deploy.bench.urls"
INSTALLED_APPS = [*INSTALLED_APPS, "rest_framework.authtoken"]
CELERY_TASK_ALWAYS_EAGER = True
CELERY_TASK_EAGER_PROPAGATES = True
STATIC_ROOT.mkdir(parents=True, exist_ok=True)  # whitenoise warns where it is missing
