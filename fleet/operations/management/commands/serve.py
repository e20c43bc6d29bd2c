"""`manage.py serve`: the whole server on one machine, web processes and the worker with its clock."""

import os
import shutil
import socket
import sys
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError

import fleet.operations
from fleet.operations.supervisor import Child, Supervisor

GRANIAN_LOGGING = Path(fleet.operations.__file__).with_name("granian.json")


class Command(BaseCommand):
    help = "Serve: granian for the web and a Celery worker with beat, restarted when they fall, ended together."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument("--workers", type=int, default=settings.WEB_WORKERS, help="web processes")
        parser.add_argument("--threads", type=int, default=settings.WEB_THREADS, help="of each web process")
        parser.add_argument("--task-workers", type=int, default=settings.TASK_WORKERS, help="processes that run tasks")
        parser.add_argument("--web", action=BooleanOptionalAction, default=True)
        parser.add_argument("--tasks", action=BooleanOptionalAction, default=True)
        parser.add_argument("--beat", action=BooleanOptionalAction, default=True, help="one machine is enough")
        parser.add_argument(
            "--migrate",
            action=BooleanOptionalAction,
            default=not settings.PRODUCTION,
            help="prepare the database and the static files first (default: yes, but not in production)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        children = _children(options)
        if not children:
            raise CommandError("nothing to serve: leave --no-web or --no-tasks out")
        if options["web"]:
            _require_free(options["host"], options["port"])
        if options["migrate"]:
            call_command("migrate", verbosity=0, interactive=False)
            call_command("collectstatic", verbosity=0, interactive=False)
        if options["web"]:
            self.stdout.write(f"serve  | Fleet is at http://{options['host']}:{options['port']}/ ; Ctrl-C ends it")
            self.stdout.flush()
        Supervisor(children, environment=_environment(), prefixed=not settings.LOG_JSON).run()


def _children(options: dict[str, Any]) -> list[Child]:
    children = []
    if options["web"]:
        children.append(Child("web", _web(options)))
    if options["tasks"]:
        children.append(Child("tasks", _tasks(options)))
    return children


def _web(options: dict[str, Any]) -> list[str]:
    return [
        *(sys.executable, "-m", "granian", "--interface", "wsgi", "--no-ws"),
        *("--host", options["host"], "--port", str(options["port"])),
        # Without a bound, granian starts up to 512 threads, each with a connection to the database.
        *("--workers", str(options["workers"]), "--blocking-threads", str(options["threads"])),
        *("--respawn-failed-workers", "--workers-kill-timeout", "15"),
        *("--log-config", str(GRANIAN_LOGGING), "--working-dir", str(settings.BASE_DIR)),
        "fleet.wsgi:application",
    ]


def _tasks(options: dict[str, Any]) -> list[str]:
    return [
        *(sys.executable, "-m", "celery", "--quiet", "--workdir", str(settings.BASE_DIR), "-A", "fleet", "worker"),
        *("--concurrency", str(options["task_workers"]), "--loglevel", settings.LOG_LEVEL),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),  # one worker has nobody to talk to
        *(["--beat"] if options["beat"] else []),
    ]


def _environment() -> dict[str, str]:
    """Metrics of all processes meet in a folder, new at each start: the figures of dead processes would stay in it."""
    folder = settings.VAR / "metrics"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": os.environ.get("DJANGO_SETTINGS_MODULE", "fleet.settings"),
        "PROMETHEUS_MULTIPROC_DIR": str(folder),
        "PYTHONUNBUFFERED": "1",
    }


def _require_free(host: str, port: int) -> None:
    """Say it once and plainly, rather than restart a web process that can never start."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise CommandError(f"cannot listen on {host}:{port}: {error.strerror}; try another --port") from error
