"""HTTP to the server and to the pinned blob hosts. Owns bounds and hosts; knows nothing of what the bytes mean.

Refuses: a host that is not pinned, https turned into http, a redirect that was not asked for, compressed answers,
more bytes than the caller's limit, more time than the caller's deadline. The credential goes to the server's own
origin and nowhere else. What an attacker could have caused is an UntrustedError (`redirect`, `too_large`), what the
network does by itself a TransferError.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from socket import SHUT_RDWR
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.util import SKIP_HEADER, parse_url

from device_sdk.errors import TransferError, UnauthorizedError, UntrustedError
from device_sdk.protocol import limits

CHUNK = 256 * 1024
MAX_REDIRECTS = 5
ERROR_BODY = 64 * 1024
_ERROR_SECONDS = 10.0
SLOWEST = 1024  # bytes a second over `stall_seconds`: less is no link, or somebody who holds us up
LONGEST_RETRY_AFTER = 86_400.0
_PORTS = {"http": 80, "https": 443}
_REPEATS = frozenset({307, 308})  # redirects that keep method and body
_REDIRECTS = frozenset({301, 302, 303}) | _REPEATS
_FAULTS = (requests.RequestException, HTTPError, HTTPException, OSError, ValueError)

Body = bytes | BinaryIO | None


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class StreamAnswer:
    """`chunks` raises when the limit or the deadline is passed, the body stalls, or ends early."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class _Origin:
    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "_Origin":
        """Parse as urllib3 will when it connects: two parsers that disagree are how host checks are passed."""
        parsed = parse_url(url)
        scheme, host = (parsed.scheme or "").lower(), (parsed.host or "").lower()
        if scheme not in _PORTS or not host or parsed.auth is not None:
            raise UntrustedError(f"expected a plain http(s) address; got {url!r:.200}", code="redirect")
        return cls(scheme, host, parsed.port or _PORTS[scheme])


class Transport:
    """One session to the server. `timeout` bounds each wait for the network, a call's `deadline` the whole exchange.

    Both are durations in seconds. `blob_hosts`: `host` (port of the scheme) or `host:port`. A stream is given hours,
    because links are slow; so its headers must be here within `stall_seconds`, and its body must bring `slowest` bytes
    a second over each such time, not counting what the caller takes between two reads.
    """

    def __init__(
        self,
        server: str,
        blob_hosts: Iterable[str],
        credential: str,
        *,
        timeout: float = 10.0,
        stall_seconds: float = 60.0,
        slowest: int = SLOWEST,
        session: requests.Session | None = None,
    ) -> None:
        self._server = server.rstrip("/")
        self._origin = _Origin.of(self._server)
        self._blob_hosts = frozenset(_host_rule(host) for host in blob_hosts)
        self._credential = credential
        self._timeout = timeout
        self._stall_seconds = stall_seconds
        self._slowest = slowest
        self._session = session or _new_session()

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        limit: int,
        deadline: float,
        authorise: bool = True,
    ) -> Answer:
        """Make one exchange and read its whole body, of at most `limit` bytes. `url`: absolute, or a path.

        Raises UnauthorizedError (401 of the server), TransferError (no answer, 4xx with the server's `code`, 5xx) and
        UntrustedError (`redirect`, `too_large`). 2xx and 304 come back.
        """
        exchange = _Exchange(method, body, headers or {}, time.monotonic() + deadline, authorise=authorise)
        with self._open(url, exchange) as response:
            content = b"".join(_chunks(response, limit=limit, pace=_Pace(exchange.ends)))
            return Answer(response.status_code, CaseInsensitiveDict(response.headers), content)

    @contextlib.contextmanager
    def stream(
        self, url: str, *, headers: Mapping[str, str] | None = None, limit: int, deadline: float
    ) -> Iterator[StreamAnswer]:
        """GET, and hand the body out chunk by chunk as it comes. Raises as `request` does, `chunks` included."""
        ends = time.monotonic() + deadline
        exchange = _Exchange("GET", None, headers or {}, ends, authorise=True, answer_within=self._stall_seconds)
        with self._open(url, exchange) as response:
            chunks = _chunks(response, limit=limit, pace=_Pace(ends, self._stall_seconds, self._slowest))
            yield StreamAnswer(response.status_code, CaseInsensitiveDict(response.headers), chunks)

    def close(self) -> None:
        self._session.close()

    @contextlib.contextmanager
    def _open(self, url: str, exchange: "_Exchange") -> Iterator[requests.Response]:
        response = self._follow(self._server + url if url.startswith("/") else url, exchange)
        with contextlib.closing(response):
            _refuse_encoding(response)
            if response.status_code >= 400:
                raise self._failure(response, exchange.ends)
            _refuse_portal(response)
            yield response

    def _follow(self, url: str, exchange: "_Exchange") -> requests.Response:
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(url, exchange)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                _refuse_odd_status(response)
                return response
            with contextlib.closing(response):
                exchange.allow_redirect(response.status_code, url)
                url = self._next_hop(url, location)
        raise UntrustedError(f"expected at most {MAX_REDIRECTS} redirects", code="redirect")

    def _next_hop(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
        except ValueError as error:
            raise UntrustedError(f"redirect to a malformed address {location!r:.200}", code="redirect") from error
        if urlsplit(url).scheme == "https" and not target.lower().startswith("https:"):
            raise UntrustedError(f"redirect from https to {target!r:.200} refused", code="redirect")
        return target

    def _check_host(self, url: str) -> None:
        origin = _origin_of(url)
        if origin == self._origin:
            return
        if self._origin.scheme == "https" and origin.scheme != "https":
            raise UntrustedError(f"the server is https; {url!r:.200} is not", code="redirect")
        if (origin.host, origin.port) not in {(host, port or _PORTS[origin.scheme]) for host, port in self._blob_hosts}:
            raise UntrustedError(f"{origin.host}:{origin.port} is not a pinned host", code="redirect")

    def _send(self, url: str, exchange: "_Exchange") -> requests.Response:
        left = exchange.left()
        marker = _ends_at.set(min(exchange.ends, time.monotonic() + exchange.answer_within))
        try:
            request = self._session.prepare_request(requests.Request(exchange.method, url, auth=_as_is))
            request.headers.update(self._headers(url, exchange))
            request.prepare_body(exchange.rewound_body(), None)
            self._check_host(request.url or "")  # after requests has rewritten it
            found = self._session.merge_environment_settings(request.url, {}, True, None, None)
            settings: dict[str, Any] = {**found, "timeout": min(self._timeout, left)}
            # Not Session.send: it keeps cookies, and looks at where a redirect leads and trips over hostile ones.
            return self._session.get_adapter(request.url or "").send(request, **settings)
        except _FAULTS as error:
            raise _no_answer(url, error, ends=exchange.ends) from error
        finally:
            _ends_at.reset(marker)

    def _headers(self, url: str, exchange: "_Exchange") -> dict[str, str]:
        # Said to be nothing, it is left out. A compressed answer is refused all the same.
        encoding = SKIP_HEADER if exchange.headers.get("Accept-Encoding") == "" else "identity"
        headers = {"User-Agent": "fleet-device", **exchange.headers, "Accept-Encoding": encoding}
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        if exchange.authorise and self._credential and _origin_of(url) == self._origin:
            headers["Authorization"] = f"Bearer {self._credential}"
        return headers

    def _failure(self, response: requests.Response, ends: float) -> TransferError:
        """Say what the server said. A 401 is believed only from the server's own origin, and not from a web page."""
        status, said = response.status_code, _error_body(response, ends)
        message = f"{_place(response.url)} answered {status}: {said.get('message') or response.reason}"
        code = said.get("code", "")
        if status == 401 and not _is_page(response) and _origin_of(response.url) == self._origin:
            return UnauthorizedError(message, code=code, status=status)
        return TransferError(message, code=code, status=status, retry_after=_retry_after(response))


class _Exchange:
    """What is asked, and until when (`ends`, monotonic seconds); the same over all hops."""

    def __init__(
        self,
        method: str,
        body: Body,
        headers: Mapping[str, str],
        ends: float,
        *,
        authorise: bool,
        answer_within: float = math.inf,
    ) -> None:
        self.answer_within = answer_within  # seconds, of each hop
        self.method = method
        self.headers = headers
        self.ends = ends
        self.authorise = authorise
        self._body = body
        self._start = None if body is None or isinstance(body, bytes) else body.tell()

    def left(self) -> float:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TransferError("the overall deadline has passed", code="deadline")
        return left

    def allow_redirect(self, status: int, url: str) -> None:
        if self.method not in {"GET", "HEAD"} and status not in _REPEATS:
            raise UntrustedError(f"{_place(url)} redirects a {self.method} by {status}", code="redirect")

    def rewound_body(self) -> Body:
        if self._start is not None and not isinstance(self._body, bytes) and self._body is not None:
            self._body.seek(self._start)
        return self._body


# What is read as lines (headers, the sizes and the trailer of a chunked body) and drips in byte by byte resets every
# socket timeout, and a trailer may go on for ever: a timer ends the wait by shutting the socket, in both directions,
# for what still comes in after a half shutdown would be read.

_ends_at: ContextVar[float] = ContextVar("ends_at", default=math.inf)


@contextlib.contextmanager
def _cut_after(seconds: float, sock: Any) -> Iterator[None]:
    def cut() -> None:
        with contextlib.suppress(OSError):
            if sock is not None:
                sock.shutdown(SHUT_RDWR)

    timer = threading.Timer(max(seconds, 0), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _EndsInTime(HTTPConnection):
    def getresponse(self) -> Any:
        left = _ends_at.get() - time.monotonic()
        if math.isinf(left):
            return super().getresponse()
        sock = self.sock  # http.client forgets it where the connection is to close
        with _cut_after(left, sock):
            response: Any = super().getresponse()
        response.fleet_socket = sock
        if _ends_at.get() <= time.monotonic():
            response.close()
            raise TimeoutError("headers did not end in time")  # http.client takes the cut for their end
        return response


class _Plain(HTTPConnectionPool):
    ConnectionCls = _EndsInTime


class _SecureConnection(_EndsInTime, HTTPSConnection):
    pass


class _Secure(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Plain, "https": _Secure}

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = {"http": _Plain, "https": _Secure}
        return manager


def _new_session() -> requests.Session:
    session = requests.Session()
    session.headers.clear()  # `Accept: */*` and `Connection: keep-alive` say what is so without them
    session.mount("http://", _Adapter())
    session.mount("https://", _Adapter())
    return session


def _as_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """An auth that adds nothing: it keeps requests from putting a .netrc entry over our credential."""
    return request


def _origin_of(url: str) -> _Origin:
    try:
        return _Origin.of(url)
    except (HTTPError, ValueError) as error:
        raise UntrustedError(f"expected an http(s) address; got {url!r:.200}", code="redirect") from error


def _host_rule(value: str) -> tuple[str, int | None]:
    parsed = parse_url(value if "://" in value else f"//{value}")
    if not parsed.host:
        raise ValueError(f"blob host: expected host or host:port; got {value!r:.80}")
    return parsed.host.lower(), parsed.port


class _Pace:
    """How long a body may still take: until `ends`, and at `slowest` in each window of `seconds`."""

    def __init__(self, ends: float, seconds: float = math.inf, slowest: int = SLOWEST) -> None:
        self.ends = ends
        self._seconds = seconds
        self._slowest = slowest
        self._window_ends = time.monotonic() + seconds
        self._missing = seconds * slowest

    @property
    def left(self) -> float:
        return min(self.ends, self._window_ends) - time.monotonic()

    def rested(self, seconds: float) -> None:
        """The caller did not read for so long: no fault of the sender's."""
        self._window_ends += seconds

    def took(self, size: int, place: str) -> None:
        """Count what one read brought, after however long."""
        now = time.monotonic()
        self._missing -= size
        if now > self.ends:
            raise TransferError(f"{place}: the overall deadline has passed", code="deadline")
        if self._missing <= 0:
            self._window_ends, self._missing = now + self._seconds, self._seconds * self._slowest
        elif now > self._window_ends:
            message = f"{place}: less than {self._slowest} bytes a second over {self._seconds:g} s"
            raise TransferError(message, code="too_slow")


def _chunks(response: requests.Response, *, limit: int, pace: _Pace) -> Iterator[bytes]:
    """Hand out the body as it comes: `read1` returns after one wait, so that a drip cannot hide from the deadline."""
    announced = response.headers.get("Content-Length", "")
    has_body = response.status_code != 304 and response.request.method != "HEAD"
    if has_body and announced.isdecimal() and int(announced) > limit:
        raise _too_large(response, limit)
    received = 0
    while chunk := _read(response, min(CHUNK, limit + 1 - received), pace):
        received += len(chunk)
        if received > limit:
            raise _too_large(response, limit)
        handed_out = time.monotonic()
        yield chunk
        pace.rested(time.monotonic() - handed_out)


def _read(response: requests.Response, size: int, pace: _Pace) -> bytes:
    """One read, timed. A chunked body needs a timer besides: its lines take as many waits as they have bytes."""
    sock = getattr(response.raw, "fleet_socket", None) if getattr(response.raw, "chunked", False) else None
    try:
        with _cut_after(pace.left, sock) if sock is not None else contextlib.nullcontext():
            data: bytes = response.raw.read1(size, decode_content=False) or b""
    except _FAULTS as error:
        pace.took(0, _place(response.url))
        raise _no_answer(response.url, error, ends=pace.ends) from error
    pace.took(len(data), _place(response.url))
    return data


def _too_large(response: requests.Response, limit: int) -> UntrustedError:
    return UntrustedError(f"{_place(response.url)}: expected at most {limit} bytes; more came", code="too_large")


def _refuse_encoding(response: requests.Response) -> None:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        response.close()
        raise TransferError(f"{_place(response.url)}: asked for plain bytes; got {encoding:.40}", code="encoding")


def _refuse_odd_status(response: requests.Response) -> None:
    status = response.status_code
    if not (200 <= status < 300 or status == 304 or status >= 400):
        response.close()
        raise TransferError(f"{_place(response.url)}: unexpected status {status}", code="status", status=status)


def _refuse_portal(response: requests.Response) -> None:
    """The log-in page of a hotel's network answers 200 to anything: no answer of ours, and worth trying again."""
    empty = response.status_code in {204, 304} or response.headers.get("Content-Length") == "0"
    if _is_page(response) and not empty:
        raise TransferError(f"{_place(response.url)}: a web page answered, not the server", code="captive_portal")


def _is_page(response: requests.Response) -> bool:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/html"


def _error_body(response: requests.Response, ends: float) -> dict[str, str]:
    try:
        value = json.loads(b"".join(_chunks(response, limit=ERROR_BODY, pace=_Pace(ends, _ERROR_SECONDS))))
    except (UntrustedError, TransferError, ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    shown = {"code": 64, "message": limits.REASON_CHARS}
    return {name: str(value[name])[:size] for name, size in shown.items() if isinstance(value.get(name), str)}


def _retry_after(response: requests.Response) -> float | None:
    """Seconds to wait, from either form of the header, at most a day; None where it is missing or senseless."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(value) if value.isdecimal() else _seconds_until(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _seconds_until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def _no_answer(url: str, error: Exception, *, ends: float) -> TransferError:
    code = "timeout" if isinstance(error, (requests.Timeout, TimeoutError)) else ""
    code = "truncated" if "IncompleteRead" in str(error) else code  # in whatever it comes wrapped
    code = "deadline" if time.monotonic() >= ends else code
    return TransferError(f"{_place(url)}: {type(error).__name__}: {error!s:.300}", code=code)


def _place(url: str) -> str:
    """An address without its query, which may be a presigned secret."""
    return url.partition("?")[0][:200]
