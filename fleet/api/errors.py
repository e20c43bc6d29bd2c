"""Every refusal leaves the API as `{code, message, detail}` with a stable code."""

from typing import Any

from django.http import Http404, HttpRequest, JsonResponse
from rest_framework import exceptions
from rest_framework.response import Response
from rest_framework.views import exception_handler

from device_sdk.protocol.errors import ProtocolError
from fleet.errors import FleetError


def body(code: str, message: str, detail: Any = None) -> dict[str, Any]:
    return {"code": code, "message": message, "detail": detail if detail is not None else {}}


def handle(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's exception handler: our errors, the protocol's, then DRF's own in the same shape."""
    if isinstance(error, FleetError):
        return Response(body(error.code, error.message, error.detail), status=error.status)
    if isinstance(error, ProtocolError):
        return Response(body(error.code, error.message), status=413 if error.code == "too_large" else 400)
    response = exception_handler(error, context)
    if response is not None:
        response.data = _shaped(error)
    return response


def json_error(error: FleetError | ProtocolError) -> JsonResponse:
    """The same for plain Django views."""
    if isinstance(error, FleetError):
        response = JsonResponse(body(error.code, error.message, error.detail), status=error.status)
        if error.status == 401:
            response["WWW-Authenticate"] = "Bearer"
        return response
    return JsonResponse(body(error.code, error.message), status=413 if error.code == "too_large" else 400)


def not_found(request: HttpRequest, exception: Exception) -> JsonResponse:
    return JsonResponse(body("not_found", f"nothing at {request.path!r:.200}"), status=404)


def _shaped(error: Exception) -> dict[str, Any]:
    if isinstance(error, exceptions.ValidationError):
        return body("invalid", "some fields are not acceptable; see detail", error.detail)
    if isinstance(error, exceptions.APIException):
        codes = error.get_codes()
        return body(codes if isinstance(codes, str) else "invalid", str(error.detail))
    if isinstance(error, Http404):
        return body("not_found", "no such thing")
    return body("denied", "you may not do this")
