"""Settings for tests inside one process: tasks run at once, nothing is written outside a temporary folder."""

import os
import tempfile

os.environ.setdefault("FLEET_VAR", tempfile.mkdtemp(prefix="fleet-test-"))

from fleet.settings import *  # noqa: F403

CELERY_TASK_ALWAYS_EAGER = True
CELERY_TASK_EAGER_PROPAGATES = True
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
STATIC_ROOT.mkdir(parents=True, exist_ok=True)  # noqa: F405  # whitenoise warns where there is none
