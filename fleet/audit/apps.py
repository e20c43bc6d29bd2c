from django.apps import AppConfig
from django.db.models.signals import post_migrate


class AuditConfig(AppConfig):
    name = "fleet.audit"
    verbose_name = "Audit"

    def ready(self) -> None:
        from fleet.audit import context, protection, watch

        post_migrate.connect(protection.install_after_migrate, sender=self, dispatch_uid="fleet.audit.protection")
        context.follow_tasks()
        watch.watch_people()
