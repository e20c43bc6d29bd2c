"""One fixture world for what people look at: three models, forty devices, two weeks of history. The same every time.

Rows are written as they would stand after two weeks; what a rollout admits comes from the real policy.
"""

import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from django.contrib.auth.models import Group as PermissionGroup
from django.contrib.auth.models import User
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import TargetFile, Targets

from device_sdk.protocol.cohorts import cohort
from device_sdk.protocol.manifest import FileEntry, Manifest, Requirements, TensorSpec
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.polls import running_digest
from fleet.accounts.services import OPERATORS, VIEWERS
from fleet.devices.models import Device, DeviceEvent, EnrolmentToken, Group, ModelStatus, RunningSet, SpreadSample
from fleet.feedback.models import Batch, Campaign, DatasetPart
from fleet.releases.models import Artifact, Model, Release, Variant
from fleet.rollouts.models import Outcome, Rollout, RolloutAction, Stage
from fleet.trust import keystore, repository
from fleet.trust import services as trust
from fleet.trust.models import RoleMetadata

PASSWORD = "correct horse battery"
SITES, HARDWARE = ("graz", "linz", "vienna"), ("jetson", "pi5", "x86")
SPECS = {
    "detector": (
        (("image", "float32", ("batch", 3, 320, 320)),),
        (("boxes", "float32", ("batch", 100, 4)), ("scores", "float32", ("batch", 100))),
    ),
    "keyword": ((("samples", "float32", ("batch", 16000)),), (("probabilities", "float32", ("batch", 12)),)),
    "vibration": ((("window", "float32", ("batch", 3, 2048)),), (("anomaly", "float32", ("batch",)),)),
}


@dataclass
class World:
    now: datetime
    running: Rollout
    halted: Rollout
    devices: list[Device]

    def busy_device(self) -> Device:
        """One that went all the way to the new release."""
        return Outcome.objects.filter(rollout=self.running, state="committed").select_related("device")[0].device


def people() -> None:
    User.objects.create_superuser("admin", "admin@example.org", PASSWORD)
    for name, group in (("olga", OPERATORS), ("victor", VIEWERS)):
        user = User.objects.create_user(name, f"{name}@example.org", PASSWORD, is_staff=True)
        user.groups.add(PermissionGroup.objects.get(name=group))
    User.objects.create_user("otto", "otto@example.org", PASSWORD, is_staff=True)  # staff without any permission
    User.objects.create_user("outsider", "outsider@example.org", PASSWORD)


def build(now: datetime) -> World:
    dice = random.Random(7)
    people()
    _roles(now)
    releases = _releases(now)
    Group.objects.create(name="canary", description="Devices on our own desks", selector="site=graz")
    everyone = Group.objects.create(name="cameras", description="All cameras", selector="kind=camera")
    devices = _devices(now, dice)
    _rollout(
        releases["detector", "1.3.1"], everyone, (10, 50, 100), Rollout.State.COMPLETED, now - timedelta(hours=130)
    )
    _rollout(releases["keyword", "2.0.0"], None, (100,), Rollout.State.COMPLETED, now - timedelta(hours=150))
    _rollout(releases["vibration", "0.9.2"], None, (20, 100), Rollout.State.COMPLETED, now - timedelta(days=6))
    running = _rollout(
        releases["detector", "1.4.0"],
        everyone,
        (10, 40, 75, 100),
        Rollout.State.RUNNING,
        now - timedelta(hours=5),
        at=2,
    )
    halted = _rollout(releases["keyword", "2.1.0"], None, (20, 100), Rollout.State.HALTED, now - timedelta(hours=30))
    _fare(now, dice, devices, running, halted)
    _date_outcomes(now)
    _history(now)
    _feedback(now, dice, devices)
    return World(now, running, halted, devices)


CI = {model: CryptoSigner.generate_ed25519() for model in SPECS}
SECOND = CryptoSigner.generate_ed25519()  # co-signs `keyword`


def _roles(now: datetime) -> None:
    """Really signed: root 1, a targets version for each model, and one role of each."""
    with TemporaryDirectory() as folder:
        store = keystore.at(Path(folder) / "keys")
        keystore.initialise(store)
        for model, signer in CI.items():
            two = [SECOND.public_key] if model == "keyword" else []
            keystore.add_model(store, model=model, public_keys=[signer.public_key, *two], threshold=1 + len(two))
    RoleMetadata.objects.update(created_at=now - timedelta(days=40), expires_at=now + timedelta(days=325))
    for model, version, made in (("detector", 7, 3), ("keyword", 4, 12), ("vibration", 3, 164)):
        role = Targets(version, expires=(now + timedelta(days=180 - made)).replace(microsecond=0))
        content = repository.sign(role, [CI[model], SECOND] if model == "keyword" else [CI[model]])
        row = trust.store_role(model, version, content, role.expires)
        RoleMetadata.objects.filter(pk=row.pk).update(created_at=now - timedelta(days=made))


def propose(now: datetime) -> Release:
    """CI of `keyword` has pushed a release; the second person has not signed it yet."""
    model = Model.objects.get(name="keyword")
    release = Release.objects.create(
        model=model, version="2.2.0", state="pending", published_by="ci-keyword (token:ci)"
    )
    _variant(release, "default", "valid", "", now)
    variant = release.variants.get()
    role = Targets(5, expires=(now + timedelta(days=180)).replace(microsecond=0))
    role.targets[variant.path] = TargetFile(variant.manifest_length, {"sha256": variant.manifest_sha256}, variant.path)
    change = trust.receive_role("keyword", repository.sign(role, [CI["keyword"]]), by="ci-keyword (token:ci)")
    assert change.is_pending
    return release


def _releases(now: datetime) -> dict[tuple[str, str], Release]:
    made = {}
    Model.objects.create(name="detector", description="Finds people and vehicles in camera frames")
    Model.objects.create(name="keyword", description="Listens for twelve words")
    Model.objects.create(name="vibration", description="Tells a worn bearing from a sound one")
    for model, version, days, state in (
        ("detector", "1.2.0", 40, "valid"), ("detector", "1.3.0", 21, "valid"), ("detector", "1.3.1", 10, "valid"),
        ("detector", "1.4.0", 1, "valid"), ("detector", "1.5.0-rc1", 0, "invalid"), ("keyword", "1.9.0", 50, "valid"),
        ("keyword", "2.0.0", 13, "valid"), ("keyword", "2.1.0", 2, "valid"), ("vibration", "0.9.1", 30, "valid"),
        ("vibration", "0.9.2", 7, "valid"),
    ):  # fmt: skip
        wrong = "the graph has no output named 'scores', which the manifest promises" if state == "invalid" else ""
        release = Release.objects.create(
            model=Model.objects.get(name=model), version=version, state=state, reason=wrong,
            signed_by=[sha256(f"{model}0".encode()).hexdigest()], published_by="token:ci-main",
        )  # fmt: skip
        Release.objects.filter(pk=release.pk).update(created_at=now - timedelta(days=days, hours=3))
        for variant in ("default", "int8") if model == "detector" else ("default",):
            _variant(release, variant, state, wrong, now - timedelta(days=days, hours=2))
        made[model, version] = release
    return made


def _variant(release: Release, name: str, state: str, reason: str, at: datetime) -> None:
    model, scale = release.model.name, 1 if name == "default" else 4
    weights = {"detector": 23_400_000, "keyword": 1_900_000, "vibration": 640_000}[model] // scale
    files = [
        FileEntry(file, size, sha256(f"{release}{name}{file}".encode()).hexdigest())
        for file, size in (("model.onnx", 184_320), ("model.onnx.data", weights))
    ]
    inputs, outputs = (tuple(TensorSpec(*spec) for spec in side) for side in SPECS[model])
    manifest = Manifest(
        ReleasePath(model, release.version, name), tuple(files), "model.onnx", inputs, outputs,
        Requirements(sdk="0.1.0", opset=17), {"commit": "9f1c2ab", "trained_on": "2026-10"},
    )  # fmt: skip
    text = manifest.to_bytes().decode()
    variant = Variant.objects.create(
        release=release, name=name, manifest=text, manifest_sha256=sha256(text.encode()).hexdigest(),
        manifest_length=len(text), state=state, reason=reason, inputs=[spec.to_json() for spec in inputs],
        outputs=[spec.to_json() for spec in outputs], opset=17, size=manifest.length, validated_at=at,
    )  # fmt: skip
    for file in files:
        variant.artifacts.add(Artifact.objects.get_or_create(sha256=file.sha256, defaults={"length": file.length})[0])


def _devices(now: datetime, dice: random.Random) -> list[Device]:
    token = EnrolmentToken.objects.create(
        name="factory lot 7", digest=sha256(b"lot").hexdigest(), model_names=["detector", "keyword"], max_uses=60,
        uses=38, expires_at=now + timedelta(days=12), labels={"kind": "camera"},
    )  # fmt: skip
    devices = []
    for number in range(40):
        listens = number % 10 == 9
        name = f"{'press' if listens else 'camera'}-{number + 1:03}"
        state = (
            Device.State.PENDING
            if number in (17, 18)
            else Device.State.REVOKED
            if number == 25
            else Device.State.ACTIVE
        )
        silent = {3: timedelta(days=3), 12: timedelta(days=11), 21: timedelta(hours=5), 30: timedelta(hours=20)}
        device = Device.objects.create(
            name=name, state=state, token=token, sdk="0.1.0" if dice.random() < 0.8 else "0.0.9",
            labels={"kind": name[:-4], "site": SITES[number % 3], "hardware": HARDWARE[number % 3]},
            model_names=["vibration"] if listens else ["detector", "keyword"],
            nonce_digest=sha256(name.encode()).hexdigest(),
            last_seen=now - silent.get(number, timedelta(seconds=dice.randrange(5, 280))),
        )  # fmt: skip
        Device.objects.filter(pk=device.pk).update(enrolled_at=now - timedelta(days=20, minutes=number))
        devices.append(device)
    return devices


def _rollout(
    release: Release, group: Group | None, percents: tuple[float, ...], state: str, started: datetime, at: int = 0
) -> Rollout:
    author = User.objects.get(username="olga")
    done = state == Rollout.State.COMPLETED
    rollout = Rollout.objects.create(
        release=release, group=group, state=state, salt=sha256(str(release).encode()).hexdigest()[:32],
        stage_index=len(percents) - 1 if done else at, stage_since=started + timedelta(hours=2), started_at=started,
        created_by=author, on_failure=Rollout.OnFailure.ROLL_BACK, window={"start": 60, "end": 300} if done else None,
        finished_at=None if state == Rollout.State.RUNNING else started + timedelta(hours=9),
        reason={
            Rollout.State.HALTED: "failure budget spent: 3 failures, 1 allowed",
            Rollout.State.RUNNING: "waiting for reports: 11 of 15",
        }.get(state, ""),
    )  # fmt: skip
    for index, percent in enumerate(percents):
        Stage.objects.create(
            rollout=rollout, index=index, percent=percent, soak_seconds=3600, min_reports=3, failure_budget=1,
            entered_at=started + timedelta(hours=index) if done or index <= at else None,
            passed_at=started + timedelta(hours=index + 1) if done or index < at else None,
        )  # fmt: skip
    _actions(rollout, started)
    return rollout


def _actions(rollout: Rollout, started: datetime) -> None:
    told = [("create", "olga", "", -1), ("start", "olga", "Evaluated on the October set: +2.1 mAP.", 0)]
    told += [("advance", "guard", f"stage {n + 1} passed", n + 1) for n in range(rollout.stage_index)]
    if rollout.state == Rollout.State.HALTED:
        told.append(("halt", "guard", rollout.reason, 9))
    if rollout.state == Rollout.State.COMPLETED:
        told.append(("complete", "guard", f"stage {rollout.stage_index + 1} passed", 9))
    for action, actor, comment, hours in told:
        row = RolloutAction.objects.create(rollout=rollout, action=action, actor=actor, comment=comment)
        RolloutAction.objects.filter(pk=row.pk).update(at=started + timedelta(hours=hours))


FAILURES = (
    "probation: error rate 0.12 over 0.00 in 40 calls",
    "probation: invalid outputs 0.05 over 0.00 in 40 calls",
    "testing: the model needs 212 MB, 180 MB are free",
)


def _fare(now: datetime, dice: random.Random, devices: list[Device], running: Rollout, halted: Rollout) -> None:
    failures = 0
    for number, device in enumerate(devices):
        if device.state != Device.State.ACTIVE:
            continue
        if device.model_names == ["vibration"]:
            _runs(device, {"vibration": "0.9.1/default" if number == 39 else "0.9.2/default"})
            if number == 39:
                _say(now, device, "vibration", "vibration/0.9.2/default", "downloading", 3)
            else:
                _say(now, device, "vibration", "vibration/0.9.2/default", "committed", 5 * 24 * 60)
            continue
        runs = {"detector": "1.3.1/default", "keyword": "2.0.0/default"}
        if number in (31, 14):
            runs["detector"] = "1.2.0/int8"
        if cohort(halted.salt, device.name) < 2000 and failures < 3:
            Outcome.objects.create(
                rollout=halted, device=device, state="failed", step="rolled_back", reason=FAILURES[failures]
            )
            _say(now, device, "keyword", "keyword/2.1.0/default", "rolled_back", 26 * 60 + failures, FAILURES[failures])
            failures += 1
        if cohort(running.salt, device.name) < 7500 and number not in (31, 14):
            _update(now, dice, device, runs, running)
        if number == 0:
            device.pins = {"detector": "1.3.1"}
            device.save()
        _runs(device, runs)


def _update(now: datetime, dice: random.Random, device: Device, runs: dict[str, str], rollout: Rollout) -> None:
    path, at = "detector/1.4.0/default", dice.randrange(15, 200)
    roll = dice.random()
    if device.last_seen < now - timedelta(hours=1):
        return
    if roll < 0.55:
        runs["detector"] = "1.4.0/default"
        for step, minutes in (
            ("downloading", 9),
            ("verifying", 6),
            ("testing", 5),
            ("activating", 4),
            ("probation", 3),
            ("committed", 0),
        ):
            _say(now, device, "detector", path, step, at + minutes, rollout=rollout)
        Outcome.objects.create(rollout=rollout, device=device, state="committed", step="committed")
    elif roll < 0.62:
        _say(now, device, "detector", path, "failed", at, FAILURES[2], rollout=rollout)
        Outcome.objects.create(rollout=rollout, device=device, state="failed", step="failed", reason=FAILURES[2])
    elif roll < 0.85:
        _say(now, device, "detector", path, "waiting", at, "window: opens at 01:00", rollout=rollout)
        Outcome.objects.create(
            rollout=rollout, device=device, state="updating", step="waiting", reason="window: opens at 01:00"
        )
    else:
        _say(now, device, "detector", path, "downloading", 2, rollout=rollout)
        Outcome.objects.create(rollout=rollout, device=device, state="updating", step="downloading")


def _date_outcomes(now: datetime) -> None:
    """An outcome changed when its device last spoke."""
    for outcome in Outcome.objects.select_related("device", "rollout__release__model"):
        said = DeviceEvent.objects.filter(device=outcome.device, model=outcome.rollout.release.model.name).first()
        if said:
            Outcome.objects.filter(pk=outcome.pk).update(changed_at=said.at, first_at=said.at)


def _runs(device: Device, runs: dict[str, str]) -> None:
    device.runs = RunningSet.objects.get_or_create(digest=running_digest(runs), defaults={"runs": runs})[0]
    device.save()


def _say(
    now: datetime,
    device: Device,
    model: str,
    release: str,
    kind: str,
    minutes: int,
    reason: str = "",
    rollout: Rollout | None = None,
) -> None:
    at = now - timedelta(minutes=minutes)
    identifier = sha256(f"{device.name}{release}{kind}".encode()).hexdigest()[:32]
    event = DeviceEvent.objects.create(
        device=device, event_id=identifier, kind=kind, model=model, release=release, reason=reason, at=at,
        rollout=str(rollout.pk) if rollout else "",
    )  # fmt: skip
    DeviceEvent.objects.filter(pk=event.pk).update(received_at=at)
    health = {"calls": 41_208, "errors": 0} if kind == "committed" else {}
    ModelStatus.objects.update_or_create(
        device=device, model=model,
        defaults={"state": kind, "release": release, "reason": reason, "since": at, "health": health},
    )  # fmt: skip


def _history(now: datetime) -> None:
    """Adoption curves by the hour: each release takes over from the one before it, in steps."""
    rows = []
    plans = {
        "detector": (34, [("1.2.0", 400, 0), ("1.3.0", 330, 40), ("1.3.1", 130, 60), ("1.4.0", 5, 4)], 2),
        "keyword": (34, [("1.9.0", 500, 0), ("2.0.0", 150, 44), ("2.1.0", 30, 8)], 0),
        "vibration": (4, [("0.9.1", 500, 0), ("0.9.2", 140, 30)], 1),
    }
    for model, (total, waves, left) in plans.items():
        for hours in range(14 * 24, -1, -1):
            rows += _moment(model, total, waves, left, hours, now)
    SpreadSample.objects.bulk_create(rows)


def _moment(
    model: str, total: int, waves: list[tuple[str, int, int]], left: int, hours: int, now: datetime
) -> list[SpreadSample]:
    counts: dict[str, int] = {}
    for version, start, length in waves:
        share = 0.0 if hours > start else min(1.0, (start - hours + 1) / max(length, 1))
        share = round(share * 4) / 4 if length > 20 else share
        if version == "2.1.0":
            share = 0.09 if 21 < hours <= 30 else 0.0
        if version == "1.4.0":
            share *= 0.42
        taken = round(share * (total - left if counts else total))
        counts = {older: number - round(number * share) for older, number in counts.items()}
        counts[version] = taken
    spare = total - sum(counts.values())
    oldest = next(iter(counts))
    counts[oldest] = max(0, counts[oldest] + spare)
    at = now - timedelta(hours=hours)
    return [SpreadSample(at=at, model=model, version=v, devices=n) for v, n in counts.items() if n]


def _feedback(now: datetime, dice: random.Random, devices: list[Device]) -> None:
    model = Model.objects.get(name="detector")
    campaign = Campaign.objects.create(name="low-light", model=model, rate=0.02, expires_at=now + timedelta(days=20))
    Campaign.objects.create(
        name="accents", model=Model.objects.get(name="keyword"), rate=0.005, expires_at=now - timedelta(days=2)
    )
    for number in range(14):
        device = devices[number]
        digest = sha256(f"batch{number}".encode()).hexdigest()
        batch = Batch.objects.create(
            batch_id=digest[:32], device=device, model=model, campaign=campaign, sha256=digest,
            length=dice.randrange(400_000, 9_000_000), samples=dice.randrange(20, 400), dropped=12 * (number == 2),
            state=("received", "ingested", "ingested", "rejected")[0 if number == 0 else 3 if number == 5 else 1],
            reason="batch.json: sample 3 names a release of another model" if number == 5 else "",
        )  # fmt: skip
        at = now - timedelta(hours=number * 1.7, minutes=4)
        Batch.objects.filter(pk=batch.pk).update(announced_at=at, received_at=at, ingested_at=at)
    for day in range(1, 9):
        DatasetPart.objects.create(
            model=model, version="1.3.1", day=(now - timedelta(days=day)).date(), rows=dice.randrange(800, 2400),
            length=dice.randrange(9_000_000, 40_000_000), path=f"datasets/detector/1.3.1/{day}.parquet",
        )  # fmt: skip
