"""What devices call: enrol, poll, events. The poll writes nothing but a view that has to be signed anew."""

from django.conf import settings
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from device_sdk.protocol import fields, limits, polls
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.polls import EnrolRequest, Tag, running_digest
from device_sdk.protocol.posts import EventPost
from fleet.accounts import limits as door
from fleet.api import composition
from fleet.api.device_auth import allow, device_view, open_view, read_body
from fleet.audit.addresses import caller_network, client_address
from fleet.devices import selectors as device_selectors
from fleet.devices import services as devices
from fleet.devices.models import Device
from fleet.errors import Conflict, Unauthorized
from fleet.rollouts import evidence
from fleet.rollouts import selectors as rollouts
from fleet.rollouts import services as rollout_services
from fleet.trust import selectors as trust_selectors
from fleet.trust import services as trust

ENROL_BODY = 64 * limits.KIB
FIRST_TAG = Tag(0, running_digest({}))  # of a device that has no view and runs nothing


@allow("POST")
@open_view
def enrol(request: HttpRequest) -> HttpResponse:
    """201 for a new device, 200 for the same one asking again, 202 while it waits for approval."""
    _, _, token = request.headers.get("Authorization", "").partition(" ")
    token, network = token.strip(), caller_network(client_address(request))
    door.check(door.ENROL_ADDRESS, network)
    door.check(door.ENROL_TOKEN, token)
    parsed = fields.parse_object(read_body(request, ENROL_BODY), limit=ENROL_BODY, what="enrolment")
    try:
        enrolment = devices.enrol(token=token, request=EnrolRequest.parse(parsed))
    except Unauthorized as error:
        if error.code == devices.UNKNOWN_TOKEN:
            door.failed(door.ENROL_ADDRESS, network, once_for=token)
        else:
            door.failed(door.ENROL_TOKEN, token)
        raise
    except Conflict:
        door.failed(door.ENROL_TOKEN, token)
        raise
    device = enrolment.device
    pending = device.state == Device.State.PENDING
    return JsonResponse(
        {
            "device": device.name,
            "credential": enrolment.credential,
            "models": device.model_names,
            "state": device.state,
        },
        status=202 if pending else 201 if enrolment.created else 200,
        headers={"Cache-Control": "no-store"},
    )


@allow("GET")
@device_view
def poll(request: HttpRequest, device: Device) -> HttpResponse:
    """304, or the bundle of a view that the device does not hold. What it runs is told by its entity tag."""
    tag, root_version = _tag(request), _root_version(request)
    known = device_selectors.running_set(device, tag.runs)
    changed = known is not None and known.pk != device.runs_id
    devices.mark_seen(device.pk, runs=tag.runs if changed else "")
    assignments = composition.assignments(device, known.runs if known else None)
    view = trust.current_view(device, assignments, held=tag.view)
    headers = {
        "ETag": str(Tag(view.version, tag.runs)),
        "Cache-Control": "private, no-cache",
        polls.INTERVAL_HEADER: f"{settings.POLL_INTERVAL:g}",
    }
    if known is None:
        headers[polls.WANT_HEADER] = "runs"
    if view.version == tag.view:
        return HttpResponse(status=304, headers=headers)
    manifests = rollouts.manifests_for(assignments)
    bundle = trust_selectors.bundle_for(view, device, root_version=root_version, manifests=manifests)
    return HttpResponse(bundle.to_bytes(), content_type="application/json", headers=headers)


@allow("POST")
@device_view
def post_events(request: HttpRequest, device: Device) -> HttpResponse:
    """Take in what happened. The same post again changes nothing."""
    post = EventPost.parse(read_body(request, limits.EVENT_BODY))
    with transaction.atomic():
        heard = evidence.heard(device, post.events)  # what these events are compared with
        new = devices.record_events(device, post, exists=rollouts.releases_exist)
        rollout_services.note_events(device, new)
        evidence.note(device, new, heard)
    return JsonResponse({"accepted": len(new)})


def _tag(request: HttpRequest) -> Tag:
    value = request.headers.get("If-None-Match")
    return FIRST_TAG if value is None else Tag.parse(value)


def _root_version(request: HttpRequest) -> int:
    """The newest root that the device trusts; 0 where it does not say, which brings it all of them."""
    value = request.GET.get(polls.ROOT_PARAMETER, "0")
    if not (value.isascii() and value.isdecimal() and len(value) <= 9):
        raise ProtocolError("malformed", f"root: expected a version number; got {value!r:.40}")
    return int(value)


urlpatterns = [
    path(polls.ENROL.lstrip("/"), enrol, name="device-enrol"),
    path(polls.POLL.lstrip("/"), poll, name="device-poll"),
    path(polls.EVENTS.lstrip("/"), post_events, name="device-events"),
]
