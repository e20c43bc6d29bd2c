"""Compile the policy in force once, and keep it in this process for as long as nobody changed it.

A change of a rollout shows at once, everywhere, by the revision's key, and so does a revocation. What other rooms
change (a group's labels) shows within `MAX_AGE`.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

import structlog
from django.db.models import Prefetch, QuerySet

from device_sdk.protocol.assignment import ALWAYS, Conditions, Probation, Window
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Requirements
from fleet import sql
from fleet.devices import selectors as devices
from fleet.devices.changes import policy_changed
from fleet.errors import Invalid
from fleet.releases.models import Model, Release, Variant
from fleet.rollouts import policy, targeting
from fleet.rollouts.models import PolicyRevision, Rollout

MAX_AGE = 1.0  # seconds
HISTORY = 50  # rollouts not in force that are told beside the others
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
    found = sql.fetch("SELECT key FROM rollouts_policyrevision WHERE id = 1")
    key = found[0][0] if found else ""
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
    policy_changed()


def compile_policy() -> policy.Snapshot:
    by_model: dict[str, list[policy.RolloutRules]] = defaultdict(list)
    stops = set(Model.objects.filter(when_nothing=Model.WhenNothing.STOP).values_list("name", flat=True))
    for rollout in _in_force():
        rules = rules_of(rollout)
        if rules is not None:
            by_model[rules.release.model].append(rules)
        else:
            stops.discard(rollout.release.model.name)  # what it says is not known: a doubt stops nothing
    return policy.Snapshot(rollouts=dict(by_model), stops=frozenset(stops), mirrors=devices.mirrors())


def compile_history() -> policy.Snapshot:
    """The policy in force, and the newest rollouts beside it that admit nobody: for telling people about a device.

    What these do not admit for is in their state, so that the answer is the same.
    """
    force = {rollout.pk: rollout for rollout in _in_force()}
    others = _with_all(Rollout.objects.exclude(pk__in=force)).order_by("-pk")[:HISTORY]
    by_model: dict[str, list[policy.RolloutRules]] = defaultdict(list)
    for rollout in sorted((*force.values(), *others), key=_by_start, reverse=True):
        rules = rules_of(rollout)
        if rules is None:
            rules = policy.RolloutRules(rollout.pk, "unreadable", release_ref(rollout.release), rollout.salt, 0)
        elif rollout.pk not in force and rules.state in policy.IN_FORCE:
            revoked = rollout.release.state != Release.State.VALID
            rules = replace(rules, state="revoked" if revoked else "superseded")
        by_model[rules.release.model].append(rules)
    return replace(compile_policy(), rollouts=dict(by_model))


def _by_start(rollout: Rollout) -> tuple[datetime, int]:
    """The order in which rollouts are asked; drafts would come first."""
    return rollout.started_at or datetime.max.replace(tzinfo=UTC), rollout.pk


def rules_of(rollout: Rollout) -> policy.RolloutRules | None:
    """A rollout as the policy reads it; None, told in the log, where its row cannot be read: it admits nobody."""
    stages = {stage.index: stage for stage in rollout.stages.all()}
    try:
        return policy.RolloutRules(
            id=rollout.pk,
            state=rollout.state,
            release=release_ref(rollout.release),
            salt=rollout.salt,
            percent=min(stages[rollout.stage_index].percent, 100.0 if rollout.reach is None else rollout.reach),
            selector=targeting.selector(rollout),
            excludes=targeting.excludes(rollout),
            rings=targeting.rings(stages.values(), rollout.stage_index),
            urgent=rollout.urgent,
            window=Window.parse(rollout.window) if rollout.window else ALWAYS,
            probation=Probation.parse(rollout.probation) if rollout.probation else Probation(),
            conditions=Conditions.parse(rollout.conditions),
            max_hold=rollout.max_hold,
            forgive=rollout.forgive,
        )
    except (ProtocolError, Invalid, KeyError) as error:
        logger.error("rollout_malformed", rollout=rollout.pk, error=str(error))  # noqa: TRY400  # no traceback each poll
        return None


def release_ref(release: Release) -> policy.ReleaseRef:
    """With the releases to step through before it: no query where there is none."""
    ref = _bare_ref(release)
    floors: dict[str, policy.ReleaseRef] = {}
    wanted = _floors_of(ref)
    while wanted := wanted - floors.keys():
        rows = Release.objects.filter(model=release.model_id, version__in=wanted, state=Release.State.VALID)
        found = [_bare_ref(row) for row in rows.select_related("model").prefetch_related(with_variants())]
        floors |= {floor.version: floor for floor in found}
        wanted = {version for floor in found for version in _floors_of(floor)} if found else set()
    return replace(ref, floors=floors)


def _floors_of(ref: policy.ReleaseRef) -> set[str]:
    return {manifest.requires.release for manifest in ref.variants.values()} - {""}


def _bare_ref(release: Release) -> policy.ReleaseRef:
    return policy.ReleaseRef(
        model=release.model.name,
        version=release.version,
        variants={
            variant.name: policy.ManifestRef(variant.manifest_length, variant.manifest_sha256, _requires(variant))
            for variant in release.variants.all()
            if variant.state == Variant.State.VALID
        },
    )


def _requires(variant: Variant) -> Requirements:
    """The manifest's floors; for the opset, what the model really is of, where the manifest does not say."""
    requires = Requirements.parse(variant.requires)
    return requires if requires.opset else replace(requires, opset=variant.opset or 0)


def with_variants(prefix: str = "") -> "Prefetch[Any]":
    """Variants without their manifests, which are long."""
    columns = ("release_id", "name", "state", "manifest_length", "manifest_sha256", "requires", "opset")
    return Prefetch(f"{prefix}variants", Variant.objects.only(*columns))


def _in_force() -> Iterator[Rollout]:
    completed: Counter[str] = Counter()
    rollouts = _with_all(Rollout.objects.filter(state__in=policy.IN_FORCE, release__state=Release.State.VALID))
    for rollout in rollouts.order_by("-started_at", "-pk"):
        completed[rollout.release.model.name] += rollout.state == Rollout.State.COMPLETED
        if rollout.state == Rollout.State.COMPLETED and completed[rollout.release.model.name] > COMPLETED_KEPT:
            continue
        yield rollout


def _with_all(rollouts: QuerySet[Rollout]) -> QuerySet[Rollout]:
    return rollouts.select_related("release__model", "group", "exclude_group").prefetch_related(
        "stages__ring", with_variants("release__")
    )
