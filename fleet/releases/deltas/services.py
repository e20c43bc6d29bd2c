"""Which patches there should be, and making them. A row is the order; the sweep finds those that nobody works on."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import structlog
from django.conf import settings
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from device_sdk.protocol import fields
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.manifest import FileEntry, Manifest
from device_sdk.protocol.patches.frames import NOTHING
from fleet.devices import selectors as devices
from fleet.releases import storage, validation
from fleet.releases.deltas import maker
from fleet.releases.models import Artifact, Patch, Release, Variant

SMALLEST = 64 * 1024  # bytes of a file below which a patch saves nothing that matters
RUNNING, PREVIOUS = 6, 2  # bases: what most devices run, and the releases before
WORTH, WORTH_WHOLE = 0.80, 0.95  # of the full size, above which it is sent in full; the second: from nothing
MAX_ATTEMPTS = 3
MAKER = Path(maker.__file__)

logger = structlog.get_logger(__name__)


def order(*, release: Release) -> int:
    """Ask for patches to the files of a valid release, from what devices run and what came before. Repeat at will.

    Returns how many are new.
    """
    if not settings.PATCH_SECONDS or release.state != Release.State.VALID:
        return 0
    made = 0
    for variant in release.variants.filter(state=Variant.State.VALID).select_related("release__model"):
        bases = _bases(variant)
        for file in _manifest_files(variant):
            if file.length >= SMALLEST:
                made += sum(_order_one(variant, file, *base) for base in [(None, None), *_files(bases, file)])
    return made


def wake() -> None:
    """After the commit, so that what was ordered is begun at once. Losing it loses nothing: the sweep finds it."""
    from fleet.releases import tasks

    transaction.on_commit(lambda: [tasks.make_patch.delay(pk) for pk in undone()[:1]], robust=True)


def undone() -> list[int]:
    """Patches that are due: nobody works on them."""
    free = Q(claimed_at=None) | Q(claimed_at__lt=timezone.now() - _lease())
    return list(Patch.objects.filter(free, state=Patch.State.PENDING).values_list("pk", flat=True))


def make(patch_pk: int) -> bool:
    """Make one patch in a process of its own, and note what came of it. False: one is being made, or try later."""
    patch = Patch.objects.filter(pk=patch_pk).select_related("variant", "base_variant", "target").first()
    if patch is None or not settings.PATCH_SECONDS or _is_busy() or not _claim(patch):
        return False
    if patch.attempts >= MAX_ATTEMPTS:
        return _note(patch, _Result(reason=f"the server did not live through making it, {patch.attempts} times"))
    try:
        result = _make(patch)
    except (validation.StorageAwayError, OSError) as error:  # ours: tried again
        logger.warning("patch_put_off", patch=patch.pk, error=str(error))
        rows = Patch.objects.filter(pk=patch.pk, state=Patch.State.PENDING)
        rows.update(claimed_at=None, attempts=F("attempts") - 1)
        return False
    return _note(patch, result)


@dataclass(frozen=True, slots=True)
class _Result:
    artifact: Artifact | None = None
    useless: bool = False
    reason: str = ""
    encode: float | None = None
    decode: float | None = None


def _bases(variant: Variant) -> list[Variant]:
    """Releases that a device may come from: those that most devices run, and the two before this one."""
    model = variant.release.model
    others = Variant.objects.filter(release__model=model, state=Variant.State.VALID).exclude(release=variant.release)
    by_name = {f"{each.release.version}/{each.name}": each for each in others.select_related("release")}
    running = [by_name[name] for name, _ in devices.running(model.name).most_common() if name in by_name][:RUNNING]
    before = others.filter(name=variant.name, release__pk__lt=variant.release.pk).order_by("-release__pk")
    return list({each.pk: each for each in [*running, *before[:PREVIOUS]]}.values())


def _files(bases: list[Variant], file: FileEntry) -> Iterator[tuple[Variant, FileEntry]]:
    """In each base the file of the same name, else its largest: exporters move weights in and out of the model."""
    for base in bases:
        files = _manifest_files(base)
        same = next((each for each in files if each.name == file.name), None)
        chosen = same or max(files, key=lambda each: each.length, default=None)
        if chosen and chosen.sha256 != file.sha256 and chosen.length:
            yield base, chosen


def _manifest_files(variant: Variant) -> tuple[FileEntry, ...]:
    """None where the row cannot be read: patches are an extra, and hold up nothing."""
    try:
        return Manifest.parse(variant.manifest.encode()).files
    except ProtocolError as error:
        logger.error("manifest_malformed", variant=variant.pk, error=error.message)  # noqa: TRY400
        return ()


def _order_one(variant: Variant, file: FileEntry, base: Variant | None, base_file: FileEntry | None) -> bool:
    return Patch.objects.get_or_create(
        target_id=file.sha256,
        base_sha256=base_file.sha256 if base_file else NOTHING,
        defaults={
            "variant": variant,
            "file": file.name,
            "base_variant": base,
            "base_file": base_file.name if base_file else "",
        },
    )[1]


def _make(patch: Patch) -> _Result:
    settings.INCOMING.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=validation.PATCH_PREFIX, dir=settings.INCOMING) as name:
        folder = Path(name)
        for side, variant in (("base", patch.base_variant), ("target", patch.variant)):
            (folder / side).mkdir()
            for file in _manifest_files(variant) if variant else ():
                validation.lay_out(file, folder / side)
        most = int(patch.target.length * (WORTH if patch.base_variant_id else WORTH_WHOLE))
        wanted = maker.Order(patch.base_file, patch.base_sha256, patch.file, patch.target_id, most)
        command = [str(MAKER), name, json.dumps(asdict(wanted)), str(settings.VALIDATION_MEMORY)]
        seconds = settings.PATCH_SECONDS
        return _read(validation.run_script([*command, str(seconds)], folder=folder, seconds=seconds), folder / "patch")


def _read(done: tuple[int, bytes] | None, path: Path) -> _Result:
    if done is None:
        return _Result(reason=f"it was not made within {settings.PATCH_SECONDS} s")
    code, output = done
    try:
        answer = fields.parse_object(output, limit=64 * 1024, what="maker")
    except ValueError:
        return _Result(reason=f"the maker ended with code {code} and said nothing")
    if "useless" in answer:
        return _Result(useless=True)
    if "error" in answer:
        return _Result(reason=str(answer["error"]))
    return _Result(_keep(path), encode=float(answer["encode"]), decode=float(answer["decode"]))


def _keep(path: Path) -> Artifact:
    """Into the object store, by the hash that we take ourselves."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    length = path.stat().st_size
    storage.put_file(storage.blob_name(sha256), path)
    return Artifact.objects.get_or_create(sha256=sha256, defaults={"length": length})[0]


def _lease() -> timedelta:
    return timedelta(seconds=settings.PATCH_SECONDS + 600)


def _is_busy() -> bool:
    """One at a time, or nearly: they are long, and the same workers validate releases and watch over rollouts."""
    return Patch.objects.filter(state=Patch.State.PENDING, claimed_at__gte=timezone.now() - _lease()).exists()


def _claim(patch: Patch) -> bool:
    """Compare-and-set: one worker, unless it has died."""
    now = timezone.now()
    free = Q(claimed_at=None) | Q(claimed_at__lt=now - _lease())
    rows = Patch.objects.filter(free, pk=patch.pk, state=Patch.State.PENDING)
    return bool(rows.update(claimed_at=now, attempts=F("attempts") + 1))


def _note(patch: Patch, result: _Result) -> bool:
    done = Patch.State.READY if result.artifact else Patch.State.USELESS if result.useless else Patch.State.FAILED
    return bool(
        Patch.objects.filter(pk=patch.pk, state=Patch.State.PENDING).update(
            state=done,
            reason=fields.plain(result.reason)[:500],
            artifact=result.artifact,
            encode_seconds=result.encode,
            decode_seconds=result.decode,
            claimed_at=None,
        )
    )
