"""How a device's samples come in: announce, upload (to object storage, or here), complete. Each may be done again."""

from typing import IO, Any, cast

from django.http import HttpRequest, JsonResponse
from django.http.request import UnreadablePostError
from django.urls import path, reverse

from device_sdk.protocol import fields
from device_sdk.protocol.batches import BatchHead
from fleet.api.device_auth import allow, device_view, read_body
from fleet.devices.models import Device
from fleet.errors import Invalid, TooLarge
from fleet.feedback import services
from fleet.feedback.models import Batch
from fleet.releases import storage

HEAD = 16 * 1024  # bytes of an announcement


@allow("POST")
@device_view
def announce(request: HttpRequest, device: Device) -> JsonResponse:
    """Body `BatchHead`. 201 with where to upload, 200 where it was announced before or has been received."""
    value = fields.parse_object(read_body(request, HEAD), limit=HEAD, what="batch")
    batch, created = services.announce(device=device, head=BatchHead.parse(value))
    return JsonResponse(_announced(batch), status=201 if created else 200)


@allow("PUT")
@device_view
def content(request: HttpRequest, device: Device, batch_id: str) -> JsonResponse:
    """The bytes, where this server is the store."""
    batch = services.find(device=device, batch_id=batch_id)
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > batch.length:
        raise TooLarge("too_large", f"expected {batch.length} bytes as announced; got {length}")
    try:
        services.receive_content(batch=batch, content=cast("IO[bytes]", request))
    except UnreadablePostError as error:
        raise Invalid("hash_mismatch", "the upload was cut off") from error
    return JsonResponse({"state": _state(batch)})


@allow("POST")
@device_view
def complete(request: HttpRequest, device: Device, batch_id: str) -> JsonResponse:
    """The device may delete its copy when it reads `received` here."""
    batch = services.complete(batch=services.find(device=device, batch_id=batch_id))
    return JsonResponse({"state": _state(batch)})


def _announced(batch: Batch) -> dict[str, Any]:
    if batch.state != Batch.State.ANNOUNCED:
        return {"state": _state(batch)}
    return {"state": _state(batch), "upload": _upload(batch)}


def _upload(batch: Batch) -> dict[str, Any]:
    """Where to put the bytes. A presigned URL is its own credential: the device's must not go there."""
    if storage.is_local():
        url = reverse("batch-content", kwargs={"batch_id": batch.batch_id})
    else:
        url = storage.presigned_put(storage.batch_name(batch.sha256), length=batch.length)
    return {"url": url, "method": "PUT", "headers": {}, "credential": storage.is_local()}


def _state(batch: Batch) -> str:
    """For the device there are two: what became of a batch after it was received is no longer its business."""
    announced = batch.state == Batch.State.ANNOUNCED
    return str(Batch.State.ANNOUNCED if announced else Batch.State.RECEIVED)


urlpatterns = [
    path("api/device/v1/batches", announce, name="batch-announce"),
    path("api/device/v1/batches/<str:batch_id>/content", content, name="batch-content"),
    path("api/device/v1/batches/<str:batch_id>/complete", complete, name="batch-complete"),
]
