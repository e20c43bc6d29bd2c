"""What a data scientist gets: one command, Parquet files in hive layout that common tools read as one table."""

import io
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from django.core.management import CommandError, call_command

from fleet.feedback import compaction, exports, selectors
from fleet.feedback.models import Campaign, DatasetPart
from tests.server.batch_world import NOON, World, files_under, received, sample

DAY = 86_400


@pytest.fixture
def world(feedback_world: World) -> World:
    return feedback_world


@pytest.fixture
def parts(world: World) -> list[DatasetPart]:
    """Two versions, one of them a bare number, over three days; and another model."""
    received(world.device, [sample(0), sample(1, at=NOON + DAY), sample(2, at=NOON + 2 * DAY)])
    received(world.device, [sample(0, release="digits/2/default"), sample(1, release="digits/1.1.0/int8")])
    received(world.other, [sample(0, release="wine/1.0.0/default")], model="wine")
    return compaction.compact_due()


def run(*arguments: str) -> str:
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def export(folder: Path, *filters: str) -> str:
    return run("dataset", "export", "digits", "--out", str(folder), *filters)


def test_one_command_gives_files_in_hive_layout(parts, tmp_path):
    told = export(tmp_path / "out")
    assert "5 samples in 5 files" in told
    folders = {str(path.parent.relative_to(tmp_path / "out")) for path in files_under(tmp_path / "out")}
    assert folders == {
        "model=digits/version=1.0.0/day=2025-06-16",
        "model=digits/version=1.0.0/day=2025-06-17",
        "model=digits/version=1.0.0/day=2025-06-18",
        "model=digits/version=1.1.0/day=2025-06-16",
        "model=digits/version=2/day=2025-06-16",
    }
    assert all(path.name.startswith("part-") and path.suffix == ".parquet" for path in files_under(tmp_path / "out"))


def test_pyarrow_reads_the_folder_as_one_table(parts, tmp_path):
    export(tmp_path / "out")
    table = pyarrow.dataset.dataset(tmp_path / "out", partitioning="hive").to_table()
    assert table.num_rows == 5
    assert sorted(set(table["version"].to_pylist())) == ["1.0.0", "1.1.0", "2"]
    assert set(table["model"].to_pylist()) == {"digits"}
    assert table.schema.field("at").type == pa.timestamp("us", tz="UTC")
    images = np.stack(table["input.image"].to_numpy()).reshape(-1, 8, 8)
    assert (images.dtype, images.shape) == (np.float32, (5, 8, 8))


def test_pandas_way_of_reading_a_folder_works_too(parts, tmp_path):
    """`pandas.read_parquet(folder)` calls this; files that repeat the columns of their path make it fail."""
    export(tmp_path / "out")
    assert pq.read_table(tmp_path / "out").num_rows == 5


def test_a_version_that_looks_like_a_number_reads_alone(parts, tmp_path):
    export(tmp_path / "out", "--version", "2")
    assert pyarrow.dataset.dataset(tmp_path / "out", partitioning="hive").to_table().num_rows == 1
    assert pq.read_table(tmp_path / "out").num_rows == 1


def test_filters_take_both_ends(parts, tmp_path):
    told = export(tmp_path / "out", "--version", "1.0.0", "--since", "2025-06-17", "--until", "2025-06-18")
    assert "2 samples in 2 files" in told
    assert selectors.dataset_parts(model="digits", until=date(2025, 6, 16)).count() == 3


def test_exporting_again_fetches_only_what_is_new(parts, tmp_path, world):
    export(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in files_under(tmp_path / "out")}
    received(world.device, [sample(0, at=NOON + 9 * DAY)])
    compaction.compact_due()
    assert "6 samples in 6 files (5 were there)" in export(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_file_that_was_cut_off_is_fetched_again(parts, tmp_path):
    export(tmp_path / "out")
    victim = files_under(tmp_path / "out")[0]
    victim.write_bytes(victim.read_bytes()[:100])
    assert "(4 were there)" in export(tmp_path / "out")
    assert pq.read_table(tmp_path / "out").num_rows == 5


def test_an_export_that_breaks_off_leaves_no_broken_file(parts, tmp_path, monkeypatch):
    def broken(_part):
        yield b"PAR1"
        raise OSError("object storage is away")

    monkeypatch.setattr(exports, "_chunks", broken)
    with pytest.raises(OSError, match="away"):
        export(tmp_path / "out")
    assert [path for path in files_under(tmp_path / "out") if not path.name.startswith(".")] == []


def test_an_empty_data_set_is_no_error(world, tmp_path):
    assert "0 samples in 0 files" in export(tmp_path / "out")


def test_an_unknown_model_is_an_error(world, tmp_path):
    with pytest.raises(CommandError, match="no model 'nope'"):
        run("dataset", "export", "nope", "--out", str(tmp_path))


def test_the_list_shows_models_versions_and_days(parts):
    told = run("dataset", "list")
    row = next(line for line in told.splitlines() if "1.0.0" in line and "digits" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][:6] == [
        "digits",
        "1.0.0",
        "2025-06-16",
        "2025-06-18",
        "3",
        "3",
    ]
    assert "wine" in told
    assert "wine" not in run("dataset", "list", "digits")


def test_compact_can_be_told_to_hurry(world, settings):
    settings.COMPACT_SECONDS = 3_600
    received(world.device)
    assert "1 samples in 1 new parts" in run("dataset", "compact")


def test_the_zip_holds_the_same_files_and_is_streamed(parts, tmp_path):
    chosen = [part for part in parts if part.model.name == "digits"]
    pieces = list(exports.export_zip(chosen))
    assert len(pieces) > len(chosen)
    export(tmp_path / "out")
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "zip")
    assert _contents(tmp_path / "zip") == _contents(tmp_path / "out")


def test_a_zip_of_nothing_is_a_zip():
    assert zipfile.ZipFile(io.BytesIO(b"".join(exports.export_zip([])))).namelist() == []


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_under(folder)}


def test_the_campaign_command_creates_moves_and_ends(world):
    run("campaign", "create", "night", "--model", "digits", "--rate", "0.2", "--window", "23:30-04:00")
    assert "23:30-04:00" in run("campaign", "list")
    run("campaign", "window", "night", "--window", "00:00-00:00", "--jitter", "3")
    row = Campaign.objects.get()
    assert (row.window_start, row.window_end, row.jitter_seconds, row.rate) == (0, 0, 3, 0.2)
    assert "ended" in run("campaign", "end", "night")
    assert selectors.campaigns_in_force() == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ("window", "nope"),
        ("create", "x", "--model", "nope"),
        ("create", "x", "--model", "digits", "--rate", "2"),
        ("create", "x", "--model", "digits", "--window", "25:00-26:00"),
    ],
)
def test_the_campaign_command_refuses_with_a_message(world, arguments):
    with pytest.raises(CommandError):
        run("campaign", *arguments)
