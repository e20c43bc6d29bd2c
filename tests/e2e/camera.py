"""A camera that was there before the fleet: it grabs a frame, asks a model, counts, and shows the counts on a page.

    python camera.py /var/lib/fleet detector

It knows the SDK by its README and nothing else of this repository.
"""
# ruff: noqa: T201, BLE001  somebody else's program

import json
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from device_sdk import Fleet


class Camera(threading.Thread):
    """Looks at a hundred frames a second, whatever becomes of it."""

    def __init__(self, model):
        super().__init__(name="camera")
        self.model = model
        self.seen = {"frames": 0, "failed": 0, "last": None, "release": "", "error": ""}
        self.over = threading.Event()

    def run(self):
        frame = np.ones((1, 4), np.float32)
        while not self.over.wait(0.01):
            self.seen["frames"] += 1
            try:
                release, outputs = self.model.run_on({"x": frame})
            except Exception as error:
                self.seen["failed"] += 1
                self.seen["error"] = repr(error)
            else:
                self.seen["last"] = float(outputs["y"][0, 0])
                self.seen["release"] = release.version


def page(fleet, camera):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(fleet.health() if self.path == "/healthz" else camera.seen).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Page)


def main(home, name):
    fleet = Fleet.open(
        home,
        intra_op_threads=1,
        on_update=lambda model, release: print(model, "is now", release, flush=True),
        on_rollback=lambda model, release, reason: print(model, "left", release, "because of", reason, flush=True),
    )
    camera = Camera(fleet.model(name))
    server = page(fleet, camera)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    camera.start()
    fleet.start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
    camera.over.set()
    camera.join()
    fleet.stop()
    print("bye", json.dumps(camera.seen), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
