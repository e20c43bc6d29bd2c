"""The server's addresses, and the baselines through the same middleware."""

from django.urls import include, path

from deploy.bench import baseline

urlpatterns = [
    path("bench/hello", baseline.hello),
    path("bench/poll", baseline.PlainPoll.as_view()),
    path("", include("fleet.urls")),
]
