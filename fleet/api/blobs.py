"""Files of releases, for devices: from the local store with ranges, or a redirect to a presigned address."""

import re
from typing import IO

from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import path

from device_sdk.protocol import limits
from device_sdk.protocol.names import check_sha256
from device_sdk.protocol.patches.offers import PatchOffer, offers_to_json
from fleet.api.device_auth import allow, device_view
from fleet.devices.models import Device
from fleet.errors import NotFound, Unavailable
from fleet.releases import selectors, storage

CHUNK = 256 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


class UnsatisfiableError(ValueError):
    """The range lies beyond the file."""


class Slice:
    """The next `length` bytes of an open file, in chunks. Closed by the response, read or not."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file, self._left = file, length

    def __iter__(self) -> "Slice":
        return self

    def __next__(self) -> bytes:
        chunk = self._file.read(min(CHUNK, self._left)) if self._left else b""
        if not chunk:
            raise StopIteration
        self._left -= len(chunk)
        return chunk

    def close(self) -> None:
        self._file.close()


def parse_range(header: str, length: int) -> tuple[int, int] | None:
    """Start and end (excluded) of a single byte range; None: send the whole. Raises UnsatisfiableError.

    Several ranges, other units and nonsense are ignored, as RFC 9110 lets us: the whole file is always a right answer.
    """
    match = _RANGE.fullmatch(header.strip())
    if not match or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(length - int(match[2]), 0), length
    else:
        start, end = int(match[1]), min(int(match[2]) + 1, length) if match[2] else length
        if match[2] and int(match[2]) < start:
            return None
    if start >= end:
        raise UnsatisfiableError(header)
    return start, end


@allow("GET", "HEAD")
@device_view
def blob(request: HttpRequest, device: Device, sha256: str) -> HttpResponseBase:
    """One file of a valid release of one of the device's models."""
    artifact = selectors.servable_blob(check_sha256(sha256), device.model_names)
    if artifact is None:
        raise NotFound("unknown_blob", f"no release of this device's models has the file {sha256}")
    if not storage.is_local():
        return HttpResponse(status=307, headers={"Location": storage.presigned_get(storage.blob_name(sha256))})
    return send(request, sha256, artifact.length)


@allow("GET", "HEAD")
@device_view
def patches(request: HttpRequest, device: Device, sha256: str) -> HttpResponse:
    """From which files this one can be made with less on the wire. A hint: the device checks what comes out."""
    if selectors.servable_blob(check_sha256(sha256), device.model_names) is None:
        raise NotFound("unknown_blob", f"no release of this device's models has the file {sha256}")
    offers = [
        PatchOffer(patch.base_sha256, patch.artifact.sha256, patch.artifact.length)
        for patch in selectors.patches_to(sha256)[: limits.PATCHES]
        if patch.artifact
    ]
    return JsonResponse(offers_to_json(offers), headers={"Cache-Control": "private, no-cache"})


def send(request: HttpRequest, sha256: str, length: int) -> HttpResponseBase:
    """A file, or the range of it that was asked for."""
    tag = f'"{sha256}"'
    headers = {"Accept-Ranges": "bytes", "ETag": tag, "Cache-Control": "private, immutable, max-age=31536000"}
    wanted = request.headers.get("Range", "")
    if request.headers.get("If-Range", tag) != tag:
        wanted = ""
    try:
        part = parse_range(wanted, length)
    except UnsatisfiableError:
        return HttpResponse(status=416, headers={**headers, "Content-Range": f"bytes */{length}"})
    start, end = part or (0, length)
    headers["Content-Length"] = str(end - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
    return _answer(request, sha256, start, end, status=206 if part else 200, headers=headers)


def _answer(
    request: HttpRequest, sha256: str, start: int, end: int, *, status: int, headers: dict[str, str]
) -> HttpResponseBase:
    kind = "application/octet-stream"
    if request.method == "HEAD":
        return HttpResponse(status=status, headers=headers, content_type=kind)
    try:
        file = storage.open_range(storage.blob_name(sha256), start, end)
    except OSError as error:
        raise Unavailable("storage_away", f"the object store does not give {sha256}: {error.strerror}") from error
    return StreamingHttpResponse(Slice(file, end - start), status=status, headers=headers, content_type=kind)


urlpatterns = [
    path("api/device/v1/blobs/<str:sha256>", blob),
    path("api/device/v1/blobs/<str:sha256>/patches", patches),
]
