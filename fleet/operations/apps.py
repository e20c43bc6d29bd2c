from django.apps import AppConfig
from django.conf import settings


class OperationsConfig(AppConfig):
    name = "fleet.operations"

    def ready(self) -> None:
        from fleet.operations import checks

        checks.register_all()
        settings.VAR.mkdir(parents=True, exist_ok=True)  # SQLite makes its file, but not the folder
