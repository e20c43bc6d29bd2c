"""`make demo`: six steps from a trust root to a better model, then the admin stays up to look at."""

import argparse
import signal
import sys
import threading
from pathlib import Path

from rich.console import Console

from deploy.demo.story import Story
from deploy.demo.world import ROOT, DemoError, World, free_port


def main() -> int:
    options = _options()
    console = Console()
    world = World(var=options.var, port=free_port(options.port))
    story = Story(world, console, devices=options.devices, processes=options.processes)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell had set it to be ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the children
    try:
        story.tell()
        healthy = story.summary()
        if not options.exit:
            console.print("\nThe server and the devices keep running. [bold]Ctrl-C[/] ends them.")
            threading.Event().wait()
        return 0 if healthy else 1
    except DemoError as error:
        console.print(f"[bold red]The demonstration stopped:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("\nEnding what was started …")
        return 0
    finally:
        world.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--devices", type=int, default=30)
    parser.add_argument("--processes", type=int, default=3, help="that the devices are spread over")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--var", type=Path, default=ROOT / "var" / "demo")
    parser.add_argument("--exit", action="store_true", help="end after the summary; exit code 0 if all went well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
