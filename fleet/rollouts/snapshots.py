"""Compile the policy in force once, and keep it in this process for as long as nobody changed it.

A change of a rollout shows at once, everywhere, by the revision's key, and so does a revocation. What other rooms
change (a group's labels) shows within `MAX_AGE`.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import structlog
from django.db.models import Prefetch

from device_sdk.protocol.assignment import ALWAYS, Conditions, Probation, Window
from device_sdk.protocol.errors import ProtocolError
from fleet.releases.models import Model, Release, Variant
from fleet.rollouts import policy
from fleet.rollouts.models import PolicyRevision, Rollout

MAX_AGE = 1.0  # seconds
COMPLETED_KEPT = 20  # per model: older ones are shadowed, but for devices that failed in all of these

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    key: str
    at: float
    snapshot: policy.Snapshot


_kept: _Kept | None = None


def current() -> policy.Snapshot:
    """The policy in force. One query, unless it has to be compiled."""
    global _kept  # noqa: PLW0603  # one reference, replaced whole: threads see the old or the new
    key = PolicyRevision.objects.filter(pk=1).values_list("key", flat=True).first()
    now = time.monotonic()
    if key and _kept and _kept.key == key and now - _kept.at < MAX_AGE:
        return _kept.snapshot
    snapshot = compile_policy()
    if key:
        _kept = _Kept(key, now, snapshot)
    return snapshot


def bump() -> None:
    """The policy changes in this transaction: whoever keeps a snapshot must compile it anew."""
    PolicyRevision.objects.update_or_create(pk=1, defaults={"key": token_hex(16)})


def compile_policy() -> policy.Snapshot:
    by_model: dict[str, list[policy.RolloutRules]] = defaultdict(list)
    stops = set(Model.objects.filter(when_nothing=Model.WhenNothing.STOP).values_list("name", flat=True))
    for rollout in _in_force():
        rules = rules_of(rollout)
        if rules is not None:
            by_model[rules.release.model].append(rules)
        else:
            stops.discard(rollout.release.model.name)  # what it says is not known: a doubt stops nothing
    return policy.Snapshot(rollouts=dict(by_model), stops=frozenset(stops))


def rules_of(rollout: Rollout) -> policy.RolloutRules | None:
    """A rollout as the policy reads it; None, told in the log, where its row cannot be read: it admits nobody."""
    stages = {stage.index: stage.percent for stage in rollout.stages.all()}
    try:
        return policy.RolloutRules(
            id=rollout.pk,
            state=rollout.state,
            release=release_ref(rollout.release),
            salt=rollout.salt,
            percent=stages[rollout.stage_index],
            selector=rollout.group.selector if rollout.group else {},
            urgent=rollout.urgent,
            window=Window.parse(rollout.window) if rollout.window else ALWAYS,
            probation=Probation.parse(rollout.probation) if rollout.probation else Probation(),
            conditions=Conditions.parse(rollout.conditions),
        )
    except (ProtocolError, KeyError) as error:
        logger.error("rollout_malformed", rollout=rollout.pk, error=str(error))  # noqa: TRY400  # no traceback each poll
        return None


def release_ref(release: Release) -> policy.ReleaseRef:
    return policy.ReleaseRef(
        model=release.model.name,
        version=release.version,
        variants={
            variant.name: policy.ManifestRef(variant.manifest_length, variant.manifest_sha256)
            for variant in release.variants.all()
            if variant.state == Variant.State.VALID
        },
    )


def with_variants(prefix: str = "") -> "Prefetch[Any]":
    """Variants without their manifests, which are long."""
    columns = ("release_id", "name", "state", "manifest_length", "manifest_sha256")
    return Prefetch(f"{prefix}variants", Variant.objects.only(*columns))


def _in_force() -> Iterator[Rollout]:
    completed: Counter[str] = Counter()
    rollouts = (
        Rollout.objects.filter(state__in=policy.IN_FORCE, release__state=Release.State.VALID)
        .select_related("release__model", "group")
        .prefetch_related("stages", with_variants("release__"))
        .order_by("-started_at", "-pk")
    )
    for rollout in rollouts:
        completed[rollout.release.model.name] += rollout.state == Rollout.State.COMPLETED
        if rollout.state == Rollout.State.COMPLETED and completed[rollout.release.model.name] > COMPLETED_KEPT:
            continue
        yield rollout
