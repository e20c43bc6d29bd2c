from django.apps import AppConfig


class RolloutsConfig(AppConfig):
    name = "fleet.rollouts"

    def ready(self) -> None:
        from fleet.notices import kinds
        from fleet.releases import signals
        from fleet.rollouts import notes, services

        kinds.register(notes.ALL)
        signals.revoked.connect(services.on_revoked, dispatch_uid="rollouts")
        signals.when_nothing_changed.connect(services.on_when_nothing_changed, dispatch_uid="rollouts")
