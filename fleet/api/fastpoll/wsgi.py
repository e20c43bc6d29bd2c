"""The wrapper around Django's WSGI application. It answers a poll whose answer it knows, and has no opinion on others.

The first look at a poll compares hashes of its credential and its tag with those that were found good before; it is
the whole cost of an idle poll. A second look checks both in full and asks the policy. Whoever passes neither meets
Django, which also words every refusal.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from time import monotonic, time
from typing import Any

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.core.handlers.wsgi import WSGIRequest
from django.http import HttpResponse
from django_prometheus.middleware import Metrics

from device_sdk.protocol import polls
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.polls import Tag, running_digest
from fleet.api.fastpoll.feed import Feed
from fleet.api.fastpoll.table import Table
from fleet.devices import credentials, seen
from fleet.errors import Unauthorized

PLAIN, BODIES = 1_000, 1_024  # forms of requests, and answers, that are kept
FIRST = Tag(0, running_digest({}))
VIEW = "device-poll"  # as the counters call it
_QUERY = re.compile(r"(?:root=([0-9]{1,9}))?")

Environ = dict[str, Any]


class FastPoll:
    """`django` is the application that it wraps."""

    def __init__(self, django: Any) -> None:
        self._django = django
        self.tally = Tally()
        self.feed = Feed(each_time=self.tally.flush)
        self._bodies = Bodies()
        self._plain: dict[tuple[str | None, ...], bool] = {}
        interval = (polls.INTERVAL_HEADER, f"{settings.POLL_INTERVAL:g}")
        self._full = [("Cache-Control", "private, no-cache"), interval]
        # Bytes count here: no device keeps a 304, and nobody else may, so it tells nothing that a 200 has told. The
        # interval goes without saying where it is the default; an own name is shorter than granian's.
        self._short = [("Server", "Fleet"), *([interval] if interval[1] != polls.DEFAULT_INTERVAL else [])]
        self._secure = (settings.SECURE_PROXY_SSL_HEADER or ("", ""))[0]  # names what tells the outer scheme

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == polls.POLL:
            return self._poll(environ, start_response)
        return self._django(environ, start_response)  # type: ignore[no-any-return]

    def _poll(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        """1. a table that is stale, or a request that is odd in any way: Django
        2. credential and tag are those that were found good before, and nothing changed since: 304
        3. look at them in full: 304, or a bundle that is kept, or Django
        """
        feed, text, now = self.feed, environ.get("HTTP_IF_NONE_MATCH"), time()
        table = feed.table
        if monotonic() > feed.good_until or not self._is_plain(environ):
            feed.ensure()
            return self._django(environ, start_response)  # type: ignore[no-any-return]
        device = _known(table, environ.get("HTTP_AUTHORIZATION", ""))
        if (
            text
            and table.told[device] == hash(text)
            and table.settled[device] >= table.since[table.kind[device]]
            and now < table.until[device]
        ):
            return self._answer(device, text, text[-17:-1], now, start_response)
        return self._look_again(environ, start_response, now)

    def _look_again(self, environ: Environ, start_response: Any, now: float) -> Iterable[bytes]:
        table, text = self.feed.table, environ.get("HTTP_IF_NONE_MATCH")
        try:
            device = _verified(table, environ.get("HTTP_AUTHORIZATION", ""))
            tag = FIRST if text is None else Tag.parse(text)
        except (Unauthorized, ProtocolError):
            device, tag = 0, FIRST
        if not device:
            return self._django(environ, start_response)  # type: ignore[no-any-return]
        view = table.current(device, tag, text or "")
        if view and now < table.until[device]:
            offer = (device, view, environ.get("QUERY_STRING", ""), table.trust)
            body = b"" if view == tag.view else self._bodies.get(offer) if view > tag.view else None
            if body is not None:
                return self._answer(device, str(Tag(view, tag.runs)), tag.runs, now, start_response, body)
        self.feed.want(device, tag.runs)
        return self._through_django(environ, start_response, device)

    def _answer(
        self, device: int, tag: str, runs: str, now: float, start_response: Any, body: bytes = b""
    ) -> Iterable[bytes]:
        seen.mark_seen(device, runs=runs, at=now)
        self.tally.count(200 if body else 304)
        if not body:
            start_response("304 Not Modified", [("ETag", tag), *self._short])
            return ()
        kind = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response("200 OK", [("ETag", tag), *self._full, *kind])
        return (body,)

    def _through_django(self, environ: Environ, start_response: Any, device: int) -> Iterable[bytes]:
        """A device that cannot use its bundle asks for the same one again and again: keep it a while."""
        trust = self.feed.table.trust  # before: Django never sees an older one
        response = self._django(environ, start_response)
        if isinstance(response, HttpResponse) and response.status_code == 200:
            view = Tag.parse(response["ETag"]).view
            self._bodies.keep((device, view, environ.get("QUERY_STRING", ""), trust), response.content)
        return response  # type: ignore[no-any-return]

    def _is_plain(self, environ: Environ) -> bool:
        """Whether all but the device and its tag is as it should be. Few forms of that ever come: each is kept."""
        form = (
            environ["REQUEST_METHOD"],
            environ.get("QUERY_STRING", ""),
            environ.get("HTTP_HOST"),
            environ["wsgi.url_scheme"],
            environ.get(self._secure),
        )
        found = self._plain.get(form)
        if found is None:
            if len(self._plain) >= PLAIN:
                self._plain = {}
            found = self._plain[form] = _is_plain(environ)
        return found


class Tally:
    """Polls answered here, by status, until they are added to the counters that the middleware would have raised."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = {200: 0, 304: 0}

    def count(self, status: int) -> None:
        with self._lock:
            self._answered[status] += 1

    def flush(self) -> None:
        with self._lock:
            answered, self._answered = self._answered, dict.fromkeys(self._answered, 0)
        metrics = Metrics.get_instance()
        for status, number in answered.items():
            if number:
                metrics.requests_total.inc(number)
                metrics.responses_by_status_view_method.labels(str(status), VIEW, "GET").inc(number)


Offer = tuple[int, int, str, str]  # device, version of its view, query, digest of the trust: they fix a bundle's bytes


class Bodies:
    """The last bundles that were handed out, by what they are made of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Offer, bytes] = OrderedDict()

    def get(self, offer: Offer) -> bytes | None:
        with self._lock:
            return self._kept.get(offer)

    def keep(self, offer: Offer, body: bytes) -> None:
        with self._lock:
            self._kept[offer] = body
            while len(self._kept) > BODIES:
                self._kept.popitem(last=False)


def _known(table: Table, credential: str) -> int:
    """The device whose credential this was found to be; 0: have it verified."""
    try:
        device = int(credential[7 : credential.index(".")])
        return device if table.proof[device] == hash(credential) else 0
    except (ValueError, IndexError):
        return 0


def _verified(table: Table, credential: str) -> int:
    """The device of a credential, verified in full; 0: not one of this table's. Raises Unauthorized."""
    claim = credentials.verify(credential)
    return claim.device if table.admit(claim.device, claim.epoch, credential) else 0


def _is_plain(environ: Environ) -> bool:
    """What Django's middleware would pass on to the view, and the view find well-formed."""
    request = WSGIRequest(environ)
    try:
        request.get_host()
    except DisallowedHost:
        return False
    if settings.SECURE_SSL_REDIRECT and not request.is_secure():
        return False
    return request.method == "GET" and _QUERY.fullmatch(environ.get("QUERY_STRING", "")) is not None
