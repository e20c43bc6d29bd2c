"""A site's mirror, set on its group by any door: checked there, and signed into the views of its devices."""

import json
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from device_sdk.protocol.assignment import Assignment
from fleet.audit.models import AuditEntry
from fleet.devices import selectors, services
from fleet.devices.models import Device, Group
from fleet.errors import Invalid
from fleet.rollouts import services as rollouts
from fleet.rollouts import snapshots
from fleet.rollouts.selectors import assignments_for
from tests.fleet_world import MODEL, api_token, device, operator, release, running, running_set, superuser
from tests.registry import Registry
from tests.server.fast_world import Server, request, tag_of

pytestmark = pytest.mark.django_db
OSLO = "http://mirror.oslo.example:8080"
BAD = [
    "mirror.oslo.example", "ftp://a", "http://", "http://a/path", "http://a?b=c", "http://a#b", "http://u:p@a",
    "http://a:0", "http://a:65536", "http://a b", "http://[zz]", "http://" + "a" * 200, "http://müller.example",
]  # fmt: skip


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MAX_AGE", 0)


def site(name: str, selector: str, mirror: str = "") -> Group:
    return services.save_group(name=name, selector=selector, mirror=mirror)


def mirror(entry: Device) -> str:
    (assignment,) = assignments_for(entry)
    return assignment.mirror


def over_rest(body: dict[str, Any], path: str = "groups/", method: str = "post") -> Any:
    client = Client(headers={"Authorization": f"Bearer {api_token(operator(), 'operate')}"})
    return getattr(client, method)(f"/api/v1/{path}", body, content_type="application/json")


def in_the_admin(body: dict[str, Any]) -> Any:
    client = Client()
    client.force_login(superuser())
    return client.post("/admin/devices/group/add/", {"description": "", **body})


def group_command(*arguments: str) -> str:
    out = StringIO()
    call_command("group", *arguments, stdout=out)
    return out.getvalue()


@pytest.mark.parametrize("door", ["rest", "admin", "command"])
def test_every_door_sets_it_in_one_form_and_the_trail_says_so(door: str) -> None:
    terms = {"name": "oslo", "selector": "site=oslo", "mirror": "HTTP://Mirror.Oslo.example:8080/"}
    if door == "rest":
        assert over_rest(terms).json()["mirror"] == OSLO
    elif door == "admin":
        assert in_the_admin(terms).status_code == 302
    else:
        said = group_command("save", "oslo", "--selector", "site=oslo", "--mirror", terms["mirror"])
        assert said == f"oslo  site=oslo  {OSLO}\n"
    assert Group.objects.get().mirror == OSLO
    assert json.loads(AuditEntry.objects.get(action="group.created").detail)["mirror"] == OSLO


@pytest.mark.parametrize("address", BAD)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(Invalid) as caught:
        site("oslo", "site=oslo", address)
    assert caught.value.code == "malformed"
    assert not Group.objects.exists()


def test_every_door_refuses_it_and_says_what_was_expected() -> None:
    terms = {"name": "oslo", "selector": "site=oslo", "mirror": "http://u:p@a"}
    assert over_rest(terms).json()["code"] == "malformed"
    assert "expected http(s)://host" in in_the_admin(terms).content.decode()
    with pytest.raises(CommandError, match="expected http"):
        group_command("save", "oslo", "--mirror", terms["mirror"])
    assert not Group.objects.exists()


def test_what_is_left_out_stays() -> None:
    made = site("oslo", "site=oslo", OSLO)
    assert over_rest({"description": "by the fjord"}, f"groups/{made.pk}/", "patch").json()["mirror"] == OSLO
    assert group_command("save", "oslo", "--description", "north") == f"oslo  site=oslo  {OSLO}\n"
    assert group_command("save", "oslo", "--mirror", "") == "oslo  site=oslo\n"
    assert group_command("list") == "oslo  site=oslo\n"


def test_a_device_is_told_of_the_first_by_name_of_the_groups_that_hold_it() -> None:
    running(release("1.0.0"))
    entry, other = device(labels={"site": "oslo"}), device("cam-2", labels={"site": "paris"})
    site("norway", "site in (oslo, bergen)", "http://norway")
    site("every", "", "http://every")
    lab = site("cam", "@name=cam-2", "http://cam")
    assert (mirror(entry), mirror(other)) == ("http://every", "http://cam")
    services.delete_group(group=lab)
    services.delete_group(group=Group.objects.get(name="every"))
    assert (mirror(entry), mirror(other)) == ("http://norway", "")


def test_a_pinned_device_is_told_too_and_one_with_nothing_to_fetch_is_not() -> None:
    release("1.0.0")
    entry = device(labels={"site": "oslo"})
    site("oslo", "site=oslo", OSLO)
    assert assignments_for(entry) == [Assignment(MODEL)]
    rollouts.pin(device=entry, model=MODEL, version="1.0.0", actor="ann")
    assert mirror(Device.objects.get()) == OSLO


def test_a_change_is_in_the_next_view_also_where_polls_are_answered_from_memory(registry: Registry) -> None:
    """Of two devices that are alike: what was found for the first must not stand for the other's view."""
    running(release("1.0.0"))
    running_set({})
    entries = [device(name, labels={"site": "oslo"}) for name in ("cam-1", "cam-2")]
    server, tags = Server(), dict.fromkeys(entries)
    made = site("oslo", "site=oslo")
    for address, status in (("", 200), (OSLO, 200), (OSLO, 304), ("http://other", 200), ("", 200)):
        services.save_group(group=made, name="oslo", selector="site=oslo", mirror=address)
        server.look()
        for entry in entries:
            answer, _ = server.poll(request(entry, tags[entry]))
            assert answer.status == status
            if status == 200:
                assert told(answer.body) == address
                tags[entry] = tag_of(answer, {})
        server.look()
        for entry in (*entries, *entries):
            answer, from_memory = server.poll(request(entry, tags[entry]))
            assert (answer.status, from_memory) == (304, True)


def told(body: bytes) -> str:
    metadata = json.loads(body)["metadata"]
    director = json.loads(next(text for name, text in metadata.items() if name.endswith(".director.json")))
    (target,) = director["signed"]["targets"].values()
    return str(target["custom"].get("mirror", ""))


def test_the_device_page_says_which_and_of_which_group() -> None:
    entry = device(labels={"site": "oslo"})
    client = Client()
    client.force_login(superuser())
    page = f"/admin/devices/device/{entry.pk}/change/"
    assert "of no group" in client.get(page).content.decode()
    site("oslo", "site=oslo", OSLO)
    assert f"{OSLO}, of the group oslo" in client.get(page).content.decode()


def test_a_group_that_cannot_be_read_has_no_mirror_and_holds_up_no_other() -> None:
    Group.objects.create(name="bad", selector="site in (", mirror="http://bad")
    site("oslo", "site=oslo", OSLO)
    assert [each.group for each in selectors.mirrors().every] == ["oslo"]
