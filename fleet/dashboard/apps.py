from django.apps import AppConfig
from django.contrib import admin


class DashboardConfig(AppConfig):
    name = "fleet.dashboard"

    def ready(self) -> None:
        admin.site.index_template = "dashboard/index.html"
        admin.site.index_title = "Overview"
