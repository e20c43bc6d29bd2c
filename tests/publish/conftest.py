"""Fixtures of this folder."""

from tests.registry import own_folder, registry  # noqa: F401
