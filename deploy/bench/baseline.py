"""What the poll is compared with: a view that does nothing, and the poll as one would first write it.

The plain poll answers the same question (has this device's view changed?) by the book: DRF, its token look-up, the
ORM, and an UPDATE of last seen. It signs nothing and knows no stages, labels or campaigns: it does less than ours.
"""

from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from rest_framework.authentication import TokenAuthentication
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from device_sdk.protocol.polls import Tag
from fleet.devices.models import Device
from fleet.rollouts.models import Rollout
from fleet.trust.models import DeviceView


def hello(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"hello")


class PlainPoll(APIView):
    authentication_classes = (TokenAuthentication,)
    permission_classes = (IsAuthenticated,)

    def get(self, request: Request) -> Response:
        device = Device.objects.get(name=request.user.username)
        newest = Rollout.objects.select_related("release__model").filter(release__model__name__in=device.model_names)
        assigned = newest.order_by("-pk").first()
        device.last_seen = timezone.now()
        device.save(update_fields=["last_seen"])
        view = DeviceView.objects.get(device=device)
        tag = Tag.parse(request.headers["If-None-Match"])
        if assigned is not None and view.version == tag.view:
            return Response(status=304, headers={"ETag": str(tag)})
        return Response({"release": str(assigned and assigned.release), "version": view.version})
