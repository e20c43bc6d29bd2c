"""Make a provisioned directory a device of the fleet."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from device_sdk import __version__, abilities
from device_sdk.config import Home, Identity, Provision, setup_errors, write_durably
from device_sdk.errors import SetupError, TransferError, is_retryable
from device_sdk.protocol import fields, limits
from device_sdk.protocol.errors import ProtocolError
from device_sdk.protocol.names import check_name
from device_sdk.protocol.polls import ENROL, EnrolRequest, check_labels
from device_sdk.transport import Transport
from device_sdk.updater import backoff

log = logging.getLogger("device_sdk")

_DEADLINE = 30.0


def enrol(
    path: str | os.PathLike[str],
    name: str,
    labels: Mapping[str, str] | None = None,
    *,
    transport: Any = None,
    patience: float = 0.0,
    wait: Callable[[float], object] = time.sleep,
) -> str:
    """Make a provisioned directory a device of the fleet. Returns "active", or "pending" until someone approves.

    Safe to repeat: the nonce is on disk before the first request, and the server answers the same to the same nonce.
    A server that asks to come back later (429, 503 with Retry-After) is asked again for up to `patience` seconds.
    Raises SetupError, and TransferError with the server's code (`device_exists`, `enrolment_expired`, ...).
    """
    home = Home(Path(path))
    with setup_errors():
        provision = home.provision()
        identity = _identity(home, check_name(name, "device"))
        said = check_labels(dict(labels or {}))
        request = EnrolRequest(identity.device, identity.nonce, said, __version__, abilities.detect())
    home.make()
    write_durably(home.identity_file, identity.to_bytes())
    client = transport or Transport(provision.server, provision.blob_hosts, provision.token)
    body = fields.canonical(request.to_json())
    return _keep_identity(home, provision, identity, _ask_in(client, identity.device, body, patience, wait))


def _ask_in(client: Any, device: str, body: bytes, patience: float, wait: Callable[[float], object]) -> bytes:
    """Ask until the answer is not "later", or patience runs out. Never sooner than the server says."""
    failures = 0
    while True:
        try:
            headers = {"Content-Type": "application/json"}
            answer = client.request(
                "POST", ENROL, headers=headers, body=body, limit=64 * limits.KIB, deadline=_DEADLINE
            )
        except TransferError as error:
            if error.retry_after is None or not is_retryable(error):
                raise
            failures += 1
            delay = backoff(device, failures, first=1.0, retry_after=error.retry_after)
            if delay > patience:
                raise
            log.warning("the server asks to come back later (%s): waiting %.0f s", error.code or error.status, delay)
            patience -= delay
            wait(delay)
        else:
            return bytes(answer.body)


def _identity(home: Home, name: str) -> Identity:
    """The identity of an earlier try, else a new one. A directory is one device for ever."""
    if not home.identity_file.exists():
        return Identity(device=name, nonce=token_hex(16))
    identity = home.identity()
    if identity.device != name:
        raise SetupError(f"{home.path} is enrolled as {identity.device!r}; a device has a directory of its own")
    return identity


def _keep_identity(home: Home, provision: Provision, identity: Identity, body: bytes) -> str:
    try:
        answer = fields.parse_object(body, limit=64 * limits.KIB, what="enrolment")
        device = check_name(answer.get("device"), "device")
        credential = fields.take_text(answer, "credential", limit=300)
        models = fields.take_list(answer, "models", limit=limits.MODELS_PER_DEVICE)
        state = fields.take_text(answer, "state", limit=32)
    except ProtocolError as error:
        raise TransferError(f"enrolment: {error}", code="bad_answer") from error
    if differing := {str(model) for model in models} ^ set(provision.models):
        log.warning("the server and the provisioning file differ about models: %s", ", ".join(sorted(differing)))
    write_durably(home.identity_file, Identity(device, identity.nonce, credential).to_bytes())
    return state
