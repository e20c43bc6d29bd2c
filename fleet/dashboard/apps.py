from django.apps import AppConfig
from django.contrib import admin
from django.db.models.signals import post_migrate


class DashboardConfig(AppConfig):
    name = "fleet.dashboard"

    def ready(self) -> None:
        from fleet.dashboard.permissions import ensure_groups

        admin.site.index_template = "dashboard/index.html"
        admin.site.index_title = "Overview"
        post_migrate.connect(ensure_groups, sender=self, dispatch_uid="fleet-permission-groups")
