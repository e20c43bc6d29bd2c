"""Plain TUF addresses: any stock client reads a device's view and the manifests that it names, without headers.

The key in the address grants just that. A wrong one is answered like a wrong name, so that names cannot be probed.
An address may hold NUL, which PostgreSQL does not take: names are looked up `plain`.
"""

import re

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.urls import path

from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.fields import plain
from device_sdk.protocol.names import ReleasePath
from fleet.api import composition
from fleet.api.device_auth import allow, open_view
from fleet.devices import credentials
from fleet.devices.models import Device
from fleet.errors import NotFound
from fleet.releases import selectors
from fleet.releases.models import Variant
from fleet.trust import selectors as trust_selectors
from fleet.trust import services as trust

_TARGET = re.compile(r"([0-9a-f]{64})\.(.+)")


@allow("GET", "HEAD")
@open_view
def metadata(_request: HttpRequest, device: str, key: str, name: str) -> HttpResponseBase:
    """`timestamp.json`, or `<version>.<role>.json`. The timestamp is signed anew when what it says has changed."""
    found = _device(device, key)
    if name == "timestamp.json":
        trust.current_view(found, composition.assignments(found))
    content = trust_selectors.metadata_file(found, plain(name))
    if content is None:
        raise NotFound("unknown_metadata", f"there is no {name!r:.80}")
    return HttpResponse(content, content_type="application/json")


@allow("GET", "HEAD")
@open_view
def target(_request: HttpRequest, device: str, key: str, model: str, version: str, name: str) -> HttpResponseBase:
    """`<model>/<version>/<sha256>.<variant>`: a manifest, by the name that consistent snapshots give it."""
    found = _device(device, key)
    match = _TARGET.fullmatch(name)
    variant = _variant(model, version, match[2]) if match and model in found.model_names else None
    if match is None or variant is None or variant.manifest_sha256 != match[1]:
        raise NotFound("unknown_target", f"there is no target {name!r:.160}")
    return HttpResponse(variant.manifest, content_type="application/json")


def _device(name: str, key: str) -> Device:
    device = Device.objects.filter(name=plain(name), state=Device.State.ACTIVE).first()
    if device is None or not credentials.check_view_key(device, key):
        raise NotFound("not_found", "no such view")
    return device


def _variant(model: str, version: str, name: str) -> Variant | None:
    try:
        return selectors.manifest(ReleasePath.parse(f"{model}/{version}/{name}"))
    except ProtocolError:
        return None


_VIEW = "tuf/<str:device>/<str:key>"
urlpatterns = [
    path(f"{_VIEW}/metadata/<str:name>", metadata),
    path(f"{_VIEW}/targets/<str:model>/<str:version>/<str:name>", target),
]
