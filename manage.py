#!/usr/bin/env python
"""Django's command line for the server. `ceremony` alone runs without settings: its machine is not the server."""

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line


def ceremony() -> None:
    """No settings, no database, no apps: an offline machine has none of them, and a start costs a fraction."""
    settings.configure()
    from fleet.trust.management.commands.ceremony import Command

    Command().run_from_argv(sys.argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ceremony"]:
        ceremony()
    else:
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fleet.settings")
        execute_from_command_line(sys.argv)
