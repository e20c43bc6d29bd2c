"""Standard Webhooks (standardwebhooks.com): signed posts. One attempt here; when to try again is the services' word."""

import base64
import hmac
import http.client
import secrets
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from threading import Timer

from fleet.errors import Invalid
from fleet.notices import addresses
from fleet.notices.addresses import Target

SECRET_PREFIX = "whsec_"  # noqa: S105  # the standard's mark of a secret, none itself
SECRET_BYTES = 32
CONNECT_SECONDS = 5.0
ATTEMPT_SECONDS = 15.0  # in all, however slowly the other side talks
LONGEST_ADVICE = 86_400  # seconds; nobody is asked to wait longer by a Retry-After


class DeliveryError(Exception):
    """It did not arrive. `retry_after` in seconds, where the other side named it; `gone`: it wants no more of these."""

    def __init__(self, message: str, *, retry_after: float | None = None, gone: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.gone = gone


@dataclass(frozen=True, slots=True)
class Message:
    key: str
    body: str


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def headers(message: Message, secret: str, now: datetime) -> dict[str, str]:
    """The three headers of the standard. The signature covers id, time and body."""
    stamp = str(int(now.timestamp()))
    return {
        "webhook-id": message.key,
        "webhook-timestamp": stamp,
        "webhook-signature": f"v1,{_mac(secret, f'{message.key}.{stamp}.{message.body}')}",
    }


def _mac(secret: str, content: str) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return base64.b64encode(hmac.digest(key, content.encode(), sha256)).decode()


def post(url: str, message: Message, *, secret: str, now: datetime) -> None:
    """One attempt. Raises DeliveryError unless the answer is 2xx; redirects are not followed, no answer is read."""
    try:
        target = addresses.parse(url)
        status, advice = _exchange(target, message, headers(message, secret, now))
    except Invalid as error:
        raise DeliveryError(error.message) from error
    except (OSError, http.client.HTTPException) as error:
        raise DeliveryError(f"{type(error).__name__}: {error}"[:300]) from error
    if not 200 <= status < 300:
        moved = " (redirects are not followed)" if 300 <= status < 400 else ""
        raise DeliveryError(f"answered {status}{moved}", retry_after=_seconds(advice), gone=status == 410)


def _exchange(target: Target, message: Message, signed: Mapping[str, str]) -> tuple[int, str]:
    """Status and Retry-After of the answer."""
    with _connected(target) as link:
        caller = http.client.HTTPConnection(target.host, target.port)
        caller.sock = link
        known = 443 if target.tls else 80
        name = f"[{target.host}]" if ":" in target.host else target.host
        host = name if target.port == known else f"{name}:{target.port}"
        sent = {"Host": host, "Content-Type": "application/json", "User-Agent": "fleet-webhooks/1", **signed}
        caller.request("POST", target.path, message.body.encode(), sent)
        answer = caller.getresponse()
        return answer.status, answer.headers.get("Retry-After", "")


@contextmanager
def _connected(target: Target) -> Iterator[socket.socket]:
    """To the address that was judged; the certificate must be the name's. All ends after ATTEMPT_SECONDS."""
    link = socket.create_connection((addresses.resolve(target), target.port), timeout=CONNECT_SECONDS)
    links = [link]
    deadline = Timer(ATTEMPT_SECONDS, _cut, [links])
    deadline.daemon = True
    deadline.start()
    try:
        if target.tls:
            wrapped = ssl.create_default_context().wrap_socket(
                link, server_hostname=target.host, do_handshake_on_connect=False
            )
            links.append(wrapped)
            wrapped.do_handshake()
        yield links[-1]
    finally:
        deadline.cancel()
        links[-1].close()


def _cut(links: Sequence[socket.socket]) -> None:
    """Each read may take CONNECT_SECONDS, so one byte now and then would hold a worker for ever."""
    with suppress(OSError):
        socket.socket.shutdown(links[-1], socket.SHUT_RDWR)


def _seconds(advice: str) -> float | None:
    """Of a Retry-After in seconds; the form with a date is passed over."""
    return float(min(int(advice), LONGEST_ADVICE)) if advice.isascii() and advice.isdecimal() else None
