"""Every refusal leaves the API as `{code, message, detail}` with a stable code."""

from typing import Any

from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.views import defaults
from rest_framework import exceptions
from rest_framework.renderers import JSONRenderer
from rest_framework.response import Response
from rest_framework.views import exception_handler

from device_sdk.protocol.errors import ProtocolError
from fleet.errors import FleetError, TooMany


def body(code: str, message: str, detail: Any = None) -> dict[str, Any]:
    return {"code": code, "message": message, "detail": detail if detail is not None else {}}


def handle(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's exception handler: our errors, the protocol's, then DRF's own in the same shape.

    In JSON whatever the view renders: the schema's page would show a refusal as HTML, the schema as YAML.
    """
    context["request"].accepted_renderer, context["request"].accepted_media_type = JSONRenderer(), "application/json"
    if isinstance(error, FleetError):
        return Response(body(error.code, error.message, error.detail), status=error.status, headers=_headers(error))
    if isinstance(error, ProtocolError):
        return Response(body(error.code, error.message), status=413 if error.code == "too_large" else 400)
    response = exception_handler(error, context)
    if response is not None:
        response.data = _shaped(error)
    return response


def json_error(error: FleetError | ProtocolError) -> JsonResponse:
    """The same for plain Django views."""
    if isinstance(error, FleetError):
        shape = body(error.code, error.message, error.detail)
        return JsonResponse(shape, status=error.status, headers=_headers(error))
    return JsonResponse(body(error.code, error.message), status=413 if error.code == "too_large" else 400)


def _headers(error: FleetError) -> dict[str, str]:
    if isinstance(error, TooMany):
        return {"Retry-After": str(error.retry_after)}
    return {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}


# What no view answered, or what broke in one (`handler404` and its like in `fleet/urls.py`). People see pages in the
# admin; every other address is for machines.


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """For instance a host that is not ours. Django logs which; the caller need not know."""
    if _is_page(request):
        return defaults.bad_request(request, exception)
    return JsonResponse(body("bad_request", "this request is not acceptable"), status=400)


def denied(request: HttpRequest, exception: Exception) -> HttpResponse:
    if _is_page(request):
        return defaults.permission_denied(request, exception)
    return JsonResponse(body("denied", "you may not do this"), status=403)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    if _is_page(request):
        return defaults.page_not_found(request, exception)
    return JsonResponse(body("not_found", "there is nothing at this address"), status=404)


def server_error(request: HttpRequest) -> HttpResponse:
    """Our fault. The log has the traceback, the answer has not."""
    if _is_page(request):
        return defaults.server_error(request)
    return JsonResponse(body("server_error", "the server failed; its log says why"), status=500)


def _is_page(request: HttpRequest) -> bool:
    return request.path_info.startswith("/admin/")


def _shaped(error: Exception) -> dict[str, Any]:
    if isinstance(error, exceptions.ValidationError):
        return body("invalid", "some fields are not acceptable; see detail", error.detail)
    if isinstance(error, exceptions.APIException):
        codes = error.get_codes()
        return body(codes if isinstance(codes, str) else "invalid", str(error.detail))
    if isinstance(error, Http404):
        return body("not_found", "no such thing")
    return body("denied", "you may not do this")
