"""A scripted HTTP server on the loopback: says what a test tells it to, lies included, and keeps what it was asked."""

import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """`body` an iterable: written piece by piece, without a length, until it ends or the client leaves.

    `raw`: these bytes on the socket and nothing else.
    """

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: Iterable[bytes] | None = None


Route = Callable[[Asked], Reply]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that leaves in mid-answer is what many of these tests are about."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Loopback:
    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.asked: list[Asked] = []
        self._scheme = "http"
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self.host}"

    def speak_tls(self, certificate: Path) -> None:
        """Before `start`: https by this file of a private key and its certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "https"

    def on(self, path: str, reply: Reply | Route) -> None:
        self.routes[path] = reply if callable(reply) else lambda _: reply

    def route(self, asked: Asked) -> Reply:
        route = self.routes.get(asked.path.partition("?")[0])
        return route(asked) if route else Reply(404, b'{"code": "not_found", "message": "no such path"}')

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type["_Handler"]:
        return type("Handler", (_Handler,), {"loopback": self})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loopback: Loopback

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(self.command, self.path, dict(self.headers.items()), body)
        self.loopback.asked.append(asked)
        reply = self.loopback.route(asked)
        try:
            self.say(reply)
        except OSError:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

    def say(self, reply):
        if reply.raw is not None:
            self.close_connection = True
            self.write(reply.raw)
            return
        self.send_response(reply.status)
        whole = isinstance(reply.body, bytes)
        length = {"Content-Length": str(len(reply.body))} if whole else {"Connection": "close"}
        headers = {**length, **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.close_connection = not whole or headers["Content-Length"] != length["Content-Length"]
        self.end_headers()
        self.write([reply.body] if whole else reply.body)

    def write(self, pieces):
        for piece in pieces:
            self.wfile.write(piece)


@contextmanager
def loopback() -> Iterator[Loopback]:
    server = Loopback()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def blob_route(data: bytes, *, ranges: bool = True) -> Route:
    """Serve a blob as the real server does."""

    def route(asked: Asked) -> Reply:
        wanted = asked.headers.get("Range", "")
        if not ranges or not wanted:
            return Reply(200, data, {"Content-Type": "application/octet-stream"})
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), int(last or len(data) - 1) + 1
        return Reply(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    return route
