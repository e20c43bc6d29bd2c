"""The client's address, by one rule for logs, audit and limits: `FLEET_PROXIES` says how many proxies are ours.

Each of our proxies adds (or, as `deploy/nginx` does, sets) the address that it saw to `X-Forwarded-For`. What a client
wrote there itself stands further left and is never looked at. Without proxies the header is not read at all.
"""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from django.conf import settings
from django.http import HttpRequest

NETWORK_BITS = 64  # what one IPv6 customer has at least: addresses within it are one caller


def client_address(request: HttpRequest) -> str:
    """As text; empty where it is unknown, as behind a Unix socket."""
    told = [part.strip() for part in request.META.get("HTTP_X_FORWARDED_FOR", "").split(",")]
    proxies: int = settings.PROXIES
    forwarded = _parse(told[-proxies]) if 0 < proxies <= len(told) else None
    address = forwarded or _parse(request.META.get("REMOTE_ADDR", ""))
    return str(address) if address else ""


def caller_network(address: str) -> str:
    """What limits count by: an IPv4 address itself, of an IPv6 address its /64."""
    parsed = _parse(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((parsed, NETWORK_BITS), strict=False))
    return str(parsed or "unknown")


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    """None for anything but an address. Some servers append a port to it."""
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    host = host.partition(":")[0] if host.count(":") == 1 else host
    try:
        parsed = ip_address(host)
    except ValueError:
        return None
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, IPv6Address) else parsed
