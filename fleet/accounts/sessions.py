"""Sessions in the database under a digest of their key: the cookie's value is stored nowhere on the server."""

from hashlib import blake2b
from typing import Any

from django.contrib.sessions.backends.db import SessionStore as DatabaseSessions
from django.contrib.sessions.base_session import AbstractBaseSession
from django.utils import timezone


def stored(session_key: str) -> str:
    """As long as Django's column: 40 characters."""
    return blake2b(session_key.encode(), digest_size=20, person=b"fleet.session").hexdigest()


class SessionStore(DatabaseSessions):
    def _get_session_from_db(self) -> Any:
        try:
            rows = self.model.objects.filter(expire_date__gt=timezone.now())
            return rows.get(session_key=stored(self.session_key or ""))
        except self.model.DoesNotExist:
            self._session_key = None
            return None

    def exists(self, session_key: str) -> bool:
        return super().exists(stored(session_key))

    def create_model_instance(self, data: dict[str, Any]) -> AbstractBaseSession:
        row = super().create_model_instance(data)
        row.session_key = stored(row.session_key)
        return row

    def delete(self, session_key: str | None = None) -> None:
        key = session_key or self.session_key
        if key is not None:
            super().delete(stored(key))
