"""The WSGI entry point, for granian or gunicorn."""

import os
from typing import Any

from django.conf import settings
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fleet.settings")
application: Any = get_wsgi_application()
if settings.FAST_POLL:
    from fleet.api.fastpoll.wsgi import FastPoll  # needs what the line above has set up

    application = FastPoll(application)
