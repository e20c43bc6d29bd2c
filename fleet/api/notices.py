"""Who is told of what, under /api/v1/: subscriptions, and whether what was said arrived."""

from typing import Any

from django.contrib.auth.models import User
from django.urls import include, path
from django_filters import rest_framework as filters
from drf_spectacular.utils import extend_schema
from rest_framework import serializers, status
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter
from rest_framework.viewsets import ReadOnlyModelViewSet

from fleet.api import serializers as shapes
from fleet.api.auth import ModelPermissions
from fleet.notices import services
from fleet.notices.models import Delivery, Subscription
from fleet.rollouts.notes import ALL

REFUSALS = {403: shapes.ErrorSerializer, 404: shapes.ErrorSerializer}
WRITE_REFUSALS = {400: shapes.ErrorSerializer, **REFUSALS, 409: shapes.ErrorSerializer, 422: shapes.ErrorSerializer}


class MayAdd(ModelPermissions):
    perms_map = {**ModelPermissions.perms_map, "DELETE": ["notices.delete_subscription"]}


class MayResend(ModelPermissions):
    perms_map = {**ModelPermissions.perms_map, "POST": ["notices.resend_delivery"]}


class SubscriptionSerializer(serializers.ModelSerializer[Subscription]):
    events = serializers.ListField(
        child=serializers.ChoiceField(ALL), required=False, help_text="kinds of notices; empty: all"
    )

    class Meta:
        model = Subscription
        fields: tuple[str, ...] = ("id", "name", "kind", "target", "events", "active", "created_at")
        read_only_fields = ("active",)
        extra_kwargs: dict[str, dict[str, Any]] = {"name": {"validators": []}}  # the service answers with a code


class NewSubscriptionSerializer(SubscriptionSerializer):
    secret = serializers.CharField(read_only=True, help_text="of a webhook; shown this once")

    class Meta(SubscriptionSerializer.Meta):
        fields = (*SubscriptionSerializer.Meta.fields, "secret")


class DeliverySerializer(serializers.ModelSerializer[Delivery]):
    subscription = serializers.SlugRelatedField[Subscription](slug_field="name", read_only=True)
    key = serializers.CharField(source="notice.key", help_text="the webhook-id")
    kind = serializers.CharField(source="notice.kind")
    title = serializers.CharField(source="notice.title")
    at = serializers.DateTimeField(source="notice.at")

    class Meta:
        model = Delivery
        fields = (
            "id", "subscription", "key", "kind", "title", "at", "state", "tries", "next_at", "error", "sent_at",
        )  # fmt: skip


class SubscriptionViewSet(ReadOnlyModelViewSet[Subscription]):
    """Webhooks (signed as standardwebhooks.com says) and e-mail addresses that are told of rollouts."""

    queryset = Subscription.objects.all()
    serializer_class = SubscriptionSerializer
    permission_classes = [MayAdd]
    filterset_fields = ("name", "kind", "active")

    @extend_schema(request=SubscriptionSerializer, responses={201: NewSubscriptionSerializer, **WRITE_REFUSALS})
    def create(self, request: Request) -> Response:
        """Subscribe an address. The secret of a webhook is in this answer and nowhere else."""
        shape = SubscriptionSerializer(data=request.data)
        shape.is_valid(raise_exception=True)
        made, secret = services.subscribe(**shape.validated_data, actor=_actor(request))
        made.secret = secret  # in place of the sealed one: this row is not saved again
        return Response(NewSubscriptionSerializer(made).data, status=status.HTTP_201_CREATED)

    @extend_schema(responses={204: None, **REFUSALS})
    def destroy(self, request: Request, pk: str) -> Response:
        """Tell it nothing more."""
        services.unsubscribe(subscription=self.get_object())
        return Response(status=status.HTTP_204_NO_CONTENT)

    @extend_schema(request=None, responses={204: None, **WRITE_REFUSALS})
    @action(detail=True, methods=["post"])
    def test(self, request: Request, pk: str) -> Response:
        """Send it a notice of the kind `test`."""
        services.send_test(subscription=self.get_object())
        return Response(status=status.HTTP_204_NO_CONTENT)


class DeliveryFilter(filters.FilterSet):  # type: ignore[misc]  # django-filter ships no types
    subscription = filters.CharFilter(field_name="subscription__name")

    class Meta:
        model = Delivery
        fields = ("state",)


class DeliveryViewSet(ReadOnlyModelViewSet[Delivery]):
    """What was sent to whom, the newest first, and what did not arrive."""

    queryset = Delivery.objects.select_related("notice", "subscription")
    serializer_class = DeliverySerializer
    filterset_class = DeliveryFilter

    @extend_schema(request=None, responses={200: DeliverySerializer, **WRITE_REFUSALS})
    @action(detail=True, methods=["post"], permission_classes=[MayResend])
    def send_again(self, request: Request, pk: str) -> Response:
        """Once more from the beginning, with the same id."""
        delivery = self.get_object()
        services.send_again(delivery=delivery)
        return Response(self.get_serializer(delivery).data)


def _actor(request: Request) -> User:
    assert isinstance(request.user, User)  # noqa: S101  # permissions have refused everybody else
    return request.user


router = SimpleRouter()
router.register("subscriptions", SubscriptionViewSet)
router.register("deliveries", DeliveryViewSet)
urlpatterns = [path("api/v1/", include(router.urls))]
