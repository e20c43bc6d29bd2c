"""`python -m deploy.load`: polls of many devices against the server on this machine, with and without keep-alive.

The devices are those of the database that the settings name: run it where the server runs, with its environment.
"""

import argparse
import os
import sys

from rich.console import Console
from rich.table import Table

from deploy.load.polls import Caller, Plan, RefusedError, Result, first_polls, run


def main() -> int:
    options = _options()
    console = Console()
    modes = [mode == "keep-alive" for mode in options.modes]
    plans = [Plan(options.url, options.connections, options.seconds, keep_alive) for keep_alive in modes]
    try:
        plans[0].address()
        callers = _callers(options.devices)
    except RefusedError as error:
        console.print(f"Refused: {error}", style="red")
        return 2
    console.print(f"{len(callers)} devices poll for the first time ...")
    console.print(f"answers: {dict(first_polls(options.url, callers))}")
    table = Table(
        "", "polls/s", "polls", "connections", "CPU of the server a poll", "p50", "p90", "p99", "worst", "of us"
    )
    for plan in plans:
        result = run(plan, callers, options.pid)
        table.add_row("keep-alive" if plan.keep_alive else "one connection each", *_cells(result, options.pid))
        console.print(f"answers: {dict(result.statuses)}; errors: {dict(result.errors)}")
    console.print(table)
    return 0


def percentile(result: Result, percent: float) -> float:
    """Milliseconds."""
    ordered = sorted(result.latencies) or [0.0]
    return 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _cells(result: Result, pids: list[int]) -> list[str]:
    polls = max(result.polls, 1)
    server = f"{1e6 * result.server_cpu / polls:,.0f} us" if pids else "give --pid"
    latencies = [f"{percentile(result, percent):,.1f} ms" for percent in (50, 90, 99, 100)]
    own = f"{1e6 * result.own_cpu / polls:,.0f} us"
    return [
        f"{result.polls / result.seconds:,.0f}",
        f"{result.polls:,}",
        f"{result.connections:,}",
        server,
        *latencies,
        own,
    ]


def _callers(number: int) -> list[Caller]:
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "fleet.settings")
    django.setup()
    from fleet.devices.credentials import credential_for
    from fleet.devices.models import Device

    found = Device.objects.filter(state=Device.State.ACTIVE).order_by("pk")[:number]
    callers = [Caller(device.name, credential_for(device)) for device in found]
    if not callers:
        raise RefusedError("the database has no active device to poll as")
    return callers


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.load", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a loopback address; others are refused")
    parser.add_argument("--devices", type=int, default=200, help="to poll as; each has a view signed once")
    parser.add_argument("--connections", type=int, default=256, help="open at a time")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run")
    parser.add_argument("--modes", nargs="+", choices=["keep-alive", "each"], default=["keep-alive", "each"])
    parser.add_argument(
        "--pid", type=int, action="append", default=[], help="of the server: its CPU is told, with children"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
