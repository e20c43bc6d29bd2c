"""Fixtures of this folder."""

from tests.registry import own_folder, registry  # noqa: F401
from tests.server.batch_world import feedback_world, local_objects  # noqa: F401
