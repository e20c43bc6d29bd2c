"""Django's own users and permissions have no services: their signals are what tells of a change.

Values of fields are recorded but for the password's, of which only the change is.
"""

from typing import Any

from django.contrib.auth.models import Group, Permission, User
from django.db.models import Model
from django.db.models.signals import m2m_changed, post_delete, post_save, pre_save

from fleet.audit.services import record

FIELDS = ("username", "email", "first_name", "last_name", "is_active", "is_staff", "is_superuser", "password")
ADDED = {"post_add": "added", "post_remove": "removed", "pre_clear": "cleared"}


def watch_people() -> None:
    pre_save.connect(_remember, sender=User, dispatch_uid="fleet.audit.user.before")
    post_save.connect(_user_saved, sender=User, dispatch_uid="fleet.audit.user")
    post_save.connect(_group_saved, sender=Group, dispatch_uid="fleet.audit.group")
    for model in (User, Group):
        post_delete.connect(_deleted, sender=model, dispatch_uid=f"fleet.audit.{model.__name__}.gone")
    for through in (User.groups.through, User.user_permissions.through, Group.permissions.through):
        m2m_changed.connect(_related, sender=through, dispatch_uid=f"fleet.audit.{through.__name__}")


def _remember(instance: User, raw: bool = False, update_fields: Any = None, **_: object) -> None:
    if raw or _only_log_in(update_fields):
        return
    instance._audited = User.objects.filter(pk=instance.pk).values(*FIELDS).first() if instance.pk else None  # type: ignore[attr-defined]  # noqa: SLF001


def _user_saved(instance: User, created: bool, raw: bool = False, update_fields: Any = None, **_: object) -> None:
    if raw or _only_log_in(update_fields):
        return
    before = getattr(instance, "_audited", None) or {}
    changes = {name: _shown(instance, name) for name in FIELDS if before.get(name) != getattr(instance, name)}
    if created or changes:
        record("user.created" if created else "user.changed", target=instance.get_username(), detail=changes)


def _shown(user: User, name: str) -> Any:
    return "set" if name == "password" else getattr(user, name)


def _only_log_in(update_fields: Any) -> bool:
    """Django writes the time of each log-in: no change."""
    return update_fields is not None and set(update_fields) <= {"last_login"}


def _group_saved(instance: Group, created: bool, raw: bool = False, **_: object) -> None:
    if not raw:
        record("permissions.created" if created else "permissions.changed", target=instance.name)


def _deleted(instance: Model, **_: object) -> None:
    record("user.deleted" if isinstance(instance, User) else "permissions.deleted", target=instance)


def _related(instance: Any, action: str, model: type[Model], pk_set: set[Any] | None, **_: object) -> None:
    """Someone's groups or permissions, or a group's: from whichever side they were changed."""
    if action not in ADDED or (pk_set is not None and not pk_set):
        return
    names = _names(model, pk_set) if pk_set else []
    noun = "user" if isinstance(instance, User) else "permissions"
    what = "members" if model is User else "groups" if model is Group else "permissions"
    record(f"{noun}.{what}_{ADDED[action]}", target=instance, detail={what: names})


def _names(model: type[Model], pks: set[Any]) -> list[str]:
    if issubclass(model, Permission):
        found = Permission.objects.filter(pk__in=pks).values_list("content_type__app_label", "codename")
        return sorted(f"{app}.{codename}" for app, codename in found)
    rows = model._default_manager.filter(pk__in=pks)  # noqa: SLF001  # Django's documented name for it
    return sorted(str(row) for row in rows)
