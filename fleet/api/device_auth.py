"""What every device endpoint shares: the credential, the shape of a refusal, and bounds on what is read."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.http import HttpRequest, JsonResponse
from django.http.response import HttpResponseBase
from django.views.decorators.csrf import csrf_exempt

from device_sdk.protocol.errors import ProtocolError
from fleet.api.errors import body, json_error
from fleet.devices import services
from fleet.errors import FleetError, TooLarge

View = Callable[..., HttpResponseBase]


def open_view(view: View) -> View:
    """A view for machines without a credential yet: no CSRF, and refusals in the API's shape."""

    @csrf_exempt
    @wraps(view)
    def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            return view(request, *args, **kwargs)
        except (FleetError, ProtocolError) as error:
            return json_error(error)

    return wrapped


def device_view(view: View) -> View:
    """The same for devices: authenticates, and calls `view(request, device, ...)`."""

    @open_view
    @wraps(view)
    def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        device = services.authenticate(request.headers.get("Authorization"))
        return view(request, device, *args, **kwargs)

    return wrapped


def allow(*methods: str) -> Callable[[View], View]:
    """Refuse other methods in the API's shape; goes outermost, so that it also spares the credential check."""

    def decorate(view: View) -> View:
        @csrf_exempt
        @wraps(view)
        def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            if request.method in methods:
                return view(request, *args, **kwargs)
            refusal = body("method_not_allowed", f"expected {' or '.join(methods)}; got {request.method}")
            return JsonResponse(refusal, status=405, headers={"Allow": ", ".join(methods)})

        return wrapped

    return decorate


def read_body(request: HttpRequest, limit: int) -> bytes:
    """The whole body, at most `limit` bytes; a longer one is refused by its announced length, unread."""
    try:
        length = int(request.headers.get("Content-Length") or 0)
    except ValueError:
        length = 0
    if length > limit:
        raise TooLarge("too_large", f"expected at most {limit} bytes; got {length}")
    return request.read(limit)
