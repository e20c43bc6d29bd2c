"""Who fails too often waits, and is told how long; who succeeds is never counted."""

from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from fleet.accounts import limits
from fleet.devices.models import Device
from fleet.errors import TooMany
from tests.fleet_world import api_token, enrolment_token, operator, refusal, user

PASSWORD = "correct horse battery"


def log_in(name: str = "ann", password: str = "wrong", address: str = "192.0.2.1") -> Any:
    return Client().post("/admin/login/", {"username": name, "password": password}, REMOTE_ADDR=address)


def enrol(token: str, name: str = "new", address: str = "192.0.2.1") -> Any:
    body = {"device": name, "nonce": f"{abs(hash(name)):032x}"[:32], "labels": {}, "sdk": "1"}
    headers = {"Authorization": f"Bearer {token}"}
    return Client().post(
        "/api/device/v1/enrol", body, content_type="application/json", headers=headers, REMOTE_ADDR=address
    )


@pytest.fixture
def ann(db: None) -> User:
    person = user("ann")
    person.is_staff = True
    person.save()
    return person


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Move the clock of the limits."""
    import time

    real = time.time

    def move(seconds: float) -> None:
        monkeypatch.setattr("limits.storage.memory.time.time", lambda: real() + seconds)

    return move


# --- log-in ------------------------------------------------------------------------------------------------------


def test_after_five_failures_even_the_right_password_waits_and_is_told_how_long(ann: User) -> None:
    assert [log_in().status_code for _ in range(5)] == [200] * 5
    answer = log_in(password=PASSWORD)
    assert answer.status_code == 429
    assert 0 < int(answer["Retry-After"]) <= 300
    assert "Too many failed attempts. Try again in 5 minutes." in answer.content.decode()
    assert "_auth_user_id" not in answer.client.session


def test_the_lock_out_is_that_users_at_that_address(ann: User) -> None:
    for _ in range(6):
        log_in()
    assert log_in(password=PASSWORD, address="192.0.2.2").status_code == 302
    user("bob")
    assert log_in("bob").status_code == 200
    assert log_in(" ANN ", password=PASSWORD).status_code == 429  # another spelling is the same name


def test_a_lock_out_ends(ann: User, later: Any) -> None:
    for _ in range(6):
        log_in()
    later(301)
    assert log_in(password=PASSWORD).status_code == 302


def test_a_success_forgives_what_was_before(ann: User) -> None:
    for _ in range(3):
        assert [log_in().status_code for _ in range(4)] == [200] * 4
        assert log_in(password=PASSWORD).status_code == 302


def test_one_address_cannot_try_one_password_on_everybody(ann: User) -> None:
    assert {log_in(f"user-{number}").status_code for number in range(50)} == {200}
    assert log_in("user-51").status_code == 429
    assert log_in(password=PASSWORD).status_code == 429
    assert log_in(password=PASSWORD, address="192.0.2.2").status_code == 302


def test_many_addresses_cannot_try_one_users_passwords(ann: User, settings: Any) -> None:
    settings.LIMIT_LOGIN_USER = "20/1 hour"
    assert {log_in(address=f"192.0.2.{number}").status_code for number in range(20)} == {200}
    assert log_in(address="198.51.100.1").status_code == 429


def test_a_name_that_nobody_has_is_locked_out_alike(db: None) -> None:
    assert [log_in("nobody").status_code for _ in range(6)] == [200] * 5 + [429]


def test_an_empty_setting_is_no_limit(ann: User, settings: Any) -> None:
    settings.LIMIT_LOGIN = ""
    assert [log_in().status_code for _ in range(8)] == [200] * 8


# --- enrolment ---------------------------------------------------------------------------------------------------


def test_any_number_of_devices_enrols_by_one_token_from_one_address(db: None) -> None:
    _, secret = enrolment_token(max_uses=150)
    assert {enrol(secret, f"cam-{number}").status_code for number in range(150)} == {201}
    assert Device.objects.count() == 150


def test_guessing_tokens_ends_and_says_when_to_come_back(db: None) -> None:
    _, secret = enrolment_token()
    assert {enrol(f"fle_guess{number}").status_code for number in range(30)} == {401}
    answer = enrol("fle_guess31")
    assert refusal(answer) == (429, "too_many_failures")
    assert 0 < int(answer["Retry-After"]) <= 600
    assert enrol(secret).status_code == 429  # a guess that would have hit is not looked at
    assert enrol(secret, address="192.0.2.2").status_code == 201


def test_one_device_with_an_old_token_does_not_shut_its_site_out(db: None) -> None:
    _, secret = enrolment_token()
    assert {enrol("fle_old").status_code for _ in range(60)} == {401}
    assert enrol(secret).status_code == 201


def test_a_spent_token_is_refused_ever_more_cheaply(db: None, settings: Any) -> None:
    settings.LIMIT_ENROL_TOKEN = "10/1 minute"
    _, secret = enrolment_token(max_uses=1)
    assert enrol(secret, "cam-1").status_code == 201
    assert {enrol(secret, f"cam-{n}", f"192.0.2.{n}").status_code for n in range(2, 12)} == {401}
    assert enrol(secret, "cam-99").status_code == 429
    _, other = enrolment_token()
    assert enrol(other, "cam-99").status_code == 201


# --- API tokens --------------------------------------------------------------------------------------------------


def test_wrong_api_tokens_are_counted_and_right_ones_are_not(db: None) -> None:
    right = api_token(operator(), "read")

    def call(token: str, address: str = "192.0.2.1") -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        return Client().get("/api/v1/devices/", headers=headers, REMOTE_ADDR=address)

    assert {call(right).status_code for _ in range(40)} == {200}
    assert {call("flt_old").status_code for _ in range(40)} == {403}
    assert {call(f"flt_{number}").status_code for number in range(29)} == {403}
    answer = call("flt_one_more")
    assert refusal(answer) == (429, "too_many_failures")
    assert int(answer["Retry-After"]) > 0
    assert call(right, "192.0.2.2").status_code == 200


# --- where it is counted -----------------------------------------------------------------------------------------


@pytest.fixture
def shared(redis_server: Any, settings: Any) -> Any:
    """Limiters as of several processes, over one Redis."""
    settings.REDIS_URL = redis_server.url
    kept = limits._made
    kept.cache_clear()
    limits.forget_all()
    yield kept.__wrapped__
    kept.cache_clear()


def test_processes_share_a_limit_over_redis(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [shared() for _ in range(4)]
    refused = []
    for number in range(8):
        monkeypatch.setattr(limits, "_limiter", lambda number=number: processes[number % 4])
        try:
            limits.claim(limits.LOGIN, "ann", "192.0.2.1")
        except TooMany:
            refused.append(number)
    assert refused == [5, 6, 7]


def test_tries_at_the_same_time_share_the_limit(shared: Any) -> None:
    def attempt(_: int) -> bool:
        try:
            limits.claim(limits.LOGIN, "ann", "192.0.2.1")
        except TooMany:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(attempt, range(64))) == 5


def test_the_first_requests_of_a_process_may_come_at_the_same_time(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread made a limiter of its own, and all but one met a half-imported client: error 500."""
    made, storage = [], shared().storage

    def slowly(*_: Any, **__: Any) -> Any:
        made.append(1)
        sleep(0.05)
        return storage

    monkeypatch.setattr(limits, "storage_from_string", slowly)
    limits._made.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert len({id(limiter) for limiter in pool.map(lambda _: limits._limiter(), range(8))}) == 1
    assert made == [1]


def test_without_redis_nothing_is_locked_and_the_log_says_so(
    settings: Any, caplog: pytest.LogCaptureFixture, ann: User
) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    limits._made.cache_clear()
    try:
        assert log_in(password=PASSWORD).status_code == 302
    finally:
        limits._made.cache_clear()
    assert "limits_unavailable" in caplog.text


@pytest.mark.parametrize(("text", "good"), [("5/5 minutes", True), ("", True), ("often", False), ("5", False)])
def test_a_malformed_limit_is_found_by_the_check(settings: Any, text: str, good: bool) -> None:
    from fleet.operations.checks import rates

    settings.LIMIT_LOGIN = text
    assert [finding.id for finding in rates()] == ([] if good else ["fleet.E016"])
