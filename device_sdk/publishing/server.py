"""The server's CI API, as a runner calls it: every request may be repeated, and is where that may help."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import requests

from device_sdk.errors import TransferError, is_retryable
from device_sdk.publishing.console import Report
from device_sdk.publishing.variants import LocalFile

CHUNK = 8 * 1024 * 1024  # bytes in one PUT; what a broken line costs at most
TRIES = 6
BACKOFF = 0.5  # seconds before the second try; doubles
TIMEOUT = (10.0, 300.0)  # seconds to connect, and without a byte


class Server:
    """The CI API. Every request may be repeated: the server knows what it has."""

    def __init__(self, address: str, token: str, *, pause: Callable[[float], None] = time.sleep) -> None:
        self._address = address.rstrip("/") + "/api/ci/v1"
        self._pause = pause
        self._session = requests.Session()
        self._session.auth = _Bearer(token)  # as `auth`: a header would give way to ~/.netrc

    def role(self, model: str) -> bytes | None:
        """The newest role; None: sign version 1."""
        answer = self._call("GET", f"/models/{model}/role", allowed={"no_role_yet"})
        return None if answer.status_code == 404 else answer.content

    def release(self, model: str, version: str) -> dict[str, Any] | None:
        answer = self._call("GET", f"/models/{model}/releases/{version}", allowed={"unknown_release"})
        return None if answer.status_code == 404 else _object(answer)

    def publish(self, model: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return _object(self._call("POST", f"/models/{model}/releases", body=json.dumps(body).encode()))

    def proposal(self, model: str) -> dict[str, Any] | None:
        """The role that waits for signatures, or None."""
        answer = self._call("GET", f"/models/{model}/role/pending", allowed={"no_pending_role"})
        return None if answer.status_code == 404 else _object(answer)

    def add_signatures(self, model: str, role: str) -> dict[str, Any]:
        return _object(self._call("POST", f"/models/{model}/role/pending", body=json.dumps({"role": role}).encode()))

    def update_role(self, model: str, role: str) -> dict[str, Any]:
        return _object(self._call("POST", f"/models/{model}/role", body=json.dumps({"role": role}).encode()))

    def upload(self, file: LocalFile, report: Report) -> None:
        """Go on where the server stands; a file that it has costs one request."""
        where = f"/blobs/{file.entry.sha256}"
        answer = self._call("HEAD", where)
        with file.path.open("rb") as stream:
            while answer.headers.get("Upload-Complete") != "?1":
                offset = _offset(answer)
                report(offset)
                stream.seek(offset)
                headers = {"Upload-Offset": str(offset), "Upload-Length": str(file.entry.length)}
                answer = self._put(where, stream.read(CHUNK), headers)
        report(file.entry.length)

    def _put(self, where: str, chunk: bytes, headers: Mapping[str, str]) -> requests.Response:
        for attempt in range(TRIES * 2):
            answer = self._call("PUT", where, body=chunk, headers=headers, allowed={"wrong_offset", "upload_busy"})
            if answer.status_code != 409 or "Upload-Offset" in answer.headers:
                return answer
            self._pause(min(BACKOFF * 2**attempt, 10.0))  # another runner uploads the same file
        raise _error(answer)

    def _call(
        self,
        method: str,
        where: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        allowed: frozenset[str] | set[str] = frozenset(),
    ) -> requests.Response:
        """Ask, again where that may help. Raises TransferError, but for refusals whose code is `allowed`."""
        for attempt in range(TRIES):
            try:
                answer = self._send(method, where, body, headers)
                if answer.status_code < 300 or _refusal(answer)[0] in allowed:
                    return answer
                raise _error(answer)
            except TransferError as error:
                if not is_retryable(error) or attempt == TRIES - 1:
                    raise
                self._pause(error.retry_after or min(BACKOFF * 2**attempt, 30.0))
        raise AssertionError("unreachable")

    def _send(
        self, method: str, where: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> requests.Response:
        kind = "application/octet-stream" if method == "PUT" else "application/json"
        try:
            return self._session.request(
                method,
                self._address + where,
                data=body,
                headers={"Content-Type": kind, "Accept": "application/json", **(headers or {})},
                timeout=TIMEOUT,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise TransferError(f"{self._address}: {error}") from error


class _Bearer(requests.auth.AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _offset(answer: requests.Response) -> int:
    value = answer.headers.get("Upload-Offset", "")
    if not value.isascii() or not value.isdigit():
        raise TransferError(f"{answer.url}: expected Upload-Offset; got {value!r:.40}", status=answer.status_code)
    return int(value)


def _object(answer: requests.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError as error:
        raise TransferError(f"{answer.url}: expected JSON", status=answer.status_code) from error
    if not isinstance(value, dict):
        raise TransferError(f"{answer.url}: expected a JSON object", status=answer.status_code)
    return value


def _refusal(answer: requests.Response) -> tuple[str, str]:
    """Code and message of a refusal; a proxy's page has neither."""
    try:
        body = answer.json()
        return str(body["code"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        return f"http_{answer.status_code}", answer.reason or "no reason given"


def _error(answer: requests.Response) -> TransferError:
    code, message = _refusal(answer)
    wait = answer.headers.get("Retry-After", "")
    return TransferError(
        f"{answer.request.method} {answer.url}: {answer.status_code} {message}",
        code=code,
        status=answer.status_code,
        retry_after=min(float(wait), 120.0) if wait.isascii() and wait.isdigit() else None,
    )
