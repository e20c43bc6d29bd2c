"""`make load`: polls of many devices against the real server on this machine, with and without keep-alive.

It makes a fleet at rest on SQLite and a granian of its own, and ends both. Loopback only.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.bench.poll import resting_fleet
from deploy.load.polls import MOST_CONNECTIONS, MOST_SECONDS, Plan, RefusedError, Result, run

COLUMNS = ("", "polls/s", "polls", "connections", "errors", "p50", "p99", "worst", "CPU of the server", "of the caller")


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        results = _measured(options)
    except RefusedError as error:
        console.print(f"Refused: {error}", style="red")
        return 2
    table = Table(
        *COLUMNS, title=f"Polls of {options.devices:,} devices, {options.connections:,} connections at a time"
    )
    for name, result in results.items():
        table.add_row(name, *_cells(result))
        console.print(f"{name}: answers {dict(result.statuses)}, errors {dict(result.errors)}")
    console.print(table)
    console.print(f"CPU a poll; the server has one core. Load average {os.getloadavg()[0]:.1f}.")
    return 0 if all(set(result.statuses) <= {200, 304} for result in results.values()) else 1


def _measured(options: argparse.Namespace) -> dict[str, Result]:
    modes = {"keep-alive": True, "a connection for each poll": False}
    with tempfile.TemporaryDirectory(prefix="fleet-load-") as folder:
        plan = Plan("http://127.0.0.1", options.connections, options.seconds)
        plan.address()  # refuses before anything is made
        with resting_fleet(Path(folder) / "fleet", options.devices, 1, "fleet.wsgi:application") as fleet:
            fleet.target(fleet.polls, b"HTTP/1.1 304").until_from_memory(min(options.devices, 1_000))
            url = f"http://127.0.0.1:{fleet.port}"
            return {
                name: run(Plan(url, options.connections, options.seconds, kept), fleet.polls, fleet.pid)
                for name, kept in modes.items()
            }


def percentile(result: Result, percent: float) -> float:
    """Milliseconds."""
    ordered = sorted(result.latencies) or [0.0]
    return 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _cells(result: Result) -> list[str]:
    polls = max(result.polls, 1)
    latencies = [f"{percentile(result, percent):,.1f} ms" for percent in (50, 99, 100)]
    spent = [f"{1e6 * each / polls:,.0f} us" for each in (result.server_cpu, result.own_cpu)]
    errors = sum(result.errors.values())
    counts = [f"{result.polls / result.seconds:,.0f}", f"{result.polls:,}", f"{result.connections:,}", f"{errors:,}"]
    return [*counts, *latencies, *spent]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make load", description=__doc__)
    parser.add_argument("--devices", type=int, default=20_000, help="of the fleet; up to 20,000 of them poll")
    parser.add_argument("--connections", type=int, default=1_000, help=f"open at a time, up to {MOST_CONNECTIONS:,}")
    parser.add_argument("--seconds", type=float, default=15.0, help=f"of each run, up to {MOST_SECONDS:g}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
