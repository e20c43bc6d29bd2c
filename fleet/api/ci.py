"""What CI calls: the role to sign upon, the files, the release. Authenticated by an API token with scope `publish`.

Whoever co-signs needs no more than the scope `sign`: it reads the role and the proposal, and adds signatures.
"""

from typing import Any, cast

from django.http import HttpResponse
from django.urls import path
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_model, check_name
from fleet.api.auth import ApiTokenAuthentication, MayPublish, MaySign, covers
from fleet.api.parsers import AnyBytes, ReleaseJSON
from fleet.errors import Denied, FleetError, NotFound
from fleet.releases import selectors, services, uploads
from fleet.trust import selectors as trust_selectors
from fleet.trust.repository import Signatures

COMPLETE, OFFSET, LENGTH = "Upload-Complete", "Upload-Offset", "Upload-Length"
RELEASE = OpenApiResponse(OpenApiTypes.OBJECT, "the release: state, reason, variants")
REFUSAL = OpenApiResponse(OpenApiTypes.OBJECT, "refused: {code, message, detail}")


PENDING = OpenApiResponse(OpenApiTypes.OBJECT, "too few have signed: {pending, version, signed, missing, threshold}")


class CiView(APIView):
    authentication_classes = (ApiTokenAuthentication,)
    permission_classes = (MayPublish,)
    parser_classes: Any = (ReleaseJSON,)

    def check_model(self, model: str) -> str:
        """A legal name, and within the token's models."""
        check_model(model)
        if not covers(self.request.auth, model):
            raise Denied("wrong_model", f"this API token does not cover model {model!r}")
        return model

    @property
    def caller(self) -> str:
        return f"{cast('Any', self.request.auth).name} ({self.request.user})"


class RoleView(CiView):
    """The model's role: the list of releases that may run, signed by CI."""

    def get_permissions(self) -> list[Any]:
        return [MaySign() if self.request.method in {"GET", "HEAD"} else MayPublish()]

    @extend_schema(responses={(200, "application/json"): OpenApiTypes.OBJECT, 404: REFUSAL})
    def get(self, request: Request, model: str) -> HttpResponse:
        """The newest signed role, byte for byte. `no_role_yet`: sign version 1."""
        self.check_model(model)
        if not trust_selectors.is_delegated(model):
            raise NotFound("unknown_model", f"model {model!r} is not delegated; an operator adds it by trust_add_model")
        row = trust_selectors.newest(model)
        if row is None:
            raise NotFound("no_role_yet", f"model {model!r} has no role yet: sign version 1")
        return HttpResponse(row.content, content_type="application/json")

    @extend_schema(
        request=OpenApiTypes.OBJECT,
        responses={201: OpenApiTypes.OBJECT, 202: PENDING, (403, 409, 422): REFUSAL},
    )
    def post(self, request: Request, model: str) -> Response:
        """A role that adds nothing: signed anew, or with releases removed, which revokes them."""
        return self._receive(request, model, only_add=False)

    def _receive(self, request: Request, model: str, *, only_add: bool) -> Response:
        self.check_model(model)
        item = fields.as_object(request.data, "body")
        role = fields.take_text(item, "role", limit=limits.METADATA)
        done = services.update_role(model=model, role=role, by=self.caller, only_add=only_add)
        body = _standing(done) | {"expires": done.role.expires, "removed": sorted(done.role.removed)}
        return Response(body, status=202 if done.role.is_pending else 201)


class PendingRoleView(RoleView):
    """The proposal that waits for signatures."""

    def get_permissions(self) -> list[Any]:
        return [MaySign()]

    @extend_schema(responses={200: PENDING, 404: REFUSAL})
    def get(self, request: Request, model: str) -> HttpResponse:
        """The proposed role as text, who has signed, and the manifests that it adds. `no_pending_role`: none."""
        self.check_model(model)
        found = trust_selectors.proposal(model)
        if found is None:
            raise NotFound("no_pending_role", f"role {model!r}: nothing waits for a signature")
        body = {
            **describe_signatures(found.signatures),
            "version": found.row.version,
            "role": found.row.content,
            "proposed_by": found.row.proposed_by,
            "proposed_at": found.row.created_at,
            "manifests": selectors.manifests(found.added),
            "releases": selectors.states(model, found.added),
        }
        return Response(body)

    @extend_schema(
        request=OpenApiTypes.OBJECT,
        responses={201: OpenApiTypes.OBJECT, 202: PENDING, (403, 404, 409, 422): REFUSAL},
    )
    def post(self, request: Request, model: str) -> Response:
        """`{"role": text}`: the proposal with more signatures. 201: it is the role now; 202: some are missing still."""
        return self._receive(request, model, only_add=True)


class BlobView(CiView):
    """One file by its sha256, in as many pieces as it takes."""

    parser_classes = (AnyBytes,)

    @extend_schema(responses={200: OpenApiResponse(description="whole, or Upload-Offset: how much came so far")})
    def head(self, request: Request, sha256: str) -> HttpResponse:
        return _upload_answer(uploads.progress(sha256), HttpResponse())

    @extend_schema(
        request={"application/octet-stream": OpenApiTypes.BINARY},
        responses={201: None, 202: None, (409, 413, 422): REFUSAL},
    )
    def put(self, request: Request, sha256: str) -> HttpResponse:
        """Append the body at `Upload-Offset` of a file of `Upload-Length` bytes."""
        try:
            progress = services.receive_blob(
                sha256=sha256,
                length=_whole(request, LENGTH),
                offset=_whole(request, OFFSET),
                source=request._request,  # noqa: SLF001
            )
        except FleetError as error:
            return _refused_upload(error)
        return _upload_answer(progress, HttpResponse(status=201 if progress.complete else 202))


class ReleasesView(CiView):
    @extend_schema(
        request=OpenApiTypes.OBJECT,
        responses={201: RELEASE, 200: RELEASE, 202: PENDING, (403, 404, 409, 422): REFUSAL},
    )
    def post(self, request: Request, model: str) -> Response:
        """Publish: `{"version", "manifests": {variant: text}, "role": text}`. The same again answers 200.

        202: kept, and it needs more signatures before it may be rolled out; the release stands under `release`.
        """
        self.check_model(model)
        item = fields.as_object(request.data, "body")
        manifests = fields.take_object(item, "manifests")
        published = services.publish_release(
            model=model,
            version=check_name(item.get("version"), "version"),
            manifests={name: fields.take_text(manifests, name, limit=limits.MANIFEST) for name in manifests},
            role=fields.take_text(item, "role", limit=limits.METADATA),
            published_by=self.caller,
        )
        if published.change is not None and published.change.role.is_pending:
            body = _standing(published.change) | {"release": selectors.describe(published.release)}
            return Response(body, status=202)
        return Response(selectors.describe(published.release), status=201 if published.created else 200)


class ReleaseView(CiView):
    @extend_schema(responses={200: RELEASE, 404: REFUSAL})
    def get(self, request: Request, model: str, version: str) -> Response:
        """State, reason and variants; poll it to wait for validation."""
        self.check_model(model)
        found = selectors.release(model, check_name(version, "version"))
        if found is None:
            raise NotFound("unknown_release", f"there is no release {version!r} of {model!r}")
        return Response(selectors.describe(found))


def describe_signatures(found: Signatures) -> dict[str, Any]:
    return {
        "pending": not found.is_enough,
        "signed": list(found.signed),
        "missing": list(found.missing),
        "threshold": found.threshold,
    }


def _standing(done: services.RoleChange) -> dict[str, Any]:
    """`version` is the role's. `superseded`: releases whose proposal this one has replaced."""
    standing = describe_signatures(done.role.signatures)
    return {**standing, "version": done.role.version, "superseded": list(done.superseded)}


def _whole(request: Request, header: str) -> int:
    value = request.headers.get(header, "")
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise ProtocolError("malformed", f"{header}: expected a whole number of bytes; got {value!r:.40}")
    return int(value)


def _upload_answer(progress: uploads.Progress, response: HttpResponse) -> HttpResponse:
    response[OFFSET] = str(progress.offset)
    response[COMPLETE] = "?1" if progress.complete else "?0"
    return response


def _refused_upload(error: FleetError) -> HttpResponse:
    """As ever, and with the right offset in the header where that was what was wrong."""
    from fleet.api.errors import json_error

    response = json_error(error)
    if "offset" in error.detail:
        response[OFFSET] = str(error.detail["offset"])
    return response


urlpatterns = [
    path("api/ci/v1/models/<str:model>/role", RoleView.as_view()),
    path("api/ci/v1/models/<str:model>/role/pending", PendingRoleView.as_view()),
    path("api/ci/v1/blobs/<str:sha256>", BlobView.as_view()),
    path("api/ci/v1/models/<str:model>/releases", ReleasesView.as_view()),
    path("api/ci/v1/models/<str:model>/releases/<str:version>", ReleaseView.as_view()),
]
