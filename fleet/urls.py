"""Every address of the server."""

from django.conf import settings
from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from fleet.operations.metrics import metrics

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path(
        "favicon.ico", RedirectView.as_view(url=f"{settings.STATIC_URL}dashboard/favicon.svg")
    ),  # asked for by every browser
    path("admin/", admin.site.urls),
    path("metrics", metrics),
    path("", include("fleet.api.urls")),
]
handler400 = "fleet.api.errors.bad_request"
handler403 = "fleet.api.errors.denied"
handler404 = "fleet.api.errors.not_found"
handler500 = "fleet.api.errors.server_error"
