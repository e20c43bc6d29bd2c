"""Telling the world: written with the change, sent signed, tried again with the same id, given up in the open."""

import base64
import hmac
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from django.core import mail
from django.db import transaction
from django.test import Client
from django.utils import timezone

from fleet.audit.models import AuditEntry
from fleet.errors import Conflict, FleetError, Invalid, Unavailable
from fleet.notices import addresses, sealing, services, webhooks
from fleet.notices.models import Delivery, Notice, Subscription
from fleet.notices.webhooks import Message
from fleet.releases.models import Release
from fleet.rollouts import services as rollouts
from tests.fleet_world import AT_ONCE, api_token, operator, refusal, release, running, subscription, superuser

pytestmark = pytest.mark.django_db

State = Delivery.State


# --- the signature -----------------------------------------------------------------------------------------------


def test_the_signature_is_that_of_the_standards_own_vector() -> None:
    """The example that the libraries of standardwebhooks.com test themselves with."""
    message = Message("msg_p5jXN8AQM9LWM0D4loKWxJek", '{"test": 2432232314}')
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    assert webhooks.headers(message, secret, datetime.fromtimestamp(1614265330, UTC)) == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_secret_is_new_each_time_and_as_long_as_the_standard_asks() -> None:
    one, two = webhooks.new_secret(), webhooks.new_secret()
    assert one != two
    assert one.startswith("whsec_")
    assert 24 <= len(base64.b64decode(one.removeprefix("whsec_"))) <= 64


# --- a receiver ---------------------------------------------------------------------------------------------------


@dataclass
class Receiver:
    """Answers as it is told, and keeps what came."""

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drip: bool = False
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def keys(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]


@pytest.fixture
def receiver(settings: Any) -> Iterator[Receiver]:
    settings.WEBHOOK_PRIVATE = True
    told = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if told.drip:
                self.drip()
                return
            self.send_response(told.status)
            for name, value in told.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def drip(self) -> None:
            try:
                while True:
                    self.wfile.write(b"H")
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                return

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_port}/hook?of=fleet"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


def published(url: str, **data: Any) -> Delivery:
    row = subscription("ops", url)
    services.publish("rollout.halted", "Rollout #1 was halted", data)
    return row.deliveries.get()


def verified(secret: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """As a receiver checks it, written from the standard's text alone."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret[len("whsec_") :])
    expected = "v1," + base64.b64encode(hmac.new(key, signed, "sha256").digest()).decode()
    assert expected in headers["webhook-signature"].split(" ")
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 300
    return dict(json.loads(body))


def test_a_webhook_arrives_signed_and_once(receiver: Receiver) -> None:
    row, secret = services.subscribe(name="ops", kind="webhook", target=receiver.url, actor="ann")
    services.publish("rollout.halted", "Rollout #7 was halted", {"rollout": 7})
    assert services.sweep() == 1
    assert services.sweep() == 0
    ((headers, body),) = receiver.got
    said = verified(secret, headers, body)
    assert (said["type"], said["data"]["rollout"], headers["content-type"]) == ("rollout.halted", 7, "application/json")
    assert (row.deliveries.get().state, headers["webhook-id"]) == (State.SENT, Notice.objects.get().key)


def test_an_attempt_that_fails_is_made_again_later_with_the_same_id_until_it_is_given_up(receiver: Receiver) -> None:
    delivery = published(receiver.url)
    receiver.status = 503
    waits = []
    while (now := Delivery.objects.get()).state == State.PENDING:
        before = timezone.now()
        Delivery.objects.update(next_at=before)
        assert services.deliver(delivery.pk)
        waits.append(round((Delivery.objects.get().next_at - before).total_seconds()))
    assert waits == [*services.BACKOFF, 0]
    assert (now.state, now.error, now.tries) == (State.DEAD, "answered 503", 10)
    assert len(set(receiver.keys())) == 1
    receiver.status = 204
    services.send_again(delivery=now)
    assert services.sweep() == 1
    assert (Delivery.objects.get().state, len(set(receiver.keys()))) == (State.SENT, 1)
    assert AuditEntry.objects.filter(action="delivery.sent_again").count() == 1


def test_whoever_says_how_long_to_wait_is_heard_within_reason(receiver: Receiver) -> None:
    delivery = published(receiver.url)
    receiver.status, receiver.headers = 429, {"Retry-After": "600"}
    services.deliver(delivery.pk)
    wait = Delivery.objects.get().next_at - timezone.now()
    assert timedelta(seconds=590) < wait <= timedelta(seconds=600)
    receiver.headers = {"Retry-After": "99999999"}
    Delivery.objects.update(next_at=timezone.now())
    services.deliver(delivery.pk)
    assert Delivery.objects.get().next_at - timezone.now() <= timedelta(days=1)


def test_a_receiver_that_is_gone_is_not_asked_again(receiver: Receiver) -> None:
    delivery = published(receiver.url)
    receiver.status = 410
    services.deliver(delivery.pk)
    assert Delivery.objects.get().state == State.DEAD


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    delivery = published(receiver.url)
    receiver.status, receiver.headers = 307, {"Location": receiver.url}
    services.deliver(delivery.pk)
    assert (len(receiver.got), Delivery.objects.get().error) == (1, "answered 307 (redirects are not followed)")


def test_an_answer_that_never_ends_is_cut(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "ATTEMPT_SECONDS", 0.3)
    delivery = published(receiver.url)
    receiver.drip = True
    assert services.deliver(delivery.pk)
    assert (Delivery.objects.get().state, Delivery.objects.get().tries) == (State.PENDING, 1)
    assert Delivery.objects.get().error


def test_of_two_senders_one_sends(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = published(receiver.url)
    send = services._send

    def send_while_a_rival_tries(*arguments: Any) -> None:
        assert not services.deliver(delivery.pk)
        assert services.sweep() == 0
        send(*arguments)

    monkeypatch.setattr(services, "_send", send_while_a_rival_tries)
    assert services.deliver(delivery.pk)
    assert len(receiver.got) == 1


def test_a_sender_that_died_in_the_middle_is_followed_by_another_with_the_same_id(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = published(receiver.url)
    with monkeypatch.context() as patch:
        patch.setattr(services, "_send", dies)
        with pytest.raises(KeyboardInterrupt):
            services.deliver(delivery.pk)
    assert services.sweep() == 0  # its lease
    Delivery.objects.update(next_at=timezone.now())
    assert services.sweep() == 1
    assert (receiver.keys(), Delivery.objects.get().state) == ([Notice.objects.get().key], State.SENT)


def dies(*_: Any) -> None:
    raise KeyboardInterrupt


def test_what_a_clock_put_off_for_years_is_sent_when_it_is_right_again(receiver: Receiver) -> None:
    published(receiver.url)
    Delivery.objects.update(next_at=timezone.now() + timedelta(days=400))
    assert services.sweep() == 1
    assert len(receiver.got) == 1


# --- where it may go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.org/", "ftp://hooks.example.org/", "https://", "hooks.example.org", "https://h:99999/",
        "https://ann:secret@hooks.example.org/", "https://hooks.example.org/a b", "https://hooks.example.org/\nx", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(Invalid) as caught:
        services.subscribe(name="ops", kind="webhook", target=url.rstrip(" "), actor="ann")
    assert caught.value.code == "webhook_address"
    assert not Subscription.objects.exists()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe",
    ],
)  # fmt: skip
def test_nothing_is_sent_into_our_own_network(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not addresses.is_public(ipaddress.ip_address(address))
    assert addresses.is_public(ipaddress.ip_address("93.184.216.34"))
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (where, 443)) for where in ("93.184.216.34", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it connects"))
    delivery = published("https://hooks.example.org/")
    assert services.deliver(delivery.pk)
    assert "no public address" in Delivery.objects.get().error


def test_the_connection_goes_to_the_address_that_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers otherwise the second time (DNS rebinding) is not asked a second time."""
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers.pop())
    connected = []

    def refuse(where: tuple[str, int], **_: Any) -> None:
        connected.append(where)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    delivery = published("https://hooks.example.org/")
    assert services.deliver(delivery.pk)
    assert connected == [("93.184.216.34", 443)]


# --- the outbox ---------------------------------------------------------------------------------------------------


@transaction.atomic
def start_and_fail(target: Release) -> None:
    running(target)
    assert Notice.objects.exists()
    raise RuntimeError


def test_what_is_rolled_back_is_not_told() -> None:
    subscription()
    target = release()
    with pytest.raises(RuntimeError):
        start_and_fail(target)
    assert not Notice.objects.exists()


def test_a_rollout_tells_of_its_start_its_stage_its_halt_and_its_end() -> None:
    subscription()
    rollout = running(release())
    rollouts.pause(rollout=rollout, actor="ann", comment="lunch")
    rollouts.resume(rollout=rollout, actor="ann")
    rollouts.roll_back(rollout=rollout, actor="ann")
    told = [json.loads(body) for body in Notice.objects.order_by("pk").values_list("body", flat=True)]
    kinds = ["rollout.started", "rollout.paused", "rollout.resumed", "rollout.rolled_back"]
    assert [notice["type"] for notice in told] == kinds
    paused = told[1]["data"]
    assert (paused["rollout"], paused["state"], paused["comment"]) == (rollout.pk, "paused", "lunch")
    assert paused["url"].endswith(f"/admin/rollouts/rollout/{rollout.pk}/change/")


def test_each_is_told_what_it_asked_for_and_nothing_while_it_is_off() -> None:
    halts, everything, off = subscription("a", "https://a.example.org", "rollout.halted"), subscription("b"), None
    off = subscription("c")
    services.switch(subscription=off, active=False)
    running(release())
    assert [row.deliveries.count() for row in (halts, everything, off)] == [0, 1, 0]


def test_an_unknown_kind_is_refused_and_so_is_a_name_that_is_taken() -> None:
    subscription()
    with pytest.raises(Invalid) as caught:
        subscription("b", "https://b.example.org", "rollout.exploded")
    assert caught.value.code == "unknown_kind"
    with pytest.raises(Conflict):
        subscription()


def test_a_secret_in_the_database_is_sealed_and_useless_under_another_key(settings: Any) -> None:
    row, secret = services.subscribe(name="ops", kind="webhook", target="https://a.example.org", actor="ann")
    assert secret.removeprefix("whsec_") not in row.secret
    assert sealing.unseal(row.secret) == secret
    assert secret not in json.dumps(list(AuditEntry.objects.values("detail", "comment")))
    old, settings.SECRET_KEY = settings.SECRET_KEY, "another" * 10
    with pytest.raises(Unavailable):
        sealing.unseal(row.secret)
    settings.SECRET_KEY_FALLBACKS = [old]
    assert sealing.unseal(row.secret) == secret


def test_old_notices_are_forgotten_but_what_is_to_be_sent_stays() -> None:
    done, waiting = published("https://a.example.org"), None
    done.state = State.SENT
    done.save()
    services.publish("rollout.started", "later", {})
    Notice.objects.update(at=timezone.now() - timedelta(days=100))
    services.retire()
    waiting = Delivery.objects.get()
    assert (waiting.notice.title, waiting.state) == ("later", State.PENDING)


# --- e-mail -------------------------------------------------------------------------------------------------------


def test_an_e_mail_says_what_happened_and_where_to_look(settings: Any) -> None:
    settings.EMAIL_HOST = "mail.example.org"
    services.subscribe(name="staff", kind="email", target="ann@example.org, bob@example.org", actor="ann")
    rollout = rollouts.create(release=release(), group=None, stages=AT_ONCE, actor="ann")
    rollouts.start(rollout=rollout, actor="ann", comment="two\nlines")
    assert services.sweep() == 1
    (letter,) = mail.outbox
    assert letter.to == ["ann@example.org", "bob@example.org"]
    assert letter.subject == f"[Fleet] Rollout #{rollout.pk} digits 1.0.0 has started: two lines"
    assert f"/admin/rollouts/rollout/{rollout.pk}/change/" in letter.body
    assert letter.extra_headers["Message-ID"].startswith(f"<{Notice.objects.get().key}@")


def test_without_a_mail_server_nobody_subscribes_by_e_mail_and_nothing_counts_as_sent(
    settings: Any,
) -> None:
    settings.EMAIL_HOST = ""
    with pytest.raises(Unavailable):
        services.subscribe(name="staff", kind="email", target="ann@example.org", actor="ann")
    settings.EMAIL_HOST = "mail.example.org"
    services.subscribe(name="staff", kind="email", target="ann@example.org", actor="ann")
    running(release())
    settings.EMAIL_HOST = ""
    services.sweep()
    assert (Delivery.objects.get().state, mail.outbox) == (State.PENDING, [])
    assert "FLEET_EMAIL_HOST" in Delivery.objects.get().error


@pytest.mark.parametrize("target", ["", "nobody", "ann@example.org, nobody", "a@b.org\nBcc: c@d.org"])
def test_an_e_mail_address_that_is_none_is_refused(target: str, settings: Any) -> None:
    settings.EMAIL_HOST = "mail.example.org"
    with pytest.raises(FleetError):
        services.subscribe(name="staff", kind="email", target=target, actor="ann")


# --- doors --------------------------------------------------------------------------------------------------------


def test_a_script_subscribes_and_sees_the_secret_once() -> None:
    owner = Client(headers={"Authorization": f"Bearer {api_token(superuser(), 'operate')}"})
    body = {"name": "ops", "kind": "webhook", "target": "https://a.example.org", "events": ["rollout.halted"]}
    made = owner.post("/api/v1/subscriptions/", body, content_type="application/json")
    assert (made.status_code, made.json()["secret"][:6]) == (201, "whsec_")
    listed = owner.get("/api/v1/subscriptions/").json()["results"][0]
    assert "secret" not in listed
    assert listed["events"] == ["rollout.halted"]
    again = owner.post("/api/v1/subscriptions/", body, content_type="application/json")
    assert refusal(again) == (409, "subscription_exists")
    assert owner.post(f"/api/v1/subscriptions/{listed['id']}/test/").status_code == 204
    (delivery,) = owner.get("/api/v1/deliveries/?subscription=ops").json()["results"]
    assert (delivery["kind"], delivery["state"]) == ("test", "pending")
    assert refusal(owner.post(f"/api/v1/deliveries/{delivery['id']}/send_again/")) == (409, "wrong_state")


def test_an_operator_sees_what_did_not_arrive_and_sends_it_again_but_subscribes_nobody() -> None:
    delivery = published("https://a.example.org")
    Delivery.objects.update(state=State.DEAD)
    otto = operator()
    otto.is_staff = True
    otto.save()
    client = Client()
    client.force_login(otto)
    assert client.get("/admin/notices/delivery/").status_code == 200
    page = client.get(f"/admin/notices/delivery/{delivery.pk}/change/")
    assert "Send again" in page.content.decode()
    client.post(f"/admin/notices/delivery/{delivery.pk}/send_again/", {"_form_submitted": "True", "comment": ""})
    assert Delivery.objects.get().state == State.PENDING
    assert client.get("/admin/notices/subscription/add/").status_code == 403


def test_a_person_subscribes_in_the_admin_and_is_shown_the_secret_once() -> None:
    client = Client()
    client.force_login(superuser())
    form = {"name": "ops", "kind": "webhook", "target": "https://a.example.org/x", "events": ["rollout.completed"]}
    shown = client.post("/admin/notices/subscription/add/", form)
    row = Subscription.objects.get()
    assert sealing.unseal(row.secret) in shown.content.decode().replace("&#x2B;", "+").replace("&#x3D;", "=")
    page = f"/admin/notices/subscription/{row.pk}"
    assert "whsec_" not in client.get(f"{page}/change/").content.decode()
    before = row.secret
    assert client.get(f"{page}/renew/").status_code == 200
    row.refresh_from_db()
    assert row.secret == before  # a link alone changes nothing
    assert "whsec_" in client.post(f"{page}/renew/").content.decode()
    client.post(f"{page}/switch/", {"_form_submitted": "True", "comment": "quiet"})
    row.refresh_from_db()
    assert (row.secret == before, row.active) == (False, False)
    refused = client.post(
        "/admin/notices/subscription/add/", {**form, "name": "b", "target": "http://b.example.org"}, follow=True
    )
    assert "expected https" in str([*refused.context["messages"]][-1])
