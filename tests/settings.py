"""Settings for tests inside one process: tasks run at once, nothing is written outside a temporary folder."""

import atexit
import os
import shutil
import tempfile

# A folder for each of xdist's workers, which inherit that of the process that starts them: two that share it write the
# same object at the same time. What a test starts shares the test's.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if "FLEET_VAR" not in os.environ or os.environ.get("FLEET_VAR_OF", WORKER) != WORKER:
    os.environ.update(FLEET_VAR=tempfile.mkdtemp(prefix="fleet-test-"), FLEET_VAR_OF=WORKER)
    atexit.register(shutil.rmtree, os.environ["FLEET_VAR"], ignore_errors=True)

from fleet.settings import *  # noqa: E402, F403
from fleet.settings import STATIC_ROOT  # noqa: E402

STATIC_ROOT.mkdir(parents=True, exist_ok=True)  # whitenoise warns where it is missing
CELERY_TASK_ALWAYS_EAGER = True
CELERY_TASK_EAGER_PROPAGATES = True
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
