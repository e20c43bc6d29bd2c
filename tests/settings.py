"""Settings for tests inside one process: tasks run at once, nothing is written outside a temporary folder."""

import atexit
import os
import shutil
import tempfile

if "FLEET_VAR" not in os.environ:
    os.environ["FLEET_VAR"] = tempfile.mkdtemp(prefix="fleet-test-")
    atexit.register(shutil.rmtree, os.environ["FLEET_VAR"], ignore_errors=True)

from fleet.settings import *  # noqa: F403
from fleet.settings import STATIC_ROOT

STATIC_ROOT.mkdir(parents=True, exist_ok=True)  # whitenoise warns where it is missing
CELERY_TASK_ALWAYS_EAGER = True
CELERY_TASK_EAGER_PROPAGATES = True
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
