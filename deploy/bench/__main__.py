"""`make bench`: measure, print, write deploy/bench/RESULTS.md. Some twenty minutes; `--only … --write`: a portion."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from deploy.bench import (
    delta,
    fleets,
    footprint,
    guards,
    plateau,
    poll,
    report,
    server,
    signing,
    startup,
    store,
    swap,
    wire,
    wrapper,
)
from deploy.bench.measure import FULL, SMALL, TINY, Scale, Section

RESULTS = Path(__file__).with_name("RESULTS.md")
OF_DEVICES = {
    "wrapper": wrapper, "swap": swap, "plateau": plateau, "startup": startup, "store": store, "memory": footprint,
    "delta": delta, "guards": guards,
}  # fmt: skip
OF_SERVERS = {"poll": poll, "signing": signing, "wire": wire, "fleet": fleets}
NAMES = (*OF_DEVICES, *OF_SERVERS)


def main() -> int:
    options = _options()
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 170)
    sections, parts = {}, {}
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        for name, section in _measure(Path(folder), _scale(options), options.only):
            report.show(console, section)
            sections[name], parts[name] = section, report.written(section)
    if options.json:
        print(json.dumps({name: asdict(section) for name, section in sections.items()}))
    if _scale(options) is FULL and (options.write or len(sections) == len(NAMES)):
        kept = report.split(RESULTS.read_text()) | parts
        RESULTS.write_text(report.page({name: kept[name] for name in NAMES if name in kept}))
        console.print(f"Written to {RESULTS}")
    return 0


def _measure(folder: Path, scale: Scale, names: Sequence[str]) -> Iterator[tuple[str, Section]]:
    """Devices first: the server's world brings threads and memory of its own."""
    for name in (name for name in OF_DEVICES if name in names):
        yield name, OF_DEVICES[name].measure(_make(folder / name), scale)
    if not set(OF_SERVERS) & set(names):
        return
    server.set_up(_make(folder / "var"))
    world = server.Server()
    for name in (name for name in OF_SERVERS if name in names):
        yield name, OF_SERVERS[name].measure(_make(folder / name), scale, world)


def _scale(options: argparse.Namespace) -> Scale:
    return TINY if options.tiny else SMALL if options.small else FULL


def _make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, help="these alone; RESULTS.md stays as it is, or see --write"
    )
    parser.add_argument("--write", action="store_true", help="put what is measured into RESULTS.md, and leave the rest")
    parser.add_argument("--small", action="store_true", help="on smaller models, fewer devices: minutes, not an hour")
    parser.add_argument("--tiny", action="store_true", help="a few calls of each, which proves only that they run")
    parser.add_argument("--json", action="store_true", help="the figures on standard output")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
