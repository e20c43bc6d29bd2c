"""The fault table before the shared server: see tests/survival/faults.py, and `make drill`, which prints it."""

import shutil

import pytest

from tests.attacks.world import Shop
from tests.survival import faults, killed
from tests.survival.faults import AFTER, BEFORE, DAY, FAULTS, WRONG_BYTE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
EVERY = 9  # of the doings before which a device is killed: the drill tries all, with rehearsals


@pytest.fixture(scope="module")
def shop(embedded, tmp_path_factory):
    return Shop(embedded, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def standing(shop):
    return faults.prepare(shop)


@pytest.fixture
def device(shop, standing, tmp_path):
    with faults.device_like(standing, tmp_path / "home", shop) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_whole_release_answers_while_the_fault_lasts_and_the_new_one_comes_after(device, fault):
    found = faults.befall(device, fault)
    assert found.breaks(fault) == []


def test_a_month_without_a_server_fills_no_disk_and_survives_restarts(device):
    faults.gone(device.line)
    before = device.kept()
    for day in range(30):
        for _ in range(8):
            device.try_once()
            device.skipped += DAY / 8
        if day % 7 == 3:
            device.fleet.stop()
            device.open()
        assert device.answer() == BEFORE
    told = device.fleet.status().events_waiting
    assert 200 < told <= 8 * 30 + 10  # a view that has expired is told once an hour at most
    assert device.kept() - before < 400 * told


def test_one_wrong_byte_is_refused_by_name_and_the_old_release_stays(embedded, tmp_path):
    assert faults.wrong_byte(Shop(embedded, tmp_path)) == WRONG_BYTE


def test_a_device_killed_in_an_update_goes_on_where_it_stood(shop, standing, tmp_path):
    """Row 35 of the attack table kills a small update everywhere; this one has a download to resume."""
    home = tmp_path / "killed"
    shutil.copytree(standing, home)
    found = [each for each in killed.rounds(home, shop.model, step=EVERY) if "point" in each]
    assert {killed.judge(each, old=BEFORE, new=AFTER) for each in found} == {"old release", "new release"}
    assert len(found) > 60 / EVERY
