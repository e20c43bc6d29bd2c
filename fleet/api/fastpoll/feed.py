"""Keep a process's table true to the database: read once in bulk, then what changed, twice a second, on a thread.

No request waits for it, and nothing scans the fleet again: an idle look is three queries, whatever the fleet's size.
While the database cannot be read the table goes stale within `STALE_SECONDS`, and polls go to Django.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import structlog
from django.conf import settings
from django.db import DatabaseError, close_old_connections, connection
from django.db.models import JSONField, QuerySet, TextField
from django.db.models.functions import Cast
from django.utils import timezone

from fleet.api.fastpoll.table import Row, Table, World
from fleet.devices import changes
from fleet.devices.models import Device, RunningSet
from fleet.errors import FleetError
from fleet.feedback import selectors as feedback
from fleet.rollouts import selectors as rollouts
from fleet.rollouts import snapshots
from fleet.rollouts.policy import Traits
from fleet.trust import inputs
from fleet.trust import selectors as trust
from fleet.trust.models import DeviceView

LOOK_SECONDS = 0.5  # a revocation is to be obeyed within a second
STALE_SECONDS = 2.5  # without a look that succeeded
LATE = timedelta(seconds=3)  # views whose transactions took so long are found; later ones when their device polls
PAGE, CHUNK = 5_000, 500  # rows of a statement: in the bulk, and by their keys
WANTED, KINDS = 10_000, 100_000

logger = structlog.get_logger(__name__)


class Feed:
    """`table` answers while `good_until` (monotonic seconds) is ahead. `each_time`: called before each look."""

    def __init__(self, each_time: Callable[[], None] = lambda: None) -> None:
        self._each_time = each_time
        self.table = Table()
        self.good_until = 0.0
        self.wanted: set[int] = set()  # devices whose polls the table could not answer
        self.wanted_runs: set[str] = set()
        self._position = changes.Position()
        self._trusted = trust.InForce(None, [])
        self._loaded = False
        self._views_since = timezone.now()
        self._traits: dict[tuple[Any, ...], Traits] = {}  # by the texts of a row
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ensure(self) -> None:
        """Start the thread, once in a process; a server that forks its workers has one in each and none before."""
        if self._thread is not None or not settings.FAST_POLL:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fast-poll", daemon=False)
                self._thread.start()

    def want(self, device: int, runs: str) -> None:
        """A poll that the table could not answer: read this device, and maybe this running set, at the next look."""
        if len(self.wanted) < WANTED:
            self.wanted.add(device)
        if runs not in self.table.running_sets and len(self.wanted_runs) < WANTED:
            self.wanted_runs.add(runs)

    def look(self) -> None:
        """Read what changed; everything, where that cannot be told."""
        started = time.monotonic()
        news = changes.since(self._position) if self._loaded else None
        if news is None:
            self._load()
        else:
            self._read_on(news)
        self.good_until = started + STALE_SECONDS

    def _load(self) -> None:
        """Everything. What changes meanwhile has a later position, and is read again."""
        position, table = changes.newest(), Table()
        self._views_since = timezone.now() - LATE
        self._adopt(table)  # first: it fails early where there is no trust yet
        failed, last = rollouts.failures(), 0
        while page := list(_devices().filter(pk__gt=last).order_by("pk")[:PAGE]):
            table.put(self._rows(page, failed))
            last = page[-1][0]
        self._lead(table, ())
        self.table, self._position, self._loaded = table, position, True
        logger.info("fast_poll_loaded", devices=table.devices, revision=position.revision)

    def _read_on(self, news: changes.News) -> None:
        """1. what holds for all, where it changed, a campaign ended, or the online key's file says something else
        2. the devices that changed, have a new view, or asked in vain; running sets that were asked for
        """
        table, wanted, runs = self.table, self.wanted, self.wanted_runs
        self.wanted, self.wanted_runs = set(), set()
        world = table.world
        if news.policy or world is None or _is_over(world) or inputs.of_trust(self._trusted) != world.trust:
            self._lead(table, ())
            self._adopt(table)
        for chunk in _chunks(sorted(news.devices | wanted | self._viewed())):
            rows = list(self._rows(_devices().filter(pk__in=chunk), rollouts.failures(chunk)))
            if any(row.pins for row in rows):
                self._lead(table, rows)
            table.put(rows)
        if runs:
            known = RunningSet.objects.filter(digest__in=runs).values_list("digest", "runs")
            table.know(dict(known))
        self._position = news.position

    def _adopt(self, table: Table) -> None:
        self._trusted = trust.in_force()
        sampling, digest = feedback.campaigns_in_force(), inputs.of_trust(self._trusted)
        table.adopt(World(snapshots.compile_policy(), sampling, digest))

    def _lead(self, table: Table, new: Iterable[Row]) -> None:
        table.lead(rollouts.pinned_to(table.pins().union(*(row.pins.items() for row in new))))

    def _viewed(self) -> set[int]:
        """Devices whose view was signed since, here or in another process."""
        now = timezone.now()
        signed = DeviceView.objects.filter(signed_at__gte=self._views_since).values_list("device_id", "version")
        found = {device for device, version in signed if not self.table.holds(device, version)}
        self._views_since = now - LATE
        return found

    def _rows(self, found: Iterable[Sequence[Any]], failed: Mapping[int, frozenset[int]]) -> Iterator[Row]:
        for device, name, epoch, state, pins, view, expires, signed_for, *kind in found:
            yield Row(
                device=device,
                name=name,
                epoch=epoch if state == Device.State.ACTIVE else 0,
                traits=self._traits.get(tuple(kind)) or self._learn(tuple(kind)),
                view=view or 0,
                until=int((expires - settings.VIEW_RENEW_BEFORE).timestamp()) if expires else 0,
                signed_for=signed_for or "",
                pins=json.loads(pins) if pins != "{}" else {},
                failed=failed.get(device, frozenset()),
            )

    def _learn(self, kind: tuple[Any, ...]) -> Traits:
        """Devices of one kind have the same texts in these columns, so that each is parsed once for all of them."""
        if len(self._traits) > KINDS:
            self._traits = {}
        values = dict(zip(rollouts.TRAITS, kind, strict=True))
        parsed = {name: json.loads(text) if _is_json(name) else text for name, text in values.items()}
        traits = self._traits[kind] = rollouts.traits_of(Device(**parsed))
        return traits

    def _run(self) -> None:
        main = threading.main_thread()
        while main.is_alive():
            self._look_quietly()
            main.join(LOOK_SECONDS)
        connection.close()

    def _look_quietly(self) -> None:
        close_old_connections()
        try:
            self._each_time()
            self.look()
        except (DatabaseError, FleetError) as error:
            logger.warning("fast_poll_not_read", error=str(error))
        except Exception:  # whatever it is, polls go to Django; the next look may do better
            logger.exception("fast_poll_not_read")


def _devices() -> "QuerySet[Device, tuple[Any, ...]]":
    """What a row is made of. JSON as text: parsing it for each device would cost more than all the rest."""
    text = {f"{name}_text": Cast(name, TextField()) for name in ("pins", *rollouts.TRAITS) if _is_json(name)}
    kind = [f"{name}_text" if _is_json(name) else name for name in rollouts.TRAITS]
    view = ("view__version", "view__expires_at", "view__inputs_digest")
    return (
        Device.objects.order_by()
        .annotate(**text)
        .values_list("pk", "name", "epoch", "state", "pins_text", *view, *kind)
    )


def _is_json(name: str) -> bool:
    return isinstance(Device._meta.get_field(name), JSONField)  # noqa: SLF001  # documented all the same


def _is_over(world: World) -> bool:
    """Whether a campaign has ended since."""
    now = timezone.now().timestamp()
    return any(sampling.expires <= now for sampling in world.sampling.values())


def _chunks(devices: Sequence[int]) -> Iterator[Sequence[int]]:
    return (devices[start : start + CHUNK] for start in range(0, len(devices), CHUNK))
