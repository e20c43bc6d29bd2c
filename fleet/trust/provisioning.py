"""What a device must know before its first word: the server, the pinned root, a token. Out-of-band trust."""

import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings

from fleet.trust import selectors


def provision(*, secret: str, models: Sequence[str], server: str = "", mirror: str = "") -> bytes:
    """The device's `provision.json`, see `device_sdk.config.Provision`. Raises `no_trust_root`."""
    content: dict[str, Any] = {
        "server": (server or settings.PUBLIC_URL).rstrip("/"),
        "root": selectors.root_text(),
        "token": secret,
        "models": list(models),
        "blob_hosts": blob_hosts(),
        "clock_floor": int(time.time()),
    }
    if mirror:
        content["mirror"] = mirror.rstrip("/")
    return json.dumps(content, indent=1).encode()


def blob_hosts() -> list[str]:
    """Where presigned addresses point, besides the server itself: the S3 endpoint, or AWS's own names."""
    if not settings.S3_BUCKET:
        return []
    options = settings.STORAGES["objects"]["OPTIONS"]
    host = urlsplit(options["endpoint_url"] or f"https://s3.{options['region_name']}.amazonaws.com").netloc
    return [host, f"{settings.S3_BUCKET}.{host}"] if options["addressing_style"] == "virtual" else [host]
