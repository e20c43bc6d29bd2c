"""A fleet in the database, for tests of devices, rollouts and what operators do. No keys: trust is `registry`'s."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from hashlib import sha256
from itertools import count
from typing import Any

from django.contrib.auth.models import Group as UserGroup
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from device_sdk.protocol import polls
from device_sdk.protocol.events import Event
from device_sdk.protocol.names import ReleasePath
from device_sdk.protocol.polls import Tag, running_digest
from device_sdk.protocol.posts import EventPost
from fleet.accounts.services import OPERATORS, VIEWERS, create_token
from fleet.devices import credentials, selection
from fleet.devices.models import Device, EnrolmentToken, Group, RunningSet
from fleet.devices.services import create_token as create_enrolment_token
from fleet.notices import services as notices
from fleet.notices.models import Delivery, Subscription
from fleet.releases.models import Model, Release, Variant
from fleet.rollouts import services as rollouts
from fleet.rollouts.models import Rollout
from fleet.rollouts.services import StagePlan

MODEL = "digits"
AT_ONCE = (StagePlan(percent=100),)
_numbers = count(1)


def release(
    version: str = "1.0.0", *, model: str = MODEL, variants: Sequence[str] = ("default",), **more: Any
) -> Release:
    line, _ = Model.objects.get_or_create(name=model)
    made = Release.objects.create(model=line, version=version, **{"state": Release.State.VALID, **more})
    for name in variants:
        text = json.dumps({"model": model, "version": version, "variant": name})
        Variant.objects.create(
            release=made,
            name=name,
            manifest=text,
            manifest_sha256=sha256(text.encode()).hexdigest(),
            manifest_length=len(text),
            state=Variant.State.VALID,
        )
    return made


def running_set(runs: Mapping[str, str]) -> RunningSet:
    return RunningSet.objects.get_or_create(digest=running_digest(runs), defaults={"runs": dict(runs)})[0]


def device(name: str = "cam-1", *, runs: Mapping[str, str] | None = None, **more: Any) -> Device:
    fields = {"model_names": [MODEL], "nonce_digest": "0" * 64, "last_seen": timezone.now()}
    return Device.objects.create(name=name, runs=running_set(runs) if runs is not None else None, **{**fields, **more})


def devices(number: int, **more: Any) -> list[Device]:
    return [device(f"cam-{index}", **more) for index in range(number)]


def group(name: str = "berlin", **selector: list[str]) -> Group:
    return Group.objects.create(name=name, selector=str(selection.chosen(selector or {"site": ["berlin"]})))


def enrolment_token(**more: Any) -> tuple[EnrolmentToken, str]:
    fields = {"name": "batch", "model_names": [MODEL], "max_uses": 2, "lifetime": timedelta(days=1)}
    return create_enrolment_token(**{**fields, **more})


def event(kind: str, target: Release | None = None, *, rollout: Rollout | str = "", **more: Any) -> Event:
    """An event as a device makes it, with an id of its own."""
    path = ReleasePath(target.model.name, target.version, "default") if target else None
    return replace(
        Event(
            id=f"{next(_numbers):032x}",
            at=timezone.now().timestamp(),
            kind=kind,
            model=target.model.name if target else MODEL,
            release=path,
            rollout=rollout if isinstance(rollout, str) else str(rollout.pk),
        ),
        **more,
    )


def post(*events: Event, runs: Mapping[str, str] | None = None, dropped: int = 0, sdk: str = "0.1.0") -> EventPost:
    return EventPost(events=events, runs=runs or {}, sdk=sdk, dropped=dropped)


def running(target: Release, *, stages: Sequence[StagePlan] = AT_ONCE, **more: Any) -> Rollout:
    """A rollout that was started."""
    drafted = rollouts.create(release=target, stages=stages, actor="ann", **{"group": None, **more})
    return rollouts.start(rollout=drafted, actor="ann")


def completed(target: Release, **more: Any) -> Rollout:
    """The standing answer, as it is after all committed."""
    started = running(target, **more)
    Rollout.objects.filter(pk=started.pk).update(state=Rollout.State.COMPLETED)
    rollouts.snapshots.bump()
    started.refresh_from_db()
    return started


def subscription(name: str = "ops", url: str = "https://hooks.example.org/fleet", *events: str) -> Subscription:
    return notices.subscribe(name=name, kind="webhook", target=url, events=events, actor="ann")[0]


def delivery() -> Delivery:
    """One that was given up."""
    notices.send_test(subscription=subscription())
    Delivery.objects.update(state=Delivery.State.DEAD, error="answered 500")
    return Delivery.objects.get()


def user(name: str, *, groups: Sequence[str] = ()) -> User:
    made = User.objects.create_user(name, password="correct horse battery")
    made.groups.set(UserGroup.objects.filter(name__in=groups))
    return made


def viewer() -> User:
    return user("vera", groups=[VIEWERS])


def operator() -> User:
    return user("otto", groups=[OPERATORS])


def outsider() -> User:
    return user("oscar")


def staff() -> User:
    """May log in to the admin, and see nothing there."""
    made = user("stan")
    made.is_staff = True
    made.save()
    return made


def superuser() -> User:
    return User.objects.create_superuser("sue", password="correct horse battery")


def api_token(owner: User, *scopes: str) -> str:
    return create_token(name="script", scopes=scopes, lifetime=timedelta(days=1), user=owner)[1]


def refusal(answer: Any) -> tuple[int, str]:
    """Status and code, which is what callers act upon."""
    body = answer.json()
    assert body.keys() == {"code", "message", "detail"}
    return answer.status_code, body["code"]


@dataclass
class Caller:
    """A device, as far as HTTP goes."""

    client: Client
    device: Device
    runs: Mapping[str, str] = field(default_factory=dict)
    view: int = 0

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {credentials.credential_for(self.device)}"}

    def poll(self, *, tag: str | None = None, query: str = "") -> Any:
        headers = {**self.headers(), "If-None-Match": tag or str(Tag(self.view, running_digest(self.runs)))}
        answer = self.client.get(f"{polls.POLL}{query}", headers=headers)
        if answer.status_code == 200:
            self.view = Tag.parse(answer["ETag"]).view
        return answer

    def post(self, *events: Event, body: bytes | None = None, **more: Any) -> Any:
        content = body if body is not None else json.dumps(post(*events, runs=self.runs, **more).to_json()).encode()
        return self.client.post(polls.EVENTS, content, content_type="application/json", headers=self.headers())
