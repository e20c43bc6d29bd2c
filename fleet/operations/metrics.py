"""`/metrics` for Prometheus: requests by django-prometheus, and gauges of the fleet read from the database.

Not for everybody: figures of a fleet say much about its owner. A scraper shows `FLEET_METRICS_TOKEN`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from secrets import compare_digest
from typing import Any

import prometheus_client
from django.conf import settings
from django.db.models import Count, Max, QuerySet
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone
from prometheus_client import multiprocess
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fleet.api.device_auth import allow
from fleet.api.errors import body
from fleet.audit import selectors as audit
from fleet.devices.models import Device
from fleet.feedback.models import Batch
from fleet.notices.models import Delivery
from fleet.releases.models import Release
from fleet.rollouts import evidence as guard_evidence
from fleet.rollouts import forecast, objective
from fleet.rollouts.models import GuardReading, Rollout
from fleet.trust import selectors as trust
from fleet.trust import standing
from fleet.trust.models import RoleMetadata

PERMISSION = "devices.view_device"
Values = Mapping[tuple[str, ...], float]
IN_FORCE = (Rollout.State.RUNNING, Rollout.State.PAUSED)
AIMS = 20  # rollouts whose objective is looked at: each takes a look at its group
ON_COURSE = {forecast.MET: 1.0, forecast.LIKELY: 1.0, forecast.MISSED: 0.0, forecast.UNLIKELY: 0.0}
SEEN_POLLS = 3  # a device counts as online when it was seen within so many poll intervals


@allow("GET", "HEAD")
def metrics(request: HttpRequest) -> HttpResponse:
    if not _may_read(request):
        return JsonResponse(body("denied", "this needs the metrics token or the right to see devices"), status=403)
    content = b"".join(prometheus_client.generate_latest(registry) for registry in _registries())
    return HttpResponse(content, content_type=prometheus_client.CONTENT_TYPE_LATEST)


def _may_read(request: HttpRequest) -> bool:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if settings.METRICS_TOKEN and scheme.lower() == "bearer":
        return compare_digest(token.encode(), settings.METRICS_TOKEN.encode())
    return request.user.has_perm(PERMISSION)


def _registries() -> Iterator[prometheus_client.CollectorRegistry]:
    """Of all processes of `manage.py serve` where they share a folder, else of this one; then the fleet's."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        shared = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        yield shared
    else:
        yield prometheus_client.REGISTRY
    fleet = prometheus_client.CollectorRegistry()
    fleet.register(FleetCollector())
    yield fleet


class FleetCollector(Collector):
    """One query a gauge, at the time of the scrape: nothing is counted twice or goes stale."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield _by_state("fleet_devices", "Devices by state", Device.objects.all())
        yield _gauge("fleet_devices_online", "Active devices seen lately", {(): _online()})
        yield _by_state("fleet_releases", "Releases by state", Release.objects.all())
        yield _by_state("fleet_rollouts", "Rollouts by state", Rollout.objects.all())
        evidence, bounds = _guards()
        yield _gauge("fleet_guard_evidence", "Evidence against running rollouts, base 10 log", evidence, LABELS)
        yield _gauge("fleet_guard_bound", "Evidence at which a guard halts, base 10 log", bounds, LABELS)
        aims = _aims()
        yield _gauge("fleet_rollout_reached_percent", "Of the group, of rollouts with an objective", aims[0], "rollout")
        yield _gauge("fleet_rollout_objective_percent", "What is aimed at", aims[1], "rollout")
        # 1 met or likely, 0 missed or unlikely; left out where it cannot be said.
        yield _gauge("fleet_rollout_on_course", "Whether the objective will be met", aims[2], "rollout")
        yield _by_state("fleet_deliveries", "Notices by state", Delivery.objects.all())
        yield _by_state("fleet_batches", "Batches of samples by state", Batch.objects.all())
        head = audit.head()
        # A hash pinned by monitoring outside shows a trail that was cut or written anew: `audit verify --head`.
        yield _gauge("fleet_audit_head", "Newest position of the audit trail", {(head.hash,): head.position}, "hash")
        yield _gauge("fleet_audit_unsealed", "Audit entries without a place in the chain", {(): audit.unsealed()})
        yield _gauge("fleet_role_expiry_seconds", "Seconds until signed metadata expires", _expiries(), "role")
        yield _gauge("fleet_role_missing_signatures", "Signatures that a proposed role lacks", _missing(), "role")
        yield _gauge("fleet_device_views", "Views of active devices by how fresh they are", _views(), "state")


def _by_state(name: str, help_text: str, everything: QuerySet[Any]) -> GaugeMetricFamily:
    rows = everything.order_by().values_list("state").annotate(Count("pk"))
    return _gauge(name, help_text, {(state,): count for state, count in rows}, "state")


def _aims() -> tuple[dict[tuple[str, ...], float], ...]:
    """Of rollouts in force that aim at something: percent reached, percent aimed at, and whether it will be met."""
    rows = Rollout.objects.filter(state__in=IN_FORCE, objective_percent__isnull=False)
    found = {str(row.pk): (row, objective.of(row)) for row in rows.select_related("release__model", "group")[:AIMS]}
    said = {pk: (row, each) for pk, (row, each) in found.items() if each is not None}
    return (
        {(pk,): each.reached for pk, (_, each) in said.items()},
        {(pk,): row.objective_percent or 0.0 for pk, (row, _) in said.items()},
        {(pk,): ON_COURSE[each.verdict] for pk, (_, each) in said.items() if each.verdict in ON_COURSE},
    )


def _online() -> int:
    since = timezone.now() - timedelta(seconds=settings.POLL_INTERVAL * SEEN_POLLS)
    return Device.objects.filter(state=Device.State.ACTIVE, last_seen__gte=since).count()


LABELS = ("rollout", "guard")


def _guards() -> tuple[Values, Values]:
    evidence: dict[tuple[str, ...], float] = {}
    bounds: dict[tuple[str, ...], float] = {}
    for reading in GuardReading.objects.filter(rollout__state=Rollout.State.RUNNING).select_related("rollout"):
        terms = guard_evidence.terms_of(reading.rollout)
        if terms is not None and reading.run == reading.rollout.evidence_run:
            labels = (str(reading.rollout_id), reading.guard)
            evidence[labels], bounds[labels] = reading.evidence / math.log(10), terms.bound / math.log(10)
    return evidence, bounds


def _expiries() -> dict[tuple[str, ...], float]:
    now = timezone.now()
    newest = RoleMetadata.objects.order_by().values_list("role").annotate(Max("version"))
    wanted = dict(newest)
    rows = RoleMetadata.objects.filter(version__in=set(wanted.values())).values_list("role", "version", "expires_at")
    return {(role,): (expires - now).total_seconds() for role, version, expires in rows if wanted[role] == version}


def _missing() -> dict[tuple[str, ...], float]:
    return {(found.row.role,): found.signatures.lacking for found in trust.proposals()}


def _views() -> dict[tuple[str, ...], float]:
    found = standing.views(timezone.now())
    fresh = found.total - found.due - found.expired
    return {("fresh",): fresh, ("due",): found.due, ("expired",): found.expired}


def _gauge(name: str, help_text: str, values: Values, label: str | tuple[str, ...] | None = None) -> GaugeMetricFamily:
    names = [label] if isinstance(label, str) else label or []
    family = GaugeMetricFamily(name, help_text, labels=names)
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family
