"""Give data sets to people: as a folder that pyarrow, pandas and DuckDB read, or as one zip. See `datasets` for how."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path, PurePosixPath

from fleet.feedback.models import DATASETS, DatasetPart
from fleet.releases import storage

CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Summary:
    """What an export gave. `skipped` files were there already."""

    files: int
    skipped: int
    rows: int
    length: int


def export(parts: Iterable[DatasetPart], folder: Path, *, on_progress: Callable[[int], None]) -> Summary:
    """Copy parts to `folder` in hive layout. Parts never change, so what is there already is not fetched again."""
    files = skipped = rows = length = 0
    for part in parts:
        target = folder / inner_path(part)
        if target.exists() and target.stat().st_size == part.length:
            skipped += 1
            on_progress(part.length)
        else:
            _copy(part, target, on_progress)
        files, rows, length = files + 1, rows + part.rows, length + part.length
    return Summary(files, skipped, rows, length)


def export_zip(parts: Iterable[DatasetPart]) -> Iterator[bytes]:
    """The same as a zip, piece by piece, for a streaming response: neither memory nor disk holds it whole."""
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:  # Parquet is compressed already
        for part in parts:
            with archive.open(str(inner_path(part)), "w", force_zip64=True) as member:
                for chunk in _chunks(part):
                    member.write(chunk)
                    yield outlet.take()
            yield outlet.take()
    yield outlet.take()


def inner_path(part: DatasetPart) -> PurePosixPath:
    """`model=…/version=…/day=…/part-….parquet`"""
    return PurePosixPath(part.path).relative_to(DATASETS)


def _copy(part: DatasetPart, target: Path, on_progress: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")  # readers of a data set pass over dot files
    with temporary.open("wb") as file:
        for chunk in _chunks(part):
            file.write(chunk)
            on_progress(len(chunk))
    temporary.replace(target)


def _chunks(part: DatasetPart) -> Iterator[bytes]:
    with storage.open_object(part.path) as source:
        while chunk := source.read(CHUNK):
            yield chunk


class _Outlet(BufferedIOBase):
    """What ZipFile writes, until it is taken."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]  # zipfile hands over bytes
        self._pending += data
        return len(data)

    def take(self) -> bytes:
        data, self._pending = bytes(self._pending), bytearray()
        return data
