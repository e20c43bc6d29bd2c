from django.apps import AppConfig
from django.db.models.signals import post_delete, post_migrate


class AccountsConfig(AppConfig):
    name = "fleet.accounts"

    def ready(self) -> None:
        from fleet.accounts.models import ApiToken
        from fleet.accounts.services import grant_group_permissions, note_deleted

        post_migrate.connect(grant_group_permissions, dispatch_uid="fleet.accounts.groups")
        post_delete.connect(note_deleted, sender=ApiToken, dispatch_uid="fleet.accounts.token")
