"""What all models of a device share, put together from its directory and the application's options."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from device_sdk import __version__
from device_sdk.config import Home
from device_sdk.download import Fetched, fetch
from device_sdk.install import Parts, Swap
from device_sdk.journal import Journal
from device_sdk.ledger import Ledger
from device_sdk.mirror import BAD_MIRROR, Mirror
from device_sdk.options import Options
from device_sdk.patching import Patcher
from device_sdk.probes import Probes
from device_sdk.protocol import events
from device_sdk.protocol.manifest import Manifest
from device_sdk.rehearsal import Rules
from device_sdk.runtime import RuntimeOptions
from device_sdk.store import Store
from device_sdk.traffic import Clock as TrafficClock
from device_sdk.traffic import Limits, Traffic


class Bringer:
    """Downloads releases, and reports patches and mirrors that were refused on the way."""

    def __init__(self, transport: Any, store: Store, journal: Journal, mirror: Mirror | None, options: Options) -> None:
        self._transport = transport
        self._store = store
        self._journal = journal
        self._mirror = mirror
        self._seconds = options.download_seconds
        self._patcher = Patcher(transport, store)

    def using(self, traffic: Traffic) -> "Callable[[Manifest, Callable[..., None]], Fetched]":
        def bring(manifest: Manifest, on_progress: Callable[..., None]) -> Fetched:
            model = manifest.path.model
            self._patcher.on_refused = lambda error: self._note(model, error.code, error)
            if self._mirror:
                self._mirror.on_bad = lambda error: self._note(model, BAD_MIRROR, error)
            return fetch(
                self._transport, self._store, manifest, on_progress=on_progress, deadline=self._seconds,
                patcher=self._patcher, traffic=traffic, mirror=self._mirror,
            )  # fmt: skip

        return bring

    def _note(self, model: str, code: str, error: Exception) -> None:
        detail = {"message": str(error)[:200]}
        self._journal.note(events.REFUSED, self._journal.get(model), reason=code, detail=detail)


def make_parts(
    home: Home, device: str, options: Options, *, store: Store, journal: Journal, bringer: Bringer, **links: Any
) -> Parts:
    """`links`: what the client adds of its own; see `install.Parts`."""
    today = lambda: datetime.fromtimestamp(options.clock.now()).astimezone().date()  # noqa: E731
    limits = Limits(options.max_bytes_per_second, options.max_bytes_per_day)
    traffic = Traffic(home.traffic_file, limits, TrafficClock(today=today))
    return Parts(
        device=device,
        sdk=__version__,
        store=store,
        journal=journal,
        fetch=bringer.using(traffic),
        probes=Probes(options.probes, disk=store.free_bytes),
        traffic=traffic,
        ledger=Ledger(home.ledger_file),
        options=RuntimeOptions(options.intra_op_threads, options.providers, options.session_options),
        rehearsal=Rules(options.rehearsal_bytes, options.rehearsal_seconds) if options.rehearse else None,
        swap=Swap(options.swap, options.held_calls, options.held_seconds),
        clock=options.clock,
        **links,
    )
