"""What a cache near the devices fetches for them: files of valid releases, by sha256. Its token opens nothing else.

The bytes are no secret to the devices of the fleet, and nothing is believed on a mirror's word: devices hash what they
get. The answer is never a redirect, so that any caching proxy can keep it; `deploy/nginx/mirror.conf` is one.
"""

from typing import Any

from django.http.response import HttpResponseBase
from django.urls import path
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.views import APIView

from device_sdk.protocol.names import check_sha256
from fleet.api import blobs
from fleet.api.auth import ApiTokenAuthentication, MayMirror
from fleet.errors import NotFound
from fleet.releases import selectors


class MirrorBlobView(APIView):
    authentication_classes = (ApiTokenAuthentication,)
    permission_classes = (MayMirror,)

    @extend_schema(exclude=True)
    def get(self, request: Request, sha256: str) -> HttpResponseBase:
        """A file, or a range of it, of a valid release of one of the token's models."""
        token: Any = request.auth
        artifact = selectors.mirrored_blob(check_sha256(sha256), token.models_allowed)
        if artifact is None:
            raise NotFound("unknown_blob", f"no release that this token covers has the file {sha256}")
        return blobs.send(request._request, sha256, artifact.length)  # noqa: SLF001  # Django's own, which the sender takes


urlpatterns = [path("api/mirror/v1/blobs/<str:sha256>", MirrorBlobView.as_view())]
