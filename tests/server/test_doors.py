"""Every address of the server, and who gets in. An address without a row fails, and so does a method without one.

`test_permissions.py` looks closer at what people and tokens may do over REST; this one forgets no door.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from typing import Any

import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from securesystemslib.signer import CryptoSigner

from device_sdk.protocol.manifest import digest
from fleet.accounts.services import create_token
from fleet.devices import credentials
from fleet.devices.models import Device
from fleet.feedback.models import Batch
from fleet.releases import storage
from fleet.releases.models import Artifact, Model
from fleet.trust import keystore, repository
from fleet.trust import services as trust
from fleet.trust.models import RoleMetadata
from tests.fleet_world import (
    api_token,
    delivery,
    device,
    enrolment_token,
    group,
    operator,
    outsider,
    release,
    running,
    staff,
    superuser,
    viewer,
)  # fmt: skip
from tests.registry import Registry, publish_token
from tests.server.test_permissions import campaign

Callers = frozenset[str]
Door = Mapping[str, Callers]  # method to who gets in; methods that are not there let nobody in, HEAD is as GET

PEOPLE = frozenset({"viewer", "operator", "superuser"})
READERS = PEOPLE | {"token read", "token operate", "viewer's token operate"}
OPERATORS = frozenset({"operator", "superuser", "token operate"})
OWNERS = frozenset({"superuser"})
CI = frozenset({"token publish"})
ANY_CI = CI | {"token publish wine"}
SIGNERS = CI | {"token sign"}
DEVICE = frozenset({"device"})
DEVICES = DEVICE | {"another device"}
KNOWN = READERS | ANY_CI | SIGNERS | {"token mirror", "token mirror wine", "outsider", "staff"}
OUT = {401, 403, 404, 405}
READ: Door = {"GET": READERS}
DO: Door = {"POST": OPERATORS}

ALL = KNOWN | DEVICES | {"nobody", "pending device", "revoked device", "enrolment token"}
DOORS: dict[str, Door] = {
    "": dict.fromkeys(("GET", "POST", "PUT", "PATCH", "DELETE"), ALL),  # leads to the admin, which asks who it is
    "favicon.ico": dict.fromkeys(("GET", "POST", "PUT", "PATCH", "DELETE"), ALL),  # leads to a static file
    "metrics": {"GET": PEOPLE},
    "api/device/v1/enrol": {"POST": frozenset({"enrolment token"})},
    "api/device/v1/poll": {"GET": DEVICES, "HEAD": frozenset()},
    "api/device/v1/events": {"POST": DEVICES},
    "api/device/v1/batches": {"POST": DEVICES},
    "api/device/v1/batches/<batch_id>/content": {"PUT": DEVICE},
    "api/device/v1/batches/<batch_id>/complete": {"POST": DEVICE},
    "api/device/v1/blobs/<sha256>": {"GET": DEVICE},
    "api/device/v1/blobs/<sha256>/patches": {"GET": DEVICE},
    "api/mirror/v1/blobs/<sha256>": {"GET": frozenset({"token mirror"})},
    "api/ci/v1/models/<model>/role": {"GET": SIGNERS, "POST": CI},
    "api/ci/v1/models/<model>/role/pending": {"GET": SIGNERS, "POST": SIGNERS},
    "api/ci/v1/blobs/<sha256>": {"HEAD": ANY_CI, "PUT": ANY_CI},
    "api/ci/v1/models/<model>/releases": {"POST": CI},
    "api/ci/v1/models/<model>/releases/<version>": {"GET": CI},
    "api/v1/models/": READ,
    "api/v1/models/<pk>/": READ,
    "api/v1/releases/": READ,
    "api/v1/releases/<pk>/": READ,
    "api/v1/releases/<pk>/still_running/": READ,
    "api/v1/releases/<pk>/attachments/<sha256>/": READ,
    "api/v1/devices/": READ,
    "api/v1/devices/<pk>/": READ,
    "api/v1/devices/<pk>/approve/": DO,
    "api/v1/devices/<pk>/explain/": READ,
    "api/v1/devices/<pk>/labels/": DO,
    "api/v1/devices/<pk>/pin/": DO,
    "api/v1/devices/<pk>/revoke/": DO,
    "api/v1/groups/": {**READ, **DO},
    "api/v1/groups/<pk>/": {**READ, "PUT": OPERATORS, "PATCH": OPERATORS},
    "api/v1/events/": READ,
    "api/v1/events/<pk>/": READ,
    "api/v1/rollouts/": {**READ, **DO},
    "api/v1/rollouts/<pk>/": READ,
    "api/v1/rollouts/<pk>/start/": DO,
    "api/v1/rollouts/<pk>/pause/": DO,
    "api/v1/rollouts/<pk>/resume/": DO,
    "api/v1/rollouts/<pk>/cancel/": DO,
    "api/v1/rollouts/<pk>/roll_back/": DO,
    "api/v1/rollouts/<pk>/approve/": DO,
    "api/v1/rollouts/<pk>/reject/": DO,
    "api/v1/rollouts/<pk>/approve_stage/": DO,
    "api/v1/subscriptions/": {**READ, "POST": OWNERS},  # where it goes to is the owners' word
    "api/v1/subscriptions/<pk>/test/": {"POST": OWNERS},
    "api/v1/deliveries/": READ,
    "api/v1/deliveries/<pk>/": READ,
    "api/v1/deliveries/<pk>/send_again/": DO,
    "api/v1/campaigns/": {**READ, **DO},
    "api/v1/campaigns/<pk>/": {**READ, "PATCH": OPERATORS},
    "api/v1/batches/": READ,
    "api/v1/batches/<pk>/": READ,
    "api/v1/spread/": READ,
    "api/v1/laggards/": READ,
    "api/schema/": {"GET": KNOWN},
    "api/docs/": {"GET": KNOWN},
    # Whoever has the key in the address.
    "tuf/<device>/<key>/metadata/<name>": {"GET": ALL},
    "tuf/<device>/<key>/targets/<model>/<version>/<name>": {"GET": ALL},
    "api/v1/subscriptions/<pk>/": {**READ, "DELETE": OWNERS},  # the last: it takes its deliveries along
}
ENROLMENT = b'{"device": "new", "nonce": "%s", "labels": {}, "sdk": "1"}' % (b"0" * 32)


def addresses(patterns: Any = None, before: str = "") -> Iterator[str]:
    """What the URL configuration has, outside the admin, as `DOORS` writes it."""
    for item in get_resolver().url_patterns if patterns is None else patterns:
        here = before + str(item.pattern).replace("^", "").replace("$", "")
        if isinstance(item, URLResolver) and here != "admin/":
            yield from addresses(item.url_patterns, here)
        elif isinstance(item, URLPattern):
            yield re.sub(r"\(\?P(<\w+>)[^)]*\)|<\w+:(\w+)>", lambda found: found[1] or f"<{found[2]}>", here)


@dataclass
class Building:
    """Something real behind every door, which nothing here changes for the callers."""

    parts: dict[str, Any]
    objects: dict[str, int]

    def address(self, door: str) -> str:
        room = door.split("/")[2] if door.startswith("api/v1/") else ""
        filled = door.replace("<pk>", str(self.objects.get(room, "")))
        return "/" + re.sub(r"<(\w+)>", lambda found: str(self._part(door, found[1])), filled)

    def _part(self, door: str, name: str) -> Any:
        return self.parts.get(f"{door.split('/')[3]}/{name}" if door.startswith("tuf/") else name, self.parts.get(name))


@pytest.fixture
def building(registry: Registry) -> Building:
    trust.accept_role("digits", registry.role([]).encode())
    _propose()
    made, content = release("1.0.0"), b"a model"
    variant = made.variants.get()
    variant.artifacts.add(Artifact.objects.create(sha256=digest(content), length=len(content)))
    variant.attachments.create(kind="ml-bom", name="bom.json", artifact_id=digest(content))
    storage.put(storage.blob_name(digest(content)), BytesIO(content))
    mine, theirs = device("cam-1"), device("till-1")  # `theirs`: operators do things to it
    batch = Batch.objects.create(batch_id="1" * 32, device=mine, model=made.model, sha256="2" * 64, length=1, samples=1)
    told = theirs.events.create(event_id="3" * 32, kind="waiting", at=mine.enrolled_at)
    parts = {
        "batch_id": batch.batch_id, "sha256": digest(content), "model": "digits", "version": "1.0.0",
        "device": mine.name, "key": credentials.view_key(mine), "metadata/name": "timestamp.json",
        "targets/name": f"{variant.manifest_sha256}.{variant.name}",
    }  # fmt: skip
    objects = {
        "models": made.model.pk, "releases": made.pk, "devices": theirs.pk, "groups": group().pk, "events": told.pk,
        "rollouts": running(made).pk, "campaigns": campaign(made.model).pk, "batches": batch.pk,
        "subscriptions": (sent := delivery()).subscription.pk, "deliveries": sent.pk,
    }  # fmt: skip
    return Building(parts, objects)


def _bearer(text: str) -> Client:
    return Client(headers={"Authorization": f"Bearer {text}"})


def _logged_in(person: Any) -> Client:
    client = Client()
    client.force_login(person)
    return client


def _as_device(name: str, **more: Any) -> Client:
    entry = Device.objects.filter(name=name).first() or device(name, **more)
    return _bearer(credentials.credential_for(entry))


def sign_token(*models: str) -> str:
    return create_token(name="erin", scopes=["sign"], models=models, lifetime=timedelta(days=1))[1]


def mirror_token(*models: str) -> str:
    return create_token(name="site", scopes=["mirror"], models=models, lifetime=timedelta(days=1))[1]


def _propose() -> None:
    """The next version of the role, signed by one key of two."""
    first, second = CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()
    public = [first.public_key, second.public_key]
    keystore.add_model(keystore.at(None), model="digits", public_keys=public, threshold=2)
    role = repository.read_targets(RoleMetadata.objects.get(role="digits").content.encode())
    role.version += 1
    assert trust.receive_role("digits", repository.sign(role, [first])).is_pending


def _wine_publisher() -> Client:
    Model.objects.get_or_create(name="wine")
    return _bearer(publish_token("wine"))


CALLERS: dict[str, Callable[[], Client]] = {
    "nobody": Client,
    "outsider": lambda: _logged_in(outsider()),
    "staff": lambda: _logged_in(staff()),
    "superuser": lambda: _logged_in(superuser()),
    "viewer": lambda: _logged_in(viewer()),
    "operator": lambda: _logged_in(operator()),
    "token read": lambda: _bearer(api_token(viewer(), "read")),
    "token operate": lambda: _bearer(api_token(operator(), "operate")),
    "viewer's token operate": lambda: _bearer(api_token(viewer(), "operate")),  # never more than its user
    "token publish": lambda: _bearer(publish_token("digits")),
    "token publish wine": _wine_publisher,
    "token sign": lambda: _bearer(sign_token("digits")),
    "token mirror": lambda: _bearer(mirror_token()),
    "token mirror wine": lambda: _bearer(mirror_token("wine")),
    "device": lambda: _as_device("cam-1"),
    "another device": lambda: _as_device("cam-2", model_names=["wine"]),
    "pending device": lambda: _as_device("cam-3", state=Device.State.PENDING),
    "revoked device": lambda: _as_device("cam-4", state=Device.State.REVOKED),
    "enrolment token": lambda: _bearer(enrolment_token()[1]),
}


def test_every_address_has_a_row() -> None:
    assert set(addresses()) == DOORS.keys()


def test_every_caller_is_tried() -> None:
    assert CALLERS.keys() == ALL


@pytest.mark.parametrize("caller", CALLERS)
def test_who_gets_in_is_what_the_table_says(building: Building, caller: str) -> None:
    client = CALLERS[caller]()
    wrong = []
    for name, door in DOORS.items():
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
            welcome = caller in door.get(method, door.get("GET", frozenset()) if method == "HEAD" else frozenset())
            body = ENROLMENT if name.endswith("enrol") else b"{}"
            answer = client.generic(method, building.address(name), body, "application/json")
            answer.close()
            if (answer.status_code in OUT) == welcome or answer.status_code >= 500:
                wrong.append(f"{method} {name}: {answer.status_code}, though {'' if welcome else 'not '}welcome")
            if answer.status_code in OUT and method != "HEAD" and answer.json().keys() != {"code", "message", "detail"}:
                wrong.append(f"{method} {name}: {answer.status_code} in another shape")
    assert wrong == []


@pytest.mark.parametrize("whose", ["cam-2", "cam-4"])
def test_a_view_opens_by_its_own_key_while_its_device_is_welcome(building: Building, whose: str) -> None:
    """Neither by another device's key, nor a revoked device's by its own."""
    other = device(whose, state=Device.State.REVOKED if whose == "cam-4" else Device.State.ACTIVE)
    device_name = whose if whose == "cam-4" else "cam-1"
    building.parts |= {"device": device_name, "key": credentials.view_key(other)}
    for name in (door for door in DOORS if door.startswith("tuf/")):
        assert Client().get(building.address(name)).status_code == 404
