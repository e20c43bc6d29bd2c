from django.apps import AppConfig


class TrustConfig(AppConfig):
    name = "fleet.trust"

    def ready(self) -> None:
        from fleet.trust import checks  # noqa: F401  # registers them
