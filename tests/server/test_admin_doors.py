"""Every page of the admin, and who gets in: a page without a row fails. What a page does is `test_admin.py`'s.

The table is one row a model; pages that all models have follow from it, pages of a model's own are named.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.apps import apps
from django.test import Client
from django.urls import URLResolver, get_resolver

from fleet.devices.models import Device
from fleet.feedback.models import DatasetPart
from fleet.releases.models import ProvenanceKey
from fleet.rollouts.models import Rollout
from tests.fleet_world import enrolment_token, operator, viewer
from tests.registry import registry  # noqa: F401  # a fixture of `building`
from tests.server.test_doors import CALLERS, Building, building  # noqa: F401

Callers = frozenset[str]
NOBODY: Callers = frozenset()
OWNERS = frozenset({"superuser"})
OPERATORS = OWNERS | {"operator"}
LOOKERS = OPERATORS | {"viewer"}
STAFF = LOOKERS | {"staff"}  # whoever may log in to the admin
# Callers that are no staff, by session, token or credential: the log-in page is all that they ever see.
STRANGERS = CALLERS.keys() - STAFF


@dataclass(frozen=True)
class Room:
    """Who may look at a model's rows, add, change and delete them; `own`: pages of its own."""

    look: Callers = LOOKERS
    add: Callers = NOBODY
    change: Callers = NOBODY
    delete: Callers = NOBODY
    own: Mapping[str, Callers] = field(default_factory=dict)

    def pages(self) -> Iterator[tuple[str, Callers, Callers]]:
        """Each page with who may GET and who may POST."""
        yield "", self.look, self.look
        yield "add/", self.add, self.add
        yield "<path:object_id>/", STAFF, STAFF  # leads to the page that asks
        yield "<path:object_id>/change/", self.look, self.change
        yield "<path:object_id>/delete/", self.delete, self.delete
        yield "<path:object_id>/history/", self.look, self.look
        for page, who in self.own.items():
            yield page, who, who


ROOMS = {
    "audit/auditentry": Room(own={"export/": OPERATORS}),
    "auth/user": Room(OWNERS, OWNERS, OWNERS, OWNERS, {"<id>/password/": OWNERS}),
    "auth/group": Room(OWNERS, OWNERS, OWNERS, OWNERS),
    "accounts/apitoken": Room(add=OWNERS, delete=OWNERS),
    "devices/device": Room(
        own={f"<path:object_id>/{name}/": OPERATORS for name in ("approve", "revoke", "pin", "labels")}
    ),
    "devices/group": Room(add=OPERATORS, change=OPERATORS, delete=OPERATORS, own={"preview/": LOOKERS}),
    "devices/enrolmenttoken": Room(add=OPERATORS, own={"<path:object_id>/revoke/": OPERATORS}),
    "devices/deviceevent": Room(),
    "releases/model": Room(change=OWNERS),
    "releases/provenancekey": Room(add=OWNERS, delete=OWNERS),
    "releases/release": Room(own={"<path:object_id>/withdraw/": OPERATORS}),
    "trust/pendingrole": Room(own={"<path:object_id>/withdraw/": OPERATORS}),
    "trust/rolemetadata": Room(own={"overview/": LOOKERS}),
    "rollouts/rollout": Room(
        add=OPERATORS,
        own={"reach/": LOOKERS}
        | {
            f"<path:object_id>/{name}/": OPERATORS
            for name in (
                "start",
                "resume",
                "pause",
                "roll_back",
                "cancel",
                "approve",
                "reject",
                "approve_stage",
            )
        },
    ),
    "notices/subscription": Room(
        add=OWNERS, delete=OWNERS, own={f"<path:object_id>/{name}/": OWNERS for name in ("test", "switch", "renew")}
    ),
    "notices/delivery": Room(own={"<path:object_id>/send_again/": OPERATORS}),
    "feedback/campaign": Room(add=OPERATORS, change=OPERATORS),
    "feedback/batch": Room(),
    "feedback/datasetpart": Room(),
}
APPS = r"^(?P<app_label>audit|auth|accounts|notices|devices|releases|trust|rollouts|feedback)/$"
COMMON: dict[str, tuple[Callers, Callers]] = {
    "": (STAFF, STAFF),
    "search/": (STAFF, STAFF),
    "jsi18n/": (STAFF, NOBODY),
    "password_change/": (STAFF, STAFF),
    "password_change/done/": (STAFF, NOBODY),
    "autocomplete/": (NOBODY, NOBODY),  # only with a field to complete, and by who may see its rows
    "r/<path:content_type_id>/<path:object_id>/": (NOBODY, NOBODY),  # no row has an address outside the admin
    APPS: (LOOKERS, LOOKERS),
    "(?P<url>.*)$": (NOBODY, NOBODY),  # whatever else
}
OPEN = {"login/", "logout/"}  # for everybody; a log-out takes a POST
TABLE = {
    **COMMON,
    **{f"{room}/{page}": (get, post) for room, rules in ROOMS.items() for page, get, post in rules.pages()},
}


def pages(patterns: Any = None, before: str = "") -> Iterator[str]:
    """What the URL configuration has under admin/."""
    for item in get_resolver().url_patterns if patterns is None else patterns:
        here = before + str(item.pattern)
        if isinstance(item, URLResolver):
            yield from pages(item.url_patterns, here)
        elif here.startswith("admin/"):
            yield here.removeprefix("admin/")


@pytest.fixture
def rows(building: Building) -> dict[str, int]:  # noqa: F811
    """A real row behind every page."""
    enrolment_token()
    part = {"version": "1.0.0", "day": "2026-01-01", "path": "x.parquet", "rows": 1, "length": 1}
    DatasetPart.objects.create(model_id=building.objects["models"], **part)
    ProvenanceKey.objects.create(model_id=building.objects["models"], name="research", pem="", fingerprint="ab" * 32)
    return {room: apps.get_model(room.replace("/", "."))._default_manager.all()[0].pk for room in ROOMS}


def address(page: str, rows: Mapping[str, int]) -> str:
    row = rows.get("/".join(page.split("/")[:2]), 1)
    filled = "devices/" if page == APPS else page.replace("(?P<url>.*)$", "nowhere")
    return "/admin/" + re.sub(r"<[\w:]+>", str(row), filled)


def is_in(client: Client, method: str, where: str) -> bool:
    """Whether the page was had: neither refused nor sent to the log-in page. A 500 fails by itself."""
    answer = client.generic(method, where, b"", "application/x-www-form-urlencoded")
    answer.close()
    assert answer.status_code in {200, 302, 403, 404, 405}, f"{method} {where}: {answer.status_code}"
    return answer.status_code == 200 or (answer.status_code == 302 and "/login/" not in answer["Location"])


def test_every_page_has_a_row() -> None:
    assert set(pages()) == TABLE.keys() | OPEN


def caller(name: str) -> Client:
    people: dict[str, Callable[[], Any]] = {"viewer": viewer, "operator": operator}
    if name not in people:
        return CALLERS[name]()
    person = people[name]()
    person.is_staff = True
    person.save()
    client = Client()
    client.force_login(person)
    return client


@pytest.mark.parametrize("name", sorted(CALLERS))
def test_who_gets_in_is_what_the_table_says(rows: dict[str, int], name: str) -> None:
    client = caller(name)
    before = _states()
    wrong = []
    for page, allowed in TABLE.items():
        for method, welcome in zip(("GET", "POST"), allowed, strict=True):
            if is_in(client, method, address(page, rows)) != (name in welcome):
                wrong.append(f"{method} {page}: {'shut out' if name in welcome else 'got in'}")
    assert wrong == []
    assert _states() == before  # an empty form does nothing, not even for those who may


def _states() -> list[Any]:
    return [list(model.objects.order_by("pk").values_list("pk", "state")) for model in (Device, Rollout)]


def test_strangers_see_the_log_in_page_and_nothing_else(rows: dict[str, int]) -> None:
    assert {"nobody", "outsider", "device", "revoked device", "token operate", "token publish"} <= STRANGERS
    assert {who for allowed in TABLE.values() for who in (*allowed[0], *allowed[1])} & STRANGERS == set()
    assert Client().get("/admin/login/").status_code == 200
    assert Client().get("/admin/logout/").status_code in {302, 405}


BULK = [("devices/device", "approve_selected", OPERATORS), ("feedback/datasetpart", "download", LOOKERS)]


@pytest.mark.parametrize("name", ["staff", "viewer", "operator", "superuser"])
def test_bulk_actions_are_for_those_who_may(rows: dict[str, int], name: str) -> None:
    """Those that the pages offer; nobody deletes in bulk what is history."""
    from django.contrib import admin

    client = caller(name)
    offered = {}
    for room in ROOMS:
        model = apps.get_model(room.replace("/", "."))
        request = client.get("/admin/").wsgi_request
        offered[room] = set(admin.site.get_model_admin(model).get_actions(request))
    one_by_one = {"releases/provenancekey", "notices/subscription"}  # by their service, which a bulk delete goes past
    deletable = {room for room, rules in ROOMS.items() if name in rules.delete} - one_by_one
    for room, actions in offered.items():
        own = {action for where, action, who in BULK if where == room and name in who}
        assert actions == own | ({"delete_selected"} if room in deletable else set()), room


def test_an_action_that_was_not_offered_does_nothing(rows: dict[str, int]) -> None:
    Device.objects.update(state=Device.State.PENDING)
    picked = {"action": "approve_selected", "_selected_action": [rows["devices/device"]]}
    caller("viewer").post("/admin/devices/device/", picked)
    assert set(Device.objects.values_list("state", flat=True)) == {"pending"}
    caller("operator").post("/admin/devices/device/", picked)
    assert "active" in set(Device.objects.values_list("state", flat=True))
