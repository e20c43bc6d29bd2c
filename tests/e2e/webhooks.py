"""Whoever is told by webhook: it takes what is signed by the text of the Standard Webhooks, not by our code."""

import base64
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.attacks.world import Shop


class Receiver(ThreadingHTTPServer):
    """`asked`: the id of every attempt. `taken`: by id, what came signed. `busy`: so many attempts are turned away."""

    def __init__(self, busy: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.busy = busy
        self.secret = ""
        self.asked: list[str] = []
        self.taken: dict[str, Any] = {}
        self.refused: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/fleet"

    def told(self) -> set[tuple[int, str]]:
        """Rollouts, and what became of them."""
        return {(body["data"].get("rollout"), body["type"]) for body in list(self.taken.values())}


class _Answers(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key, stamp = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        shared = base64.b64decode(self.server.secret.removeprefix("whsec_"))
        mac = hmac.new(shared, f"{key}.{stamp}.".encode() + body, "sha256").digest()
        is_signed = self.headers["webhook-signature"] == "v1," + base64.b64encode(mac).decode()
        is_good = is_signed and abs(time.time() - int(stamp)) < 300
        self.server.asked.append(key)
        is_busy = len(self.server.asked) <= self.server.busy
        if not is_good:
            self.server.refused.append(key)
        elif not is_busy:
            self.server.taken[key] = json.loads(body)
        self.send_response(503 if is_busy else 204 if is_good else 400)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def receiving(shop: Shop, *events: str, busy: int = 0) -> Iterator[Receiver]:
    """A receiver that the shop's server tells; of these kinds, or of all."""
    server, name = Receiver(busy), f"hook-{shop.model}"
    wanted = [part for event in events for part in ("--event", event)]
    server.secret = shop.server.manage("notices", "add", name, server.url, *wanted).strip()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        shop.server.manage("notices", "remove", name)
