"""The SDK's TUF client in the protocol of the tuf-conformance suite: `init`, `refresh`, `download`; exit 0 or 1.

What a device does goes for the suite too: `trust.tuf_client` (the pinned root, caps, reference time, named refusals),
`trust.Fetcher` over the SDK's `Transport` (pinned host, bounded bytes and time), and the floor of versions. Not here,
because the suite has none of it: the binding to a device, the director's agreement with CI, and the bundle, whose
place is taken by one request for each file. The suite looks into ngclient's folder, so it is not a scratch one.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.ngclient import TargetFile, Updater

from device_sdk.config import write_durably
from device_sdk.errors import DeviceError, TransferError, UntrustedError
from device_sdk.transport import Transport
from device_sdk.trust import Fetcher, Floor, seen_by, tuf_client

DEADLINE = 30.0


class Repository:
    """What a repository serves, over the SDK's transport; only its host is pinned."""

    def __init__(self, url: str) -> None:
        self._base = url.rstrip("/") + "/"
        parts = urlsplit(url)
        self._transport = Transport(f"{parts.scheme}://{parts.netloc}", [], "")

    def metadata(self, name: str, limit: int) -> bytes | None:
        return self.read(quote(name, ""), limit)

    def read(self, path: str, limit: int) -> bytes | None:
        try:
            return self._transport.request("GET", self._base + path, limit=limit, deadline=DEADLINE).body
        except TransferError as error:
            if error.status in {403, 404}:
                return None
            raise


class Client:
    """A folder as the suite wants it: ngclient's files at its top, what is ours beside them and not by `.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pinned = folder / "pinned" / "root"
        self._floor = folder / "pinned" / "floor"

    def init(self, root: bytes) -> None:
        self._pinned.parent.mkdir()
        write_durably(self._pinned, root)
        write_durably(self._folder / "root.json", root)

    def refresh(self, repository: Repository) -> None:
        with self._refreshed(repository):
            pass

    def download(self, repository: Repository, wanted: Sequence[str], targets: "Targets") -> None:
        with self._refreshed(repository) as updater:
            for name in wanted:
                targets.bring(name, updater)

    @contextmanager
    def _refreshed(self, repository: Repository) -> Iterator[Updater]:
        floor = self._read_floor()
        reference = max(time.time(), floor.clock)
        fetcher = Fetcher(repository.metadata, device=None)
        with tuf_client(self._folder, fetcher, self._pinned.read_bytes(), reference) as updater:
            updater.refresh()
            seen = seen_by(updater)
            floor.check(seen)
            write_durably(self._floor, json.dumps(replace(seen, clock=floor.clock).to_json()).encode())
            yield updater

    def _read_floor(self) -> Floor:
        return Floor.parse(json.loads(self._floor.read_bytes())) if self._floor.exists() else Floor()


class Targets:
    """Files by the names that TUF gives them, whole and verified. A device's only targets are manifests, in bundles."""

    def __init__(self, folder: Path, repository: Repository) -> None:
        self._folder = folder
        self._repository = repository

    def bring(self, name: str, updater: Updater) -> None:
        entry = updater.get_targetinfo(name)
        if entry is None:
            raise UntrustedError(f"{name} is not listed", code="unlisted_release")
        place = self._folder / quote(name, "")
        if place.exists() and _fits(place.read_bytes(), entry):
            return
        data = self._repository.read(_address(entry), entry.length)
        if data is None or not _fits(data, entry):
            raise UntrustedError(f"{name} is not what was signed", code="hash_mismatch")
        write_durably(place, data)


def _address(entry: TargetFile) -> str:
    """By consistent snapshots, which our repositories and all of the suite's have."""
    folder, slash, name = entry.path.rpartition("/")
    return f"{folder}{slash}{next(iter(entry.hashes.values()))}.{name}"


def _fits(data: bytes, entry: TargetFile) -> bool:
    try:
        entry.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    return parser.parse_args(argv)


def _run(given: argparse.Namespace) -> None:
    client = Client(given.metadata_dir)
    if given.command == "init":
        client.init(given.root.read_bytes())
    elif given.command == "refresh":
        client.refresh(Repository(given.metadata_url))
    else:
        targets = Targets(given.target_dir, Repository(given.target_base_url))
        client.download(Repository(given.metadata_url), given.target_name, targets)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        _run(_arguments(argv))
    except DeviceError as error:
        print(f"{error.code}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
