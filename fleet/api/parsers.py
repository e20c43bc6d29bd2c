"""Bodies, bounded: what is parsed is held in memory whole. And only with texts that every database can keep."""

from typing import Any

from rest_framework.parsers import BaseParser, JSONParser

from device_sdk.protocol import fields, limits
from fleet.errors import TooLarge


class BoundedJSON(JSONParser):
    """A JSON object of at most `limit` bytes. The settings make it the only parser: no view here reads forms."""

    limit = limits.MIB

    def parse(self, stream: Any, media_type: Any = None, parser_context: Any = None) -> Any:
        body = stream.read(self.limit + 1)
        if len(body) > self.limit:
            raise TooLarge("too_large", f"body: expected at most {self.limit} bytes")
        return fields.parse_object(body, limit=self.limit, what="body")


class ReleaseJSON(BoundedJSON):
    """What CI publishes: a role and manifests, escaped."""

    limit = limits.METADATA * 2 + limits.VARIANTS_PER_RELEASE * limits.MANIFEST


class AnyBytes(BaseParser):
    """A body of any kind that is read as a stream and never parsed."""

    media_type = "*/*"
