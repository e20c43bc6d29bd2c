"""`manage.py campaign list | create | window | end`: ask devices for samples."""

import re
from argparse import ArgumentParser, ArgumentTypeError
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from device_sdk.protocol.assignment import Window
from fleet.errors import FleetError
from fleet.feedback import services
from fleet.feedback.models import Campaign
from fleet.releases.models import Model


class Command(BaseCommand):
    help = "List, create, reschedule and end campaigns."

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("list")
        create = commands.add_parser("create")
        create.add_argument("name")
        create.add_argument("--model", required=True)
        create.add_argument("--rate", type=float, default=0.01, help="probability of keeping an inference")
        create.add_argument("--max-samples", type=int, default=1_000, help="for each device, between two uploads")
        create.add_argument("--days", type=float, default=30, help="until it ends by itself")
        _add_window(create)
        window = commands.add_parser("window", help="change when devices upload")
        window.add_argument("name")
        _add_window(window)
        commands.add_parser("end").add_argument("name")

    def handle(self, *args: Any, command: str, **options: Any) -> None:
        try:
            getattr(self, f"_{command}")(**options)
        except FleetError as error:
            raise CommandError(error.message) from error
        except (Campaign.DoesNotExist, Model.DoesNotExist) as error:
            raise CommandError(str(error)) from error

    def _list(self, **_: Any) -> None:
        for campaign in Campaign.objects.select_related("model"):
            self._show(campaign)

    def _create(
        self,
        *,
        name: str,
        model: str,
        rate: float,
        max_samples: int,
        days: float,
        window: Window,
        jitter: int,
        **_: Any,
    ) -> None:
        campaign = services.create_campaign(
            name=name,
            model=Model.objects.get(name=model),
            expires_at=timezone.now() + timedelta(days=days),
            rate=rate,
            max_samples=max_samples,
            window_start=window.start,
            window_end=window.end,
            jitter_seconds=jitter,
        )
        self._show(campaign)

    def _window(self, *, name: str, window: Window, jitter: int, **_: Any) -> None:
        changes = {"window_start": window.start, "window_end": window.end, "jitter_seconds": jitter}
        self._show(services.change_campaign(campaign=Campaign.objects.get(name=name), **changes))

    def _end(self, *, name: str, **_: Any) -> None:
        self._show(services.end_campaign(campaign=Campaign.objects.get(name=name)))

    def _show(self, campaign: Campaign) -> None:
        times = [f"{minute // 60:02}:{minute % 60:02}" for minute in (campaign.window_start, campaign.window_end)]
        state = "active" if campaign.active else "ended"
        self.stdout.write(
            f"{campaign.name}: {campaign.model.name}, rate {campaign.rate:g}, up to {campaign.max_samples} samples, "
            f"{'-'.join(times)} + {campaign.jitter_seconds} s, {state}, until {campaign.expires_at:%F %R}"
        )


def _add_window(parser: ArgumentParser) -> None:
    parser.add_argument("--window", type=_window, default=Window(120, 300), metavar="HH:MM-HH:MM", help="device's time")
    parser.add_argument("--jitter", type=int, default=3_600, metavar="SECONDS", help="that uploads are spread over")


def _window(text: str) -> Window:
    match = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", text)
    if not match:
        raise ArgumentTypeError(f"expected HH:MM-HH:MM; got {text!r}")
    start_hour, start_minute, end_hour, end_minute = map(int, match.groups())
    return Window(start_hour * 60 + start_minute, end_hour * 60 + end_minute)
