"""Where the server may send to: a webhook's address is somebody's text, and must not reach into our own network.

The name is resolved once and the connection goes to the very address that was judged, so that a name which changes
its mind in between (DNS rebinding) gains nothing.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from django.conf import settings

from fleet.errors import Invalid

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Target:
    """A webhook's URL in parts. `path` with its query."""

    tls: bool
    host: str
    port: int
    path: str


def parse(url: str) -> Target:
    """Raises Invalid `webhook_address`: only https, or http where private addresses are allowed; no user name in it."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise _refused(f"{url!r:.100} is no address") from error
    wanted = {"https", "http"} if settings.WEBHOOK_PRIVATE else {"https"}
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in wanted or not parts.hostname or not plain:
        raise _refused(f"expected {' or '.join(sorted(wanted))}://…; got {url!r:.100}")
    if parts.username is not None or parts.password is not None:
        raise _refused("a user name in the address would be sent in clear to whoever answers: leave it out")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme == "https", parts.hostname, port, path)


def resolve(target: Target) -> str:
    """The address to connect to. Raises OSError where there is none, Invalid where one of them is not the world's.

    One private address among several is enough to refuse: it is what an attacker would add.
    """
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not settings.WEBHOOK_PRIVATE:
        for text in addresses:
            if not is_public(ipaddress.ip_address(text.partition("%")[0])):
                raise _refused(f"{target.host} is at {text}, which is no public address")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether it is somebody else's, on the internet. An IPv6 address that carries an IPv4 one is judged by that."""
    inner = _carried(address)
    return address.is_global and not address.is_multicast and (inner is None or is_public(inner))


def _carried(address: Address) -> Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def _refused(why: str) -> Invalid:
    return Invalid("webhook_address", f"webhook: {why}")
