"""The HTTP border, one module per kind of caller."""

from django.urls import URLPattern, URLResolver, include, path

urlpatterns: list[URLPattern | URLResolver] = [
    path("", include("fleet.api.device")),
    path("", include("fleet.api.operator")),
    path("", include("fleet.api.notices")),
    path("", include("fleet.api.batches")),
    path("", include("fleet.api.ci")),
    path("", include("fleet.api.blobs")),
    path("", include("fleet.api.mirrors")),
    path("", include("fleet.api.tuf")),
]
