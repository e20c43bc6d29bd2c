"""What the pages of single rows show beside their fields: tables for unfold's component, as plain values."""

from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, QuerySet
from django.utils import timezone
from django.utils.html import format_html

from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import Manifest
from fleet import presentation
from fleet.dashboard import quality, selectors
from fleet.devices import selectors as devices
from fleet.devices.models import Device, EnrolmentToken
from fleet.errors import FleetError
from fleet.releases import provenance as release_provenance
from fleet.releases import selectors as release_selectors
from fleet.releases.models import Attachment, Model, Patch, Release, Variant
from fleet.rollouts import objective
from fleet.rollouts import selectors as rollouts
from fleet.rollouts.models import Outcome, Rollout, Stage
from fleet.trust import selectors as trust
from fleet.trust.models import PendingRole
from fleet.trust.provisioning import provision

EVENTS = 50
OUTCOMES = 200

Table = dict[str, Any]


def table(headers: list[str], rows: list[list[Any]]) -> Table:
    return {"headers": headers, "rows": rows}


# --- rollouts -----------------------------------------------------------------------------------------------------
def guards(rollout: Rollout) -> Table:
    """What each stage asks before it passes."""
    rows = [
        [
            str(stage),
            f"{stage.success_threshold:.0%} of {stage.min_reports}+ reports",
            stage.failure_budget,
            presentation.span(stage.soak_seconds),
            _stage_times(stage),
        ]
        for stage in rollout.stages.all()
    ]
    return table(["Stage", "Success", "Failures allowed", "At least", "Reached"], rows)


VERDICTS = {
    "met": ("met", "success"), "missed": ("missed", "danger"), "likely": ("on course", "success"),
    "unlikely": ("not on course", "warning"), "open": ("may or may not be met", "info"),
    "unknown": ("cannot be foretold", ""),
}  # fmt: skip


def aim(rollout: Rollout) -> dict[str, Any] | None:
    """The objective and its forecast, in words; None where nothing is aimed at."""
    found = objective.of(rollout)
    if found is None:
        return None
    words, tone = VERDICTS[found.verdict]
    return {
        "percent": rollout.objective_percent,
        "of": found,
        "words": words,
        "tone": tone,
    }


def _stage_times(stage: Stage) -> str:
    if stage.entered_at is None:
        return "-"
    if stage.passed_at is None:
        agreed = f", approved by {stage.approved_by}" if stage.approved_at else ", needs approval to pass"
        return format_html("<span>{}{}</span>", presentation.ago(stage.entered_at), agreed * stage.needs_approval)
    return format_html(
        "<span>{}, passed {}</span>", presentation.ago(stage.entered_at), presentation.ago(stage.passed_at)
    )


SHOWN_FIRST = (Outcome.State.FAILED, Outcome.State.UPDATING, Outcome.State.WITHDRAWN, Outcome.State.COMMITTED)


def outcomes(rollout: Rollout) -> dict[str, Any]:
    """Devices of a rollout, failures first; `reasons` sums up why."""
    shown: list[Outcome] = []
    for state in SHOWN_FIRST:  # one state after the other: each has its place in an index
        rows = rollout.outcomes.filter(state=state).select_related("device").order_by("-changed_at")
        shown += rows[: OUTCOMES - len(shown)]
    cells = [
        [
            presentation.link(row.device),
            presentation.state(row.state),
            row.reason or row.step,
            presentation.ago(row.changed_at),
        ]
        for row in shown
    ]
    return {
        "reasons": _failures(rollout).most_common(6),
        "total": sum(rollouts.outcome_counts(rollout).values()),
        "table": table(["Device", "State", "Last said", "When"], cells),
    }


def _failures(rollout: Rollout) -> Counter[str]:
    """By the first words of the reason."""
    reasons = Counter[str]()
    failed = rollout.outcomes.filter(state=Outcome.State.FAILED).order_by()
    for reason, number in failed.values_list("reason").annotate(number=Count("*")):
        reasons[reason.split(":")[0] or "no reason given"] += number
    return reasons


# --- devices ------------------------------------------------------------------------------------------------------
def device(row: Device) -> dict[str, Any]:
    events = list(row.events.exclude(kind="health")[: EVENTS + 1])
    return {
        "seen": presentation.presence(row.last_seen, devices.offline_before()),
        "labels": presentation.label_chips(row.labels),
        "refusal": refusal(row),
        "models": _models_of(row),
        "events": events[:EVENTS],
        "more": len(events) > EVENTS,
        "rollouts": table(
            ["Rollout", "State", "When"],
            [
                [presentation.link(o.rollout), presentation.state(o.state), presentation.ago(o.changed_at)]
                for o in row.outcomes.select_related("rollout__release__model").order_by("-changed_at")[:8]
            ],
        ),
        "batches": table(
            ["Batch", "Samples", "State", "When"],
            [
                [
                    presentation.link(b, b.model.name),
                    b.samples,
                    presentation.state(b.state),
                    presentation.ago(b.announced_at),
                ]
                for b in row.batches.select_related("model")[:8]
            ],
        ),
    }


def refusal(row: Device) -> dict[str, Any]:
    """What it refuses now, and since when; empty: nothing."""
    if not row.refusal:
        return {}
    return {**row.refusal, "ago": presentation.ago(datetime.fromisoformat(row.refusal["at"]))}


def _models_of(row: Device) -> Table:
    runs = row.runs.runs if row.runs else {}
    statuses = {status.model: status for status in row.statuses.all()}
    cells = []
    for model in row.model_names:
        status = statuses.get(model)
        cells.append(
            [
                model,
                runs.get(model, "nothing yet"),
                presentation.state(status.state) if status else "-",
                presentation.ago(status.since) if status else "-",
                status.reason if status else "",
                quality.health(status.health) if status and status.health else "",
            ]
        )
    return table(["Model", "Runs", "State", "Since", "Reason", "Health"], cells)


# --- models and releases ------------------------------------------------------------------------------------------
def model(row: Model) -> dict[str, Any]:
    from fleet.dashboard import views

    spread = selectors.spread_of(row, timezone.now(), timedelta(days=30))
    releases = row.releases.all()[:50]
    return {
        "spread": views.spread_context(spread),
        "releases": table(
            ["Release", "State", "Published by", "Published"],
            [
                [
                    presentation.link(r, r.version),
                    presentation.state(r.state),
                    r.published_by,
                    presentation.ago(r.created_at),
                ]
                for r in releases
            ],
        ),
    }


STILL = 200


def revoked(row: Release | None) -> dict[str, Any]:
    """Of a revoked release: by whom, and which devices still run it and why. Nothing of any other."""
    if row is None or row.state != Release.State.REVOKED:
        return {}
    found = sorted(rollouts.still_running(row), key=lambda each: each.device.name)
    reasons = Counter(selectors.REASONS.get(each.why, each.why) for each in found)
    horizon = devices.offline_before()
    return {
        "total": len(found),
        "reasons": reasons.most_common(),
        "table": table(
            ["Device", "Why", "Goes to", "Last seen"],
            [
                [
                    presentation.link(each.device),
                    _why(each),
                    each.target or "-",
                    presentation.presence(each.device.last_seen, horizon),
                ]
                for each in found[:STILL]
            ],
        ),
    }


def _why(each: rollouts.Laggard) -> str:
    since = format_html(" since {}", presentation.ago(each.since)) if each.since else ""
    kind = selectors.REASONS.get(each.why, each.why)
    return format_html('<span><span class="fleet-chip">{}</span> {}{}</span>', kind, each.detail, since)


TONES = {"verified": "success", "unverified": "warning"}
TITLES = {"model-signature": "Model signature", "ml-bom": "Bill of materials", "provenance": "Provenance"}


def provenance(row: Release) -> dict[str, Any]:
    """What CI signed beside the files: metadata, and what is attached."""
    found = row.variants.prefetch_related("attachments__artifact")
    attached: dict[str, dict[str, Any]] = {}
    for variant in found:
        for item in variant.attachments.all():
            new = {"of": item, "title": TITLES.get(item.kind, item.kind), "verdicts": [], **_shown(item)}
            shown = attached.setdefault(f"{item.artifact_id}{item.kind}", new)
            shown["verdicts"] += _verdict(item)
    return {"metadata": _metadata(found), "attached": [*attached.values()]}


def _metadata(found: Iterable[Variant]) -> list[tuple[str, str]]:
    """By key; where variants differ, each value with the variants that have it."""
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for variant in found:
        for key, value in release_selectors.metadata(variant).items():
            values[key][value].append(variant.name)
    return sorted((key, _differing(by_value)) for key, by_value in values.items())


def _differing(variants: dict[str, list[str]]) -> str:
    """One value, or each value with the variants that have it."""
    if len(variants) == 1:
        return next(iter(variants))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in variants.items())


def _verdict(item: Attachment) -> list[dict[str, str]]:
    verdict = release_provenance.verdict(item)
    if verdict is None:
        return []
    tone = TONES.get(verdict.state, "danger")
    return [{"variant": item.variant.name, "state": verdict.state, "text": str(verdict), "tone": tone}]


def _shown(item: Attachment) -> dict[str, Any]:
    """Tables of what an attachment says. All of it is its author's text: templates and tables escape it."""
    said = item.summary
    about = [("Name", said.get("name")), ("Version", said.get("version")), ("CycloneDX", said.get("spec"))]
    about += [("Licences", ", ".join(said.get("licences", []))), ("Data sets", ", ".join(said.get("datasets", [])))]
    values = [*about, *said.get("values", {}).items()]
    parts = [
        [part["type"], part["name"], part["version"], ", ".join(part["licences"])]
        for part in said.get("components", [])
    ]
    return {
        "facts": [(name, value) for name, value in values if value],
        "parts": table(["Component", "Name", "Version", "Licences"], parts),
        "more": said.get("components_total", 0) - len(parts),
    }


def proposal(row: Release | PendingRole) -> dict[str, Any] | None:
    """What waits for signatures, whose, and what to run; None where nothing does."""
    if isinstance(row, Release) and row.state != Release.State.PENDING:
        return None
    waits = trust.proposal(row.model.name if isinstance(row, Release) else row.role)
    if waits is None:
        return None
    return {"of": waits, "changes": release_selectors.said_of(waits), "command": trust.sign_command(waits.row.role)}


def variants(row: Release) -> list[dict[str, Any]]:
    return [_variant(variant) for variant in row.variants.all()]


def _variant(variant: Variant) -> dict[str, Any]:
    manifest = _manifest(variant)
    return {
        "of": variant,
        "facts": [*(_facts(manifest) if manifest else []), *_accepted(variant.acceptance)],
        "tensors": table(
            ["", "Name", "Type", "Shape"],
            [
                [side, spec.get("name"), spec.get("dtype"), _shape(spec.get("shape") or [])]
                for side, specs in (("input", variant.inputs), ("output", variant.outputs))
                for spec in specs
            ],
        ),
        "files": table(
            ["Name", "Size", "SHA-256"],
            [
                [
                    format_html("{}{}", f.name, _part(manifest, f.name)),
                    presentation.size(f.length),
                    presentation.short(f.sha256, 20),
                ]
                for f in manifest.fetched
            ]
            if manifest
            else [],
        ),
        "patches": table(["File", "From", "State", "On the wire", "Saved"], [_patch(row) for row in _patches(variant)]),
    }


def _patches(variant: Variant) -> QuerySet[Patch]:
    return variant.patches.select_related("target", "artifact", "base_variant__release__model")


def _patch(row: Patch) -> list[Any]:
    """One way by which a device may get a file with less on the wire."""
    origin = f"{row.base_variant.release.version}/{row.base_variant.name}" if row.base_variant else "nothing"
    if row.artifact is None:
        return [row.file, origin, presentation.state(row.state), row.reason or "-", "-"]
    saved = 1 - row.artifact.length / row.target.length
    return [row.file, origin, presentation.state(row.state), presentation.size(row.artifact.length), f"{saved:.1%}"]


def _manifest(variant: Variant) -> Manifest | None:
    try:
        return Manifest.parse(variant.manifest.encode())
    except ProtocolError:
        return None  # shown without what only the manifest knows


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    floors = manifest.requires
    named = [("Needs SDK", floors.sdk), ("Needs runtime", floors.runtime), ("Needs opset", str(floors.opset or ""))]
    named.append(("Needs memory", presentation.size(floors.memory) if floors.memory else ""))
    named.append(("Needs architecture", " or ".join(floors.arch)))
    named.append(("Needs provider", " or ".join(floors.providers)))
    named.append(("Steps through", floors.release))
    return [(name, value) for name, value in named if value]


def _part(manifest: Manifest, name: str) -> str:
    bundle = manifest.acceptance.name if manifest.acceptance else ""
    return {manifest.entry: " (entry)", bundle: " (acceptance bundle)"}.get(name, "")


def _accepted(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What devices ask the variant before it serves, and what this server's processor answered."""
    if not found:
        return []
    held = f"{found['asked']} of {found['samples']} asked here"
    own = [f"{name}: {_tolerance(each)}" for name, each in found["tolerances"].items()]
    budget, memory = found["latency_ms"], found["memory"]
    facts = [
        ("Acceptance samples", f"{held}, the last did not hold" if found["problem"] else f"{held}, and held"),
        ("Tolerance", ", ".join([_tolerance(found), *own])),
        ("Latency budget", f"{budget:g} ms a call; {found['here_ms']:g} ms here" if budget else ""),
        ("Memory budget", presentation.size(memory) if memory else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _tolerance(found: dict[str, Any]) -> str:
    return f"{found['atol']:g} + {found['rtol']:g} of the value"


def _shape(sizes: list[Any]) -> str:
    return (
        " × ".join(  # noqa: RUF001  # as people write it
            "?" if size is None else str(size) for size in sizes
        )
        or "scalar"
    )


# --- enrolment ----------------------------------------------------------------------------------------------------
def provisioning(token: EnrolmentToken, secret: str) -> dict[str, str]:
    """The device's `provision.json` for a download; or the problem that stands in the way."""
    try:
        content = provision(secret=secret, models=token.model_names)
    except FleetError as error:
        return {"problem": f"{error.message[:1].upper()}{error.message[1:]}."}
    return {"base64": b64encode(content).decode()}
