"""What operators and their scripts call, under /api/v1/. Reading needs the view permission, doing needs more.

A token narrows what its user may: scope `read` reads, scope `operate` does everything that the user may do here.
"""

from datetime import timedelta
from typing import Any

from django.contrib.auth.models import User
from django.db.models import QuerySet
from django.http import HttpResponse
from django.urls import include, path
from django.utils import timezone
from django_filters import rest_framework as filters
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_field
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView
from rest_framework import mixins, serializers, status
from rest_framework.decorators import action
from rest_framework.generics import ListAPIView
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter
from rest_framework.views import APIView
from rest_framework.viewsets import GenericViewSet, ReadOnlyModelViewSet

from fleet.api import serializers as shapes
from fleet.api.auth import ModelPermissions
from fleet.devices import matching, selection
from fleet.devices import selectors as device_selectors
from fleet.devices import services as devices
from fleet.devices.models import Device, DeviceEvent, Group
from fleet.errors import NotFound
from fleet.feedback import services as feedback
from fleet.feedback.models import Batch, Campaign
from fleet.releases import provenance
from fleet.releases import selectors as release_selectors
from fleet.releases.models import Model, Release
from fleet.rollouts import approval, deciding
from fleet.rollouts import selectors as rollout_selectors
from fleet.rollouts import services as rollouts
from fleet.rollouts.counting import survey
from fleet.rollouts.models import Rollout
from fleet.rollouts.terms.pace import NAMES as PACE
from fleet.rollouts.terms.pace import pace_of

REFUSALS = {403: shapes.ErrorSerializer, 404: shapes.ErrorSerializer}
WRITE_REFUSALS = {400: shapes.ErrorSerializer, **REFUSALS, 409: shapes.ErrorSerializer, 422: shapes.ErrorSerializer}
SPREAD = {
    "type": "object",
    "description": "model to version to devices",
    "additionalProperties": {"type": "object", "additionalProperties": {"type": "integer"}},
}


class MayChange(ModelPermissions):
    """Doing something to a thing is changing it, though it is a POST."""

    perms_map = {**ModelPermissions.perms_map, "POST": ["%(app_label)s.change_%(model_name)s"]}


class MayReadDevices(ModelPermissions):
    """Of a release and of devices: what is told is which devices run it."""

    perms_map = {
        **ModelPermissions.perms_map,
        "GET": ["releases.view_release", "devices.view_device"],
        "HEAD": ["releases.view_release", "devices.view_device"],
    }


class MayReadRollouts(ModelPermissions):
    """Of a device and of rollouts: what is told is which of them admit it."""

    perms_map = {
        **ModelPermissions.perms_map,
        "GET": ["devices.view_device", "rollouts.view_rollout"],
        "HEAD": ["devices.view_device", "rollouts.view_rollout"],
    }


class MayOperate(ModelPermissions):
    perms_map = {**ModelPermissions.perms_map, "POST": ["rollouts.operate_rollout"]}


class MayApprove(ModelPermissions):
    perms_map = {**ModelPermissions.perms_map, "POST": [approval.PERMISSION]}


# --- releases ----------------------------------------------------------------------------------------------------


class ModelViewSet(ReadOnlyModelViewSet[Model]):
    """Named lines of releases."""

    queryset = Model.objects.order_by("name")
    serializer_class = shapes.ModelSerializer
    filterset_fields = ("name",)


class ReleaseFilter(filters.FilterSet):  # type: ignore[misc]  # django-filter ships no types
    model = filters.CharFilter(field_name="model__name")

    class Meta:
        model = Release
        fields = ("version", "state")


class ReleaseViewSet(ReadOnlyModelViewSet[Release]):
    """What CI published, and what validation found."""

    queryset = Release.objects.select_related("model").prefetch_related(
        "variants__attachments__artifact", "model__provenance_keys"
    )
    serializer_class = shapes.ReleaseSerializer
    filterset_class = ReleaseFilter

    @extend_schema(responses={200: shapes.StillRunningSerializer(many=True), **REFUSALS})
    @action(detail=True, filterset_class=None, permission_classes=[MayReadDevices])
    def still_running(self, request: Request, pk: str) -> Response:
        """Devices that run it, and why they do not run what is meant for them: who is left of a revoked release."""
        found: Any = self.paginate_queryset(list(rollout_selectors.still_running(self.get_object())))
        return self.get_paginated_response(shapes.StillRunningSerializer(found, many=True).data)

    @extend_schema(responses={(200, "application/octet-stream"): OpenApiTypes.BINARY, **REFUSALS})
    @action(detail=True, url_path="attachments/(?P<sha256>[0-9a-f]{64})", filterset_class=None, pagination_class=None)
    def attachment(self, request: Request, pk: str, sha256: str) -> HttpResponse:
        """A file that is attached to it, as it was uploaded. Never shown in place: it may hold anything."""
        found = release_selectors.attachment(self.get_object(), sha256)
        if found is None:
            raise NotFound("unknown_attachment", f"nothing with sha256 {sha256} is attached to this release")
        headers = {
            "Content-Disposition": f'attachment; filename="{found.name}"',
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
        }
        return HttpResponse(provenance.content_of(sha256), content_type="application/octet-stream", headers=headers)


# --- devices -----------------------------------------------------------------------------------------------------


class GroupViewSet(
    mixins.ListModelMixin, mixins.RetrieveModelMixin, mixins.CreateModelMixin, mixins.UpdateModelMixin,
    GenericViewSet[Group],
):  # fmt: skip
    """Devices chosen by labels."""

    queryset = Group.objects.all()
    serializer_class = shapes.GroupSerializer
    filterset_fields = ("name",)
    http_method_names = ["get", "post", "put", "patch", "head", "options"]

    def perform_create(self, serializer: serializers.BaseSerializer[Group]) -> None:
        serializer.instance = devices.save_group(**serializer.validated_data)

    def perform_update(self, serializer: serializers.BaseSerializer[Group]) -> None:
        group = self.get_object()
        kept = {name: getattr(group, name) for name in ("name", "description", "selector", "mirror")}
        serializer.instance = devices.save_group(group=group, **{**kept, **serializer.validated_data})


class DeviceFilter(filters.FilterSet):  # type: ignore[misc]
    group = filters.ModelChoiceFilter(queryset=Group.objects.all(), method="in_group")
    selector = filters.CharFilter(method="selected", help_text="a label selector: `site in (berlin, hamburg), !lab`")

    class Meta:
        model = Device
        fields = ("name", "state")

    @extend_schema_field(OpenApiTypes.INT)
    def in_group(self, queryset: QuerySet[Device], name: str, group: Group) -> QuerySet[Device]:
        return queryset.filter(pk__in=matching.chosen(matching.selector_of(group)))

    def selected(self, queryset: QuerySet[Device], name: str, text: str) -> QuerySet[Device]:
        """Of any state: `state=active` narrows it to those that a group with this selector would have."""
        return queryset.filter(matching.where(selection.parse(text)))


class DeviceViewSet(ReadOnlyModelViewSet[Device]):
    """Installations: what each runs, and what it last said."""

    queryset = Device.objects.select_related("runs").prefetch_related("statuses")
    serializer_class = shapes.DeviceSerializer
    filterset_class = DeviceFilter

    @extend_schema(
        parameters=[OpenApiParameter("model", str, description="only of this model")],
        responses={200: shapes.ExplanationSerializer(many=True), **REFUSALS},
    )
    @action(detail=True, filterset_class=None, pagination_class=None, permission_classes=[MayReadRollouts])
    def explain(self, request: Request, pk: str) -> Response:
        """Why it runs what it runs: every rollout of its models in the order in which they are asked, with reasons."""
        told = rollout_selectors.explain(self.get_object(), request.query_params.get("model"))
        return Response(shapes.ExplanationSerializer(told, many=True).data)

    @extend_schema(request=shapes.CommentSerializer, responses={200: shapes.DeviceSerializer, **WRITE_REFUSALS})
    @action(detail=True, methods=["post"], permission_classes=[MayChange])
    def approve(self, request: Request, pk: str) -> Response:
        """Let a pending device work."""
        device = self.get_object()
        devices.approve(device=device, actor=_actor(request), **_checked(shapes.CommentSerializer, request))
        return self._answer(device)

    @extend_schema(request=shapes.CommentSerializer, responses={200: shapes.DeviceSerializer, **WRITE_REFUSALS})
    @action(detail=True, methods=["post"], permission_classes=[MayChange])
    def revoke(self, request: Request, pk: str) -> Response:
        """Refuse its credential from now on."""
        device = self.get_object()
        devices.revoke(device=device, actor=_actor(request), **_checked(shapes.CommentSerializer, request))
        return self._answer(device)

    @extend_schema(request=shapes.PinSerializer, responses={200: shapes.DeviceSerializer, **WRITE_REFUSALS})
    @action(detail=True, methods=["post"], permission_classes=[MayChange])
    def pin(self, request: Request, pk: str) -> Response:
        """Fix a model to a version, whatever rollouts say."""
        device = self.get_object()
        rollouts.pin(device=device, actor=_actor(request), **_checked(shapes.PinSerializer, request))
        return self._answer(device)

    @extend_schema(request=shapes.LabelsSerializer, responses={200: shapes.DeviceSerializer, **WRITE_REFUSALS})
    @action(detail=True, methods=["post"], permission_classes=[MayChange])
    def labels(self, request: Request, pk: str) -> Response:
        """Replace its labels, by which groups choose."""
        device = self.get_object()
        devices.set_labels(device=device, actor=_actor(request), **_checked(shapes.LabelsSerializer, request))
        return self._answer(device)

    def _answer(self, device: Device) -> Response:
        return Response(self.get_serializer(device).data)


class EventFilter(filters.FilterSet):  # type: ignore[misc]
    device = filters.CharFilter(field_name="device__name")

    class Meta:
        model = DeviceEvent
        fields = ("kind", "model", "release", "rollout")


class EventViewSet(ReadOnlyModelViewSet[DeviceEvent]):
    """What devices said happened, the newest first."""

    queryset = DeviceEvent.objects.select_related("device")
    serializer_class = shapes.EventSerializer
    filterset_class = EventFilter


class SpreadView(APIView):
    """How many active devices run which version of which model."""

    queryset = Device.objects.none()  # whose permission it takes

    @extend_schema(responses={200: SPREAD, **REFUSALS})
    def get(self, request: Request) -> Response:
        return Response(device_selectors.spread())


class LaggardsView(ListAPIView[Any]):
    """Devices that do not run what is meant for them, and why."""

    queryset = Device.objects.none()
    serializer_class = shapes.LaggardSerializer

    def filter_queryset(self, queryset: Any) -> Any:
        """Not rows of a table: found by comparing what devices run with what the policy says, a page at a time."""
        return survey.Pages(self.request.query_params.get("model"))

    @extend_schema(parameters=[OpenApiParameter("model", str, description="only of this model")])
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)


# --- rollouts ----------------------------------------------------------------------------------------------------


class RolloutFilter(filters.FilterSet):  # type: ignore[misc]
    model = filters.CharFilter(field_name="release__model__name")
    version = filters.CharFilter(field_name="release__version")

    class Meta:
        model = Rollout
        fields = ("state", "group", "release")


_does = extend_schema(
    request=shapes.CommentSerializer, responses={200: shapes.RolloutDetailSerializer, **WRITE_REFUSALS}
)


class RolloutViewSet(ReadOnlyModelViewSet[Rollout]):
    """One release to one group, in stages. Progress is in the single rollout, not in the list."""

    queryset = Rollout.objects.select_related(
        "release__model", "group", "exclude_group", "created_by"
    ).prefetch_related("stages__ring", "actions")
    filterset_class = RolloutFilter

    def get_serializer_class(self) -> type[shapes.RolloutSerializer]:
        return shapes.RolloutSerializer if self.action == "list" else shapes.RolloutDetailSerializer

    @extend_schema(
        request=shapes.RolloutCreateSerializer, responses={201: shapes.RolloutDetailSerializer, **WRITE_REFUSALS}
    )
    def create(self, request: Request) -> Response:
        """Draft a rollout. Nothing happens to any device before it is started."""
        fields = _checked(shapes.RolloutCreateSerializer, request)
        stages = [rollouts.StagePlan(**stage) for stage in fields.pop("stages")]
        pace = pace_of({name: fields.pop(name) for name in PACE if name in fields})
        rollout = rollouts.create(stages=stages, actor=_actor(request), pace=pace, **fields)
        return self._answer(rollout, status=status.HTTP_201_CREATED)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayOperate])
    def start(self, request: Request, pk: str) -> Response:
        """Admit the first stage; or wait for approval where that is needed, or for its time to come."""
        return self._do(rollouts.start, request)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayApprove])
    def approve(self, request: Request, pk: str) -> Response:
        """Let it begin, now or at its time. Never by its author."""
        return self._do(deciding.approve, request)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayApprove])
    def reject(self, request: Request, pk: str) -> Response:
        """Refuse it for good."""
        return self._do(deciding.reject, request)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayApprove])
    def approve_stage(self, request: Request, pk: str) -> Response:
        """Let the stage in force pass once it has done well. Never by the author."""
        return self._do(deciding.approve_stage, request)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayOperate])
    def pause(self, request: Request, pk: str) -> Response:
        """Recall whoever has not activated it yet."""
        return self._do(rollouts.pause, request)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayOperate])
    def resume(self, request: Request, pk: str) -> Response:
        """Go on from paused or halted; accepts the failures so far."""
        return self._do(rollouts.resume, request)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayOperate])
    def cancel(self, request: Request, pk: str) -> Response:
        """End it for good; devices go back to what an older rollout gives them."""
        return self._do(rollouts.cancel, request)

    @_does
    @action(detail=True, methods=["post"], permission_classes=[MayOperate])
    def roll_back(self, request: Request, pk: str) -> Response:
        """Admit nobody, also after completion; may be resumed."""
        return self._do(rollouts.roll_back, request)

    def _do(self, service: Any, request: Request) -> Response:
        comment = _checked(shapes.CommentSerializer, request)["comment"]
        service(rollout=self.get_object(), actor=_actor(request), comment=comment)
        return self._answer(self.get_object())

    def _answer(self, rollout: Rollout, *, status: int = status.HTTP_200_OK) -> Response:
        return Response(shapes.RolloutDetailSerializer(rollout).data, status=status)


# --- feedback ----------------------------------------------------------------------------------------------------


class CampaignViewSet(ReadOnlyModelViewSet[Campaign]):
    """Requests for samples, signed into the views of the devices that run the model."""

    queryset = Campaign.objects.select_related("model")
    serializer_class = shapes.CampaignSerializer
    filterset_fields = ("name", "active")

    @extend_schema(
        request=shapes.CampaignCreateSerializer, responses={201: shapes.CampaignSerializer, **WRITE_REFUSALS}
    )
    def create(self, request: Request) -> Response:
        fields = _checked(shapes.CampaignCreateSerializer, request)
        expires_at = timezone.now() + timedelta(days=fields.pop("days"))
        campaign = feedback.create_campaign(expires_at=expires_at, **fields)
        return Response(self.get_serializer(campaign).data, status=status.HTTP_201_CREATED)

    @extend_schema(
        request=shapes.CampaignChangeSerializer, responses={200: shapes.CampaignSerializer, **WRITE_REFUSALS}
    )
    def partial_update(self, request: Request, pk: str) -> Response:
        fields = _checked(shapes.CampaignChangeSerializer, request, partial=True)
        campaign = feedback.change_campaign(campaign=self.get_object(), **fields)
        return Response(self.get_serializer(campaign).data)


class BatchFilter(filters.FilterSet):  # type: ignore[misc]
    device = filters.CharFilter(field_name="device__name")
    model = filters.CharFilter(field_name="model__name")

    class Meta:
        model = Batch
        fields = ("state",)


class BatchViewSet(ReadOnlyModelViewSet[Batch]):
    """Uploads of samples, the newest first."""

    queryset = Batch.objects.select_related("device", "model", "campaign")
    serializer_class = shapes.BatchSerializer
    filterset_class = BatchFilter


def _checked(shape: type[serializers.Serializer[Any]], request: Request, *, partial: bool = False) -> dict[str, Any]:
    serializer = shape(data=request.data, partial=partial)
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


def _actor(request: Request) -> User:
    assert isinstance(request.user, User)  # noqa: S101  # permissions have refused everybody else
    return request.user


# No OPTIONS: the page cannot show what DRF would answer.
READ_BY_ANYBODY_KNOWN: dict[str, Any] = {"permission_classes": [IsAuthenticated], "http_method_names": ["get", "head"]}

router = SimpleRouter()
router.register("models", ModelViewSet)
router.register("releases", ReleaseViewSet)
router.register("devices", DeviceViewSet)
router.register("groups", GroupViewSet)
router.register("events", EventViewSet)
router.register("rollouts", RolloutViewSet)
router.register("campaigns", CampaignViewSet)
router.register("batches", BatchViewSet)

urlpatterns = [
    path("api/v1/", include(router.urls)),
    path("api/v1/spread/", SpreadView.as_view(), name="spread"),
    path("api/v1/laggards/", LaggardsView.as_view(), name="laggards"),
    path("api/schema/", SpectacularAPIView.as_view(**READ_BY_ANYBODY_KNOWN), name="schema"),
    path("api/docs/", SpectacularSwaggerView.as_view(url_name="schema", **READ_BY_ANYBODY_KNOWN), name="docs"),
]
