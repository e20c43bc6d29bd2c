"""`manage.py notices list | add | remove | test | deliveries | send_again`: the admin's actions in a shell."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fleet.errors import FleetError
from fleet.notices import services
from fleet.notices.models import Delivery, Subscription

SHOWN = 50


class Command(BaseCommand):
    help = "Who is told of what happens, by webhook or e-mail, and whether it arrived."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("list", help="every subscription")
        add = commands.add_parser("add", help="subscribe an address; prints a webhook's secret, which is not kept")
        add.add_argument("name")
        add.add_argument("target", help="https://… or e-mail addresses, separated by commas")
        add.add_argument("--event", action="append", default=[], help="such as rollout.halted; may be repeated")
        for name in ("remove", "test", "pause", "resume", "renew_secret"):
            commands.add_parser(name).add_argument("name")
        deliveries = commands.add_parser("deliveries", help="what was sent, the newest first")
        deliveries.add_argument("--state", choices=Delivery.State.values)
        commands.add_parser("send_again").add_argument("delivery", type=int)

    def handle(self, *_: Any, command: str, **options: Any) -> None:
        try:
            getattr(self, f"_{command}")(**options)
        except FleetError as error:
            raise CommandError(error.message) from error
        except Subscription.DoesNotExist as error:
            raise CommandError(f"there is no subscription {options['name']!r}; see `notices list`") from error
        except Delivery.DoesNotExist as error:
            raise CommandError(f"there is no delivery {options['delivery']}; see `notices deliveries`") from error

    def _list(self, **_: Any) -> None:
        for row in Subscription.objects.all():
            state = "active" if row.active else "off"
            self.stdout.write(f"{row.name}  {row.kind}  {row.target}  {', '.join(row.events) or 'all'}  {state}")

    def _add(self, *, name: str, target: str, event: list[str], **_: Any) -> None:
        kind = Subscription.Kind.WEBHOOK if "://" in target else Subscription.Kind.EMAIL
        made, secret = services.subscribe(name=name, kind=kind, target=target, events=event, actor="command line")
        self.stdout.write(secret or f"{made.name} is told by e-mail")

    def _remove(self, *, name: str, **_: Any) -> None:
        services.unsubscribe(subscription=Subscription.objects.get(name=name))

    def _test(self, *, name: str, **_: Any) -> None:
        services.send_test(subscription=Subscription.objects.get(name=name))

    def _pause(self, *, name: str, **_: Any) -> None:
        services.switch(subscription=Subscription.objects.get(name=name), active=False)

    def _resume(self, *, name: str, **_: Any) -> None:
        services.switch(subscription=Subscription.objects.get(name=name), active=True)

    def _renew_secret(self, *, name: str, **_: Any) -> None:
        self.stdout.write(services.renew_secret(subscription=Subscription.objects.get(name=name)))

    def _deliveries(self, *, state: str | None, **_: Any) -> None:
        rows = Delivery.objects.select_related("notice", "subscription")
        for row in (rows.filter(state=state) if state else rows)[:SHOWN]:
            told = f"{row.notice.kind}  {row.notice.title}"
            self.stdout.write(f"{row.pk}  {row.state}  {row.subscription}  {told}  {row.tries} tries  {row.error}")

    def _send_again(self, *, delivery: int, **_: Any) -> None:
        services.send_again(delivery=Delivery.objects.get(pk=delivery))
