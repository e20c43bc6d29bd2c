"""What all models of a device share, put together from its directory and the application's options."""

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from device_sdk import __version__
from device_sdk.config import Home
from device_sdk.install import Parts
from device_sdk.journal import Journal
from device_sdk.ledger import Ledger
from device_sdk.options import Options
from device_sdk.probes import Probes
from device_sdk.protocol import events
from device_sdk.protocol.manifest import Manifest
from device_sdk.room import Rules, Swap
from device_sdk.runtime import RuntimeOptions
from device_sdk.store import Store
from device_sdk.traffic import Clock as TrafficClock
from device_sdk.traffic import Limits, Traffic

if TYPE_CHECKING:
    from device_sdk.download import Fetched
    from device_sdk.mirror import Mirrors
    from device_sdk.patching import Patcher


class Bringer:
    """Downloads releases, and reports patches and mirrors that were refused on the way.

    What downloads and patches are made of is imported with the first: a start serves without it.
    """

    def __init__(self, transport: Any, store: Store, journal: Journal, mirrors: "Mirrors", options: Options) -> None:
        self._transport = transport
        self._store = store
        self._journal = journal
        self._mirrors = mirrors
        self._seconds = options.download_seconds
        self._patcher: Patcher | None = None

    def using(self, traffic: Traffic) -> "Callable[[Manifest, str, Callable[..., None]], Fetched]":
        def bring(manifest: Manifest, signed_mirror: str, on_progress: Callable[..., None]) -> "Fetched":
            from device_sdk.download import fetch
            from device_sdk.mirror import BAD_MIRROR

            model = manifest.path.model
            patcher = self._patches()
            patcher.on_refused = lambda error: self._note(model, error.code, error)
            mirror = self._mirrors.choose(signed_mirror)
            if mirror:
                mirror.on_bad = lambda error: self._note(model, BAD_MIRROR, error)
            return fetch(
                self._transport, self._store, manifest, on_progress=on_progress, deadline=self._seconds,
                patcher=patcher, traffic=traffic, mirror=mirror,
            )  # fmt: skip

        return bring

    def _patches(self) -> "Patcher":
        from device_sdk.patching import Patcher

        self._patcher = self._patcher or Patcher(self._transport, self._store)
        return self._patcher

    def _note(self, model: str, code: str, error: Exception) -> None:
        detail = {"message": str(error)[:200]}
        self._journal.note(events.REFUSED, self._journal.get(model), reason=code, detail=detail)


def make_parts(
    home: Home, device: str, options: Options, *, store: Store, journal: Journal, bringer: Bringer, **links: Any
) -> Parts:
    """`links`: what the client adds of its own; see `install.Parts`."""
    traffic = Traffic(
        home.traffic_file, Limits(options.max_bytes_per_second, options.max_bytes_per_day), _traffic_clock(options)
    )
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
        rehearsal=_rehearsal(options),
        hash_first=options.hash_first,
        swap=Swap(options.swap, options.held_calls, options.held_seconds),
        clock=options.clock,
        **links,
    )


def _rehearsal(options: Options) -> Rules | None:
    rules = Rules(options.rehearsal_bytes, options.rehearsal_seconds, options.rehearsal_nice)
    return rules if options.rehearse else None


def upload_traffic(home: Home, options: Options) -> Traffic:
    """Of samples. A budget of its own: training data must not use up what an update needs."""
    limits = Limits(options.max_upload_bytes_per_second, options.max_upload_bytes_per_day)
    return Traffic(home.uploads_file, limits, _traffic_clock(options))


def _traffic_clock(options: Options) -> TrafficClock:
    return TrafficClock(today=lambda: datetime.fromtimestamp(options.clock.now()).astimezone().date())
