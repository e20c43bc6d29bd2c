"""Who calls: people by session, CI and operators by API token. Devices have their own credential, see `devices`."""

from typing import TYPE_CHECKING, Any, ClassVar

from knox.auth import TokenAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission, DjangoModelPermissions

from fleet.accounts import limits
from fleet.accounts.models import MIRROR, OPERATE, PUBLISH, READ, SIGN, ApiToken
from fleet.audit.addresses import caller_network, client_address

if TYPE_CHECKING:  # the settings name these classes, so the views import this module, not the other way round
    from rest_framework.request import Request
    from rest_framework.views import APIView


class ApiTokenAuthentication(TokenAuthentication):  # type: ignore[misc]  # knox ships no types
    """`Authorization: Bearer flt_…`, hashed and expiring by knox."""

    def authenticate_header(self, request: "Request") -> str:
        return "Bearer"

    def authenticate(self, request: "Request") -> Any:
        """Who shows wrong tokens too often waits: TooMany."""
        network = caller_network(client_address(request))
        if request.headers.get("Authorization"):
            limits.check(limits.API_TOKEN, network)
        try:
            return super().authenticate(request)
        except AuthenticationFailed:
            limits.failed(limits.API_TOKEN, network, once_for=request.headers.get("Authorization", ""))
            raise

    def authenticate_credentials(self, token: bytes) -> Any:
        if not token.isascii():  # knox would raise UnicodeDecodeError: a 500 for the asking
            raise AuthenticationFailed("Invalid token.")
        return super().authenticate_credentials(token)


class ModelPermissions(DjangoModelPermissions):
    """Django's permissions for the user, reading included, and the token's scope where there is a token."""

    _view: ClassVar = ["%(app_label)s.view_%(model_name)s"]
    perms_map = {**DjangoModelPermissions.perms_map, "GET": _view, "HEAD": _view}

    def has_permission(self, request: "Request", view: "APIView") -> bool:
        needed = READ if request.method in {"GET", "HEAD", "OPTIONS"} else OPERATE
        return _in_scope(request.auth, {needed, OPERATE}) and super().has_permission(request, view)


class MayPublish(BasePermission):
    """A token with the scope `publish`; whether it covers the model is checked by `covers`."""

    message = "this needs an API token with the scope 'publish'"

    def has_permission(self, request: "Request", view: "APIView") -> bool:
        return isinstance(request.auth, ApiToken) and _in_scope(request.auth, {PUBLISH})


class MaySign(BasePermission):
    """A token with the scope `sign`, which can only add signatures to a proposal; or `publish`."""

    message = "this needs an API token with the scope 'sign' or 'publish'"

    def has_permission(self, request: "Request", view: "APIView") -> bool:
        return isinstance(request.auth, ApiToken) and _in_scope(request.auth, {SIGN, PUBLISH})


class MayMirror(BasePermission):
    """A token with the scope `mirror`, which fetches files of valid releases and nothing else."""

    message = "this needs an API token with the scope 'mirror'"

    def has_permission(self, request: "Request", view: "APIView") -> bool:
        return isinstance(request.auth, ApiToken) and _in_scope(request.auth, {MIRROR})


def covers(token: Any, model: str) -> bool:
    return not token.models_allowed or model in token.models_allowed


def _in_scope(token: Any, scopes: set[str]) -> bool:
    return not isinstance(token, ApiToken) or bool(scopes & set(token.scopes))
