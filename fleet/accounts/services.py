"""Make API tokens, and keep the operator groups' permissions in step with the models."""

from collections.abc import Sequence
from datetime import timedelta

from django.apps import AppConfig
from django.contrib.auth.models import Group, Permission, User
from django.db import transaction
from django.db.models import Q

from device_sdk.protocol.names import check_model
from fleet.accounts.models import MIRROR, OPERATE, PUBLISH, SCOPES, SIGN, ApiToken
from fleet.audit.context import by_definition
from fleet.audit.services import record
from fleet.errors import Invalid

VIEWERS, OPERATORS = "Viewers", "Operators"
SERVICE_PREFIX = "token:"  # of the accounts that are nobody's but a token's
MAX_LIFETIME = timedelta(days=3650)
# What operators may do besides looking. Releases come from CI, roles from key holders: nobody edits those.
OPERATOR_PERMISSIONS = (
    "operate_rollout",
    "approve_rollout",
    "resend_delivery",
    "add_rollout",
    "change_rollout",
    "add_stage",
    "change_stage",
    "delete_stage",
    "add_group",
    "change_group",
    "delete_group",
    "change_device",
    "add_enrolmenttoken",
    "change_enrolmenttoken",
    "withdraw_release",
    "add_campaign",
    "change_campaign",
    "delete_pendingrole",  # withdraw what is proposed and not signed
    "export_auditentry",
)
OURS = ("devices", "releases", "trust", "rollouts", "feedback", "accounts", "audit", "notices")


@transaction.atomic
def create_token(
    *, name: str, scopes: Sequence[str], models: Sequence[str] = (), lifetime: timedelta, user: User | None = None
) -> tuple[ApiToken, str]:
    """Make an API token and return it with its text, which is stored nowhere. `models` empty: all of them.

    Without a user it belongs to a service account of its own, which cannot log in.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise Invalid("unknown_scope", f"scopes: expected some of {', '.join(SCOPES)}; got {unknown or 'none'}")
    if not timedelta(0) < lifetime <= MAX_LIFETIME:
        raise Invalid("wrong_lifetime", f"lifetime: expected up to {MAX_LIFETIME.days} days; got {lifetime}")
    token, text = ApiToken.objects.create(
        user=user or _service_account(name, scopes),
        expiry=lifetime,
        name=name[:100],
        scopes=sorted(set(scopes)),
        models_allowed=sorted({check_model(model) for model in models}),
    )
    _note("api_token.created", token)
    return token, text


def note_deleted(instance: ApiToken, **_: object) -> None:
    """However it went: revoked by a person, expired and cleared away by knox, or with its user."""
    _note("api_token.deleted", instance)


def _note(action: str, token: ApiToken) -> None:
    detail = {
        "user": token.user.get_username(),
        "starts_with": token.token_key,
        "scopes": token.scopes,
        "models": token.models_allowed or "all",
        "expires": token.expiry,
    }
    record(action, target=token.name, detail=detail)


def _service_account(name: str, scopes: Sequence[str]) -> User:
    """Permissions as wide as the scopes: a token can never do more than its user."""
    user, created = User.objects.get_or_create(username=f"{SERVICE_PREFIX}{name}"[:150])
    if created:
        user.set_unusable_password()
        user.save(update_fields=["password"])
    groups = {OPERATORS} if OPERATE in scopes else set() if set(scopes) <= {PUBLISH, SIGN, MIRROR} else {VIEWERS}
    user.groups.set(Group.objects.filter(name__in=groups))
    return user


def grant_group_permissions(sender: AppConfig, *, using: str, **_: object) -> None:
    """After an app's migrations: Viewers may look at all of it, Operators may operate besides. Safe to repeat."""
    if sender.label not in OURS:
        return
    with by_definition():  # what a version brings along is nobody's doing
        _grant(sender, using)


def _grant(sender: AppConfig, using: str) -> None:
    own = Permission.objects.using(using).filter(content_type__app_label=sender.label)
    looking = Q(codename__startswith="view_")
    for name, wanted in ((VIEWERS, looking), (OPERATORS, looking | Q(codename__in=OPERATOR_PERMISSIONS))):
        group, _created = Group.objects.using(using).get_or_create(name=name)
        group.permissions.add(*own.filter(wanted))
