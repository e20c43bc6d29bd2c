from django.apps import AppConfig
from django.db.models.signals import post_migrate


class AccountsConfig(AppConfig):
    name = "fleet.accounts"

    def ready(self) -> None:
        from fleet.accounts.services import grant_group_permissions

        post_migrate.connect(grant_group_permissions, dispatch_uid="fleet.accounts.groups")
