"""One model and one device for all rows that leave both as they were; a row that cannot makes its own."""

import os
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.attacks.world")

from tests.attacks import ATTACKED  # noqa: E402
from tests.attacks.world import Device, Shop, device_of  # noqa: E402
from tests.live import LiveServer  # noqa: E402


@pytest.fixture(scope="session")
def shop(embedded: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def shared_device(shop: Shop) -> Iterator[Device]:
    with device_of(shop) as device:
        yield device


@pytest.fixture
def device(shop: Shop, request: pytest.FixtureRequest) -> Iterator[Device]:
    """A running device that is behind an honest proxy, as yet. One whose code was tampered with is nobody else's."""
    if ATTACKED in os.environ:
        with device_of(shop) as own:
            yield own
        return
    shared: Device = request.getfixturevalue("shared_device")
    shared.settles()
    yield shared
    shared.relieve()
