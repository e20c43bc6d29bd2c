"""The server's application, and beside it in the same process the least that one can answer."""

from collections.abc import Iterable
from typing import Any

from fleet.wsgi import application as fleet


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/hello":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"hello"]
    if environ["PATH_INFO"] == "/bench/table":  # how much the process keeps of its fleet
        table = fleet.feed.table
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [f"{table.size} {table.devices}".encode()]
    return fleet(environ, start_response)  # type: ignore[no-any-return]
