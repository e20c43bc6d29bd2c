"""API tokens: knox stores and hashes them; scope and models are ours."""

from typing import ClassVar

from django.db import models
from knox.models import AbstractAuthToken

PUBLISH, SIGN, OPERATE, READ, MIRROR = "publish", "sign", "operate", "read", "mirror"
SCOPES = (PUBLISH, SIGN, OPERATE, READ, MIRROR)


class ApiToken(AbstractAuthToken):  # type: ignore[misc]  # knox ships no types
    """`scopes` says what it may do, `models` (names; empty: all) for which models it may publish, sign or
    fetch files."""

    name = models.CharField(max_length=100)
    scopes = models.JSONField(default=list)
    models_allowed = models.JSONField(default=list, blank=True)

    class Meta:
        ordering: ClassVar = ["-created"]
        verbose_name = "API token"
