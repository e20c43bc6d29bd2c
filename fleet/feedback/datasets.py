"""Turn samples into Parquet parts. No database: callers pass samples and get tables, names and bytes.

One part holds the samples of one model, version, day (UTC) and *signature*: the names and dtypes of the tensors. So a
part has one plain schema without nulls, however the releases of a model differ, and a device that sends odd tensors
spoils no file but its own.

Columns: `sample_id`, `device`, `release` (`model/version/variant`), `variant`, `at` (UTC), `probability` of having been
kept (weigh by its inverse), and for each tensor `input.<name>` or `output.<name>`, flat in C order, with its shape in
`input.<name>.shape`. `model`, `version` and `day` are in the path, and nowhere else: pyarrow and pandas refuse a
directory whose files repeat the columns of its path. An export reads as

    table = pyarrow.dataset.dataset(folder, partitioning="hive").to_table()
    frame = pandas.read_parquet(folder)                                         # the same by pandas
    images = numpy.stack(table["input.image"].to_numpy()).reshape(-1, 8, 8)

Where releases have different tensors, say which columns you mean, or read one `version=` folder at a time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from hashlib import sha256
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from device_sdk.protocol.arrays.npy import Array
from fleet.errors import Invalid
from fleet.feedback.models import DATASETS
from fleet.feedback.parsing import Sample

PARTS_PER_BATCH = 400  # days x versions x signatures: a year of an idle device, but not a file for each sample
_DAYS = (date(1970, 1, 1), date(2100, 1, 1))

Signature = tuple[tuple[str, str], ...]  # of (column, dtype)


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What goes into one part."""

    model: str
    version: str
    day: date
    signature: Signature

    @property
    def folder(self) -> str:
        return f"{DATASETS}/model={self.model}/version={self.version}/day={self.day:%Y-%m-%d}"


@dataclass(frozen=True, slots=True)
class Row:
    """A sample and where it comes from."""

    batch: str
    device: str
    sample: Sample


@dataclass(slots=True)
class Part:
    """The rows of a cell. A sample that comes twice, in two batches, counts once; both batches are in."""

    cell: Cell
    rows: dict[str, Row] = field(default_factory=dict)
    batches: set[str] = field(default_factory=set)

    def add(self, row: Row) -> None:
        self.batches.add(row.batch)
        self.rows.setdefault(row.sample.entry.id, row)

    @property
    def path(self) -> str:
        """Made of the batches alone: the same work done again, after a crash, replaces what the first one left."""
        content = "\n".join([*sorted(self.batches), *map(str, self.cell.signature)])
        return f"{self.cell.folder}/part-{sha256(content.encode()).hexdigest()[:32]}.parquet"

    def table(self) -> pa.Table:
        rows = sorted(self.rows.values(), key=lambda row: (row.sample.entry.at, row.sample.entry.id))
        columns = _plain_columns(rows)
        for column, _ in self.cell.signature:
            columns |= _tensor_columns(column, [_tensors(row.sample)[column] for row in rows])
        return pa.table(columns)

    def write(self, file: IO[bytes]) -> int:
        """Write the Parquet file; return the number of rows."""
        table = self.table()
        pq.write_table(table, file, compression="zstd", use_dictionary=["device", "release", "variant"])
        return int(table.num_rows)


def split(batch: str, device: str, samples: Iterable[Sample]) -> dict[Cell, list[Row]]:
    """Sort a batch's samples into cells. Raises `Invalid` (too_scattered) rather than make a crowd of small files."""
    cells: dict[Cell, list[Row]] = {}
    for sample in samples:
        release = sample.entry.release
        cell = Cell(release.model, release.version, _day(sample.entry.at), _signature(sample))
        cells.setdefault(cell, []).append(Row(batch, device, sample))
    if len(cells) > PARTS_PER_BATCH:
        raise Invalid("too_scattered", f"expected at most {PARTS_PER_BATCH} days and shapes of data; got {len(cells)}")
    return cells


def merge(batches: Iterable[Mapping[Cell, Iterable[Row]]]) -> list[Part]:
    """Put the cells of several batches together, in the order given."""
    parts: dict[Cell, Part] = {}
    for cells in batches:
        for cell, rows in cells.items():
            part = parts.setdefault(cell, Part(cell))
            for row in rows:
                part.add(row)
    return [parts[cell] for cell in sorted(parts)]


def _day(at: float) -> date:
    day = datetime.fromtimestamp(at, UTC).date()
    if not _DAYS[0] <= day < _DAYS[1]:
        raise Invalid("bad_time", f"expected a time before {_DAYS[1]}; got {day}")
    return day


def _tensors(sample: Sample) -> dict[str, Array]:
    inputs = {f"input.{name}": array for name, array in sample.inputs.items()}
    return inputs | {f"output.{name}": array for name, array in sample.outputs.items()}


def _signature(sample: Sample) -> Signature:
    return tuple(sorted((column, _kind(array.dtype)) for column, array in _tensors(sample).items()))


def _kind(dtype: np.dtype[Any]) -> str:
    """Text is text, however long the longest of an array."""
    return "text" if dtype.kind == "U" else dtype.str


def _plain_columns(rows: list[Row]) -> dict[str, pa.Array]:
    entries = [row.sample.entry for row in rows]
    return {
        "sample_id": pa.array([entry.id for entry in entries], pa.string()),
        "device": pa.array([row.device for row in rows], pa.string()),
        "release": pa.array([str(entry.release) for entry in entries], pa.string()),
        "variant": pa.array([entry.release.variant for entry in entries], pa.string()),
        "at": pa.array([round(entry.at * 1e6) for entry in entries], pa.timestamp("us", tz="UTC")),
        "probability": pa.array([entry.probability for entry in entries], pa.float64()),
    }


def _tensor_columns(column: str, arrays: list[Array]) -> dict[str, pa.Array]:
    return {
        column: _lists([array.ravel(order="C") for array in arrays]),
        f"{column}.shape": _lists([np.array(array.shape, np.int64) for array in arrays]),
    }


def _lists(arrays: list[np.ndarray[Any, Any]]) -> pa.Array:
    """One list for each array, without a Python object for each number. Always variable: shapes differ in the field."""
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
