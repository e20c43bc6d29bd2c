"""The transport against a server that misbehaves in every way that a network can."""

import io
import itertools
import threading
import time
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from device_sdk.errors import TransferError, UnauthorizedError, UntrustedError, is_retryable
from device_sdk.transport import CHUNK, Transport
from tests.sdk.loopback import Reply, loopback

CREDENTIAL = "7.1.k1.mac"


@pytest.fixture
def server():
    with loopback() as server:
        yield server


@pytest.fixture
def other():
    with loopback() as server:
        yield server


@pytest.fixture
def connect():
    """Make transports, and close them at the end."""
    with ExitStack() as stack:

        def connect(server, *blob_hosts, timeout=5.0):
            return stack.enter_context(closing(Transport(server, blob_hosts, CREDENTIAL, timeout=timeout)))

        yield connect


@pytest.fixture
def transport(server, connect):
    return connect(server.url)


def get(transport, path="/x", **changes):
    return transport.request("GET", path, **{"limit": 1000, "deadline": 5, **changes})


def test_an_answer_brings_status_headers_in_any_case_and_body(server, transport):
    server.on("/x", Reply(200, b"hello", {"Fleet-Poll-Interval": "30"}))
    answer = get(transport)
    assert (answer.status, answer.body, answer.headers["fleet-poll-interval"]) == (200, b"hello", "30")


def test_the_credential_is_sent_and_cannot_be_replaced_by_a_header(server, transport):
    server.on("/x", Reply(200))
    get(transport, headers={"authorization": "Bearer other"})
    get(transport, authorise=False)
    assert [asked.headers.get("Authorization") for asked in server.asked] == [f"Bearer {CREDENTIAL}", None]


def test_a_netrc_entry_neither_replaces_the_credential_nor_stands_in_for_it(server, transport, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login thief password thief\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server.on("/x", Reply(200))
    get(transport)
    get(transport, authorise=False)
    assert [asked.headers.get("Authorization") for asked in server.asked] == [f"Bearer {CREDENTIAL}", None]


def test_cookies_are_not_kept(server, transport):
    server.on("/x", Reply(200, b"", {"Set-Cookie": "a=b"}))
    get(transport)
    get(transport)
    assert "Cookie" not in server.asked[1].headers


def test_not_modified_is_an_answer_even_where_the_server_calls_it_html(server, transport):
    server.on("/x", Reply(304, b"", {"Content-Type": "text/html"}))
    assert get(transport).status == 304


def test_plain_bytes_are_asked_for_and_a_compressed_answer_is_refused(server, transport):
    server.on("/x", Reply(200, b"\x1f\x8b", {"Content-Encoding": "gzip"}))
    with pytest.raises(TransferError) as caught:
        get(transport, headers={"Accept-Encoding": "gzip"})
    assert caught.value.code == "encoding"
    assert server.asked[0].headers["Accept-Encoding"] == "identity"


def test_a_portal_page_is_a_transfer_error_that_is_tried_again(server, transport):
    server.on("/x", Reply(200, b"<html>Welcome to the hotel", {"Content-Type": "text/html; charset=utf-8"}))
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert caught.value.code == "captive_portal"
    assert is_retryable(caught.value)


def test_unauthorized_is_believed_from_the_server(server, transport):
    server.on("/x", Reply(401, b'{"code": "unauthorized", "message": "revoked"}'))
    with pytest.raises(UnauthorizedError, match="revoked"):
        get(transport)


def test_unauthorized_is_not_believed_from_a_web_page(server, transport):
    server.on("/x", Reply(401, b"<html>log in", {"Content-Type": "text/html"}))
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert not isinstance(caught.value, UnauthorizedError)


def test_unauthorized_is_not_believed_from_a_blob_host(server, other, connect):
    server.on("/x", Reply(307, b"", {"Location": f"{other.url}/y"}))
    other.on("/y", Reply(401, b'{"code": "unauthorized"}'))
    with pytest.raises(TransferError) as caught:
        get(connect(server.url, other.host))
    assert not isinstance(caught.value, UnauthorizedError)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (422, b'{"code": "wrong_model", "message": "no"}', "wrong_model"),
        (503, b'{"code": "no_trust_root"}', "no_trust_root"),
        (502, b"<html>bad gateway", "transfer"),
        (500, b"[1, 2]", "transfer"),
        (500, b"\xff\xfe", "transfer"),
        (500, b"[" * 60_000, "transfer"),
        (404, b'{"code": 5}', "transfer"),
    ],
)
def test_a_failure_carries_status_and_the_servers_code(server, transport, status, body, code):
    server.on("/x", Reply(status, body))
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert (caught.value.status, caught.value.code) == (status, code)


def from_now(hours):
    """Computed when the test runs: a date fixed at collection grows old while other tests run."""
    return format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        (lambda: "30", 30, 30),
        (lambda: "0", 0, 0),
        (lambda: "99999999", 86_400, 86_400),
        (lambda: from_now(hours=1), 3_500, 3_600),
        (lambda: from_now(hours=-1), 0, 0),
    ],
    ids=["seconds", "zero", "far too long", "a date to come", "a date gone by"],
)
def test_retry_after_is_read_in_both_forms_and_bounded(server, transport, header, low, high):
    server.on("/x", Reply(429, b"", {"Retry-After": header()}))
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert low <= caught.value.retry_after <= high


@pytest.mark.parametrize("header", ["soon", "-5", "1e9", "nan", "Mon, 99 Foo 2026"])
def test_a_senseless_retry_after_is_none(server, transport, header):
    server.on("/x", Reply(503, b"", {"Retry-After": header}))
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert caught.value.retry_after is None


def test_more_than_the_limit_is_refused_by_its_announcement(server, transport):
    server.on("/x", Reply(200, b"x" * 1001))
    with pytest.raises(UntrustedError) as caught:
        get(transport, limit=1000)
    assert caught.value.code == "too_large"


def test_exactly_the_limit_is_let_through(server, transport):
    server.on("/x", Reply(200, b"x" * 1000))
    assert len(get(transport, limit=1000).body) == 1000


def test_an_endless_stream_stops_within_one_chunk_of_the_limit(server, transport):
    server.on("/x", Reply(200, itertools.repeat(b"x" * 65_536)))
    received = []
    with transport.stream("/x", headers={}, limit=CHUNK, deadline=10) as answer:
        with pytest.raises(UntrustedError) as caught:
            received.extend(answer.chunks)
        received_bytes = sum(map(len, received))
    assert caught.value.code == "too_large"
    assert received_bytes <= CHUNK


def test_a_body_that_ends_early_is_a_transfer_error(server, transport):
    server.on("/x", Reply(200, b"x" * 10, {"Content-Length": "100"}))
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert is_retryable(caught.value)


def drip(stop, pieces):
    """One piece every 20 ms, for as long as anyone listens."""
    for piece in pieces:
        yield piece
        if stop.wait(0.02):
            return


@pytest.mark.parametrize("where", ["body", "headers"])
def test_a_slow_drip_ends_at_the_overall_deadline(server, transport, where):
    stop = threading.Event()
    if where == "body":
        server.on("/x", lambda _: Reply(200, drip(stop, itertools.repeat(b"x"))))
    else:
        start = iter([b"HTTP/1.1 200 OK\r\nX-Long: "])
        server.on("/x", lambda _: Reply(raw=drip(stop, itertools.chain(start, itertools.repeat(b"x")))))
    began = time.monotonic()
    with pytest.raises(TransferError) as caught:
        get(transport, limit=10**6, deadline=0.3)
    stop.set()
    assert caught.value.code == "deadline"
    assert time.monotonic() - began < 3


def test_silence_is_a_timeout(server, connect):
    stop = threading.Event()
    server.on("/x", lambda _: Reply(raw=(b"" for _ in [stop.wait(5)])))
    with pytest.raises(TransferError) as caught:
        get(connect(server.url, timeout=0.1))
    stop.set()
    assert caught.value.code == "timeout"


def test_a_refused_connection_is_retryable(connect):
    with loopback() as gone:
        transport = connect(gone.url)
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert is_retryable(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"\x00\xff garbage\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200]
)
def test_garbage_instead_of_http_is_a_transfer_error(server, transport, raw):
    server.on("/x", Reply(raw=[raw]))
    with pytest.raises(TransferError):
        get(transport)


@pytest.mark.parametrize("status", [300, 305, 399])
def test_an_odd_status_is_a_transfer_error(server, transport, status):
    server.on("/x", Reply(status))
    with pytest.raises(TransferError) as caught:
        get(transport)
    assert caught.value.code == "status"


def test_a_redirect_to_a_pinned_host_is_followed_without_the_credential(server, other, connect):
    server.on("/x", Reply(307, b"", {"Location": f"{other.url}/y?signature=1"}))
    other.on("/y", Reply(200, b"blob"))
    transport = connect(server.url, other.host)
    assert get(transport, headers={"Range": "bytes=5-"}).body == b"blob"
    assert "Authorization" not in other.asked[0].headers
    assert other.asked[0].headers["Range"] == "bytes=5-"


def test_a_redirect_within_the_server_keeps_the_credential(server, transport):
    server.on("/x", Reply(302, b"", {"Location": "/y"}))
    server.on("/y", Reply(200, b"there"))
    assert get(transport).body == b"there"
    assert server.asked[1].headers["Authorization"] == f"Bearer {CREDENTIAL}"


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2/x",
        "//127.0.0.2/x",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://user@{host}/y",
        "http://{host}@127.0.0.2/y",
        "http://127.0.0.2\\@{host}/y",
        "http://127.0.0.1:1/y",
        "http://[::1/y",
    ],
)
def test_a_redirect_to_anywhere_else_is_refused(server, transport, location):
    server.on("/x", Reply(307, b"", {"Location": location.format(host=server.host)}))
    server.on("/y", Reply(200))
    with pytest.raises(UntrustedError) as caught:
        get(transport)
    assert caught.value.code == "redirect"
    assert len(server.asked) == 1


def test_a_ring_of_redirects_ends(server, transport):
    server.on("/x", Reply(307, b"", {"Location": "/x"}))
    with pytest.raises(UntrustedError) as caught:
        get(transport)
    assert caught.value.code == "redirect"
    assert len(server.asked) == 6


def test_an_upload_is_repeated_by_307_from_where_it_began_and_not_by_302(server, transport):
    server.on("/x", Reply(307, b"", {"Location": "/y"}))
    server.on("/y", Reply(200))
    server.on("/z", Reply(302, b"", {"Location": "/y"}))
    body = io.BytesIO(b"skipped and sent")
    body.seek(len(b"skipped and "))
    transport.request("PUT", "/x", body=body, limit=10, deadline=5)
    assert [asked.body for asked in server.asked] == [b"sent", b"sent"]
    with pytest.raises(UntrustedError):
        transport.request("PUT", "/z", body=b"sent", limit=10, deadline=5)


def test_an_absolute_address_off_the_list_is_never_asked(server, transport, other):
    with pytest.raises(UntrustedError) as caught:
        get(transport, f"{other.url}/x")
    assert caught.value.code == "redirect"
    assert other.asked == []


def test_plain_http_is_refused_where_the_server_is_https(connect):
    transport = connect("https://fleet.example", "blobs.example")
    for address in ("http://fleet.example/x", "http://blobs.example/x"):
        with pytest.raises(UntrustedError) as caught:
            get(transport, address)
        assert caught.value.code == "redirect"


def test_the_message_of_an_error_keeps_a_presigned_query_secret(server, other, connect):
    server.on("/x", Reply(307, b"", {"Location": f"{other.url}/y?X-Amz-Signature=secret"}))
    other.on("/y", Reply(403, b"<Error/>"))
    with pytest.raises(TransferError) as caught:
        get(connect(server.url, other.host))
    assert "secret" not in str(caught.value)


# Surprises of the attack table's rows 26 and 27: where a body is read as lines, no timeout of a socket counts.


def dripping(*, before=b"", piece=b"0", pause=0.05, pieces=400):
    yield before
    for _ in range(pieces):
        time.sleep(pause)
        yield piece


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("how", ["request", "stream"])
def test_a_chunk_size_that_drips_in_ends_in_time(server, connect, how):
    transport = connect(server.url, timeout=5.0)
    transport._stall_seconds = 0.3
    server.on("/x", Reply(raw=dripping(before=CHUNKED + b"5\r\nhello\r\n")))
    began = time.monotonic()
    ask = {"request": lambda: get(transport, deadline=0.3), "stream": lambda: consume(transport, deadline=60)}
    with pytest.raises(TransferError) as caught:
        ask[how]()
    assert caught.value.code == {"request": "deadline", "stream": "too_slow"}[how]
    assert is_retryable(caught.value)
    assert time.monotonic() - began < 3


def test_a_trailer_without_end_ends_at_the_deadline(server, transport):
    server.on("/x", Reply(raw=itertools.chain([CHUNKED + b"0\r\n"], itertools.repeat(b"A: b\r\n" * 1000))))
    with pytest.raises(TransferError) as caught:
        get(transport, deadline=0.3)
    assert caught.value.code == "deadline"


def test_headers_of_a_stream_must_come_long_before_its_deadline(server, transport):
    transport._stall_seconds = 0.3
    server.on("/x", Reply(raw=dripping(before=b"HTTP/1.1 200 OK\r\nA: ")))
    began = time.monotonic()
    with pytest.raises(TransferError):
        consume(transport, deadline=3_600)
    assert time.monotonic() - began < 3


def test_a_body_that_drips_is_broken_off_as_too_slow_and_what_came_was_handed_out(server, connect):
    transport = connect(server.url)
    transport._stall_seconds = 0.3
    server.on("/x", Reply(body=dripping(before=b"hello")))
    came = []
    with pytest.raises(TransferError) as caught, transport.stream("/x", limit=10**6, deadline=3_600) as answer:
        came.extend(answer.chunks)
    assert caught.value.code == "too_slow"
    assert b"".join(came).startswith(b"hello")


def test_a_slow_link_that_brings_enough_may_take_its_time(server, connect):
    transport = connect(server.url)
    transport._stall_seconds = 0.2
    server.on("/x", Reply(body=dripping(piece=b"x" * 400, pause=0.05, pieces=12)))
    assert len(consume(transport, deadline=60)) == 12 * 400


def consume(transport, *, deadline):
    with transport.stream("/x", limit=10**6, deadline=deadline) as answer:
        return b"".join(answer.chunks)
