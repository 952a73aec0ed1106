"""Kaggle-layout folders: the real events, what is written, and every kind of broken file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.data import schema
from iceaggr.data.kaggle import KaggleFolder, slice_events, write_batch, write_meta
from iceaggr.data.parquet import read_columns
from iceaggr.data.schema import DataError, Events


@pytest.fixture
def folder(make_pulses, tmp_path) -> Path:
    """Two batch files of five events each, labelled."""
    write_folder(tmp_path / "data", {1: make_pulses([4, 2, 7, 1, 5], seed=1), 3: make_pulses([3] * 5, seed=2)})
    return tmp_path / "data"


def write_folder(path: Path, batches: dict, split: str = "train") -> None:
    events = {}
    for batch, pulses in batches.items():
        write_batch(path / split / f"batch_{batch}.parquet", pulses)
        angles = (None if x is None else x.numpy() for x in (pulses.azimuth_E, pulses.zenith_E))
        first, last = pulses.offsets_E1[:-1].numpy(), pulses.offsets_E1[1:].numpy() - 1
        ids = pulses.event_id_E.numpy() + 100_000 * batch
        events[batch] = Events(ids, first, last, *angles)
        table = pl.read_parquet(path / split / f"batch_{batch}.parquet")
        table = table.with_columns(event_id=pl.col("event_id") + 100_000 * batch)
        table.write_parquet(path / split / f"batch_{batch}.parquet")
    write_meta(path / f"{split}_meta.parquet", events)


def test_real_events(real_mini):
    folder = KaggleFolder(real_mini)
    pulses = folder.read_batch(1)
    assert (folder.split, folder.batch_ids, folder.labelled, folder.n_events) == ("train", [1], True, 5)
    assert pulses.event_id_E.tolist() == [24, 41, 59, 67, 72]
    assert pulses.counts_E.tolist() == [61, 51, 36, 142, 62]
    first_hlc = [pulses.time_P[e.start : e.stop][~pulses.auxiliary_P[e.start : e.stop]][0] for e in spans(pulses)]
    assert all(9863 <= int(t) <= 9890 for t in first_hlc)
    raw = pl.read_parquet(real_mini / "train" / "batch_1.parquet")
    assert np.array_equal(pulses.charge_P.numpy(), raw["charge"].to_numpy().astype(np.float32))
    assert np.array_equal(pulses.time_P.numpy(), raw["time"].to_numpy())


def spans(pulses) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(pulses.offsets_E1.tolist())]


def test_written_files_are_exactly_kaggles(real_mini, tmp_path):
    pulses = KaggleFolder(real_mini).read_batch(1)
    write_batch(tmp_path / "train" / "batch_1.parquet", pulses)
    events = KaggleFolder(real_mini).read_events(1)
    write_meta(tmp_path / "train_meta.parquet", {1: events})
    for name in ("train/batch_1.parquet", "train_meta.parquet"):
        real, ours = pl.read_parquet(real_mini / name), pl.read_parquet(tmp_path / name)
        assert ours.schema == real.schema
        assert ours.equals(real)
    assert not list(tmp_path.rglob("*.part"))


def test_a_written_folder_reads_back(make_pulses, same_pulses, tmp_path):
    pulses = make_pulses([4, 2, 7], seed=3)
    write_batch(tmp_path / "train" / "batch_12.parquet", pulses)
    first, last = pulses.offsets_E1[:-1].numpy(), pulses.offsets_E1[1:].numpy() - 1
    events = Events(pulses.event_id_E.numpy(), first, last, pulses.azimuth_E.numpy(), pulses.zenith_E.numpy())
    write_meta(tmp_path / "train_meta.parquet", {12: events})
    same_pulses(KaggleFolder(tmp_path).read_batch(12), pulses)


def test_batches_events_and_single_events(folder):
    source = KaggleFolder(folder)
    assert source.batch_ids == [1, 3]
    assert source.events_per_batch() == {1: 5, 3: 5}
    wanted = source.read_batch(3).event_id_E[2]
    event = source.read_event(int(wanted))
    assert event.event_id_E.tolist() == [int(wanted)]
    assert event.n_pulses == 3
    with pytest.raises(schema.EventIdError, match="no event 77"):
        source.read_event(77)


def test_only_the_batch_files_that_are_there_count(folder):
    (folder / "train" / "batch_3.parquet").unlink()
    assert KaggleFolder(folder).events_per_batch() == {1: 5}


def test_files_directly_in_the_folder_without_meta(folder, tmp_path, same_pulses):
    shutil.copy(folder / "train" / "batch_1.parquet", tmp_path / "batch_1.parquet")
    bare = KaggleFolder(tmp_path)
    expected = vars(KaggleFolder(folder).read_batch(1)) | {"azimuth_E": None, "zenith_E": None}
    pulses = bare.read_batch(1)
    same_pulses(pulses, type(pulses)(**expected))
    assert not bare.labelled
    assert bare.n_events == 5


def test_unlabelled_test_split(make_pulses, tmp_path):
    write_folder(tmp_path, {661: make_pulses([3, 4], labelled=False)}, split="test")
    source = KaggleFolder(tmp_path)
    assert source.split == "test"
    assert source.read_batch(661).azimuth_E is None
    with pytest.raises(schema.MissingFileError, match="no batch_"):
        KaggleFolder(tmp_path, "train")


def test_lossless_types_are_accepted(folder):
    file = folder / "train" / "batch_1.parquet"
    before = KaggleFolder(folder).read_batch(1)
    table = pl.read_parquet(file)
    table = table.cast({"sensor_id": pl.Int32, "time": pl.UInt32, "charge": pl.Float32, "event_id": pl.UInt64})
    table.write_parquet(file)
    after = KaggleFolder(folder).read_batch(1)
    assert all(x is None or bool((x == getattr(after, name)).all()) for name, x in vars(before).items())


def edit_pulses(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "train" / "batch_1.parquet"
        change(pl.read_parquet(file)).write_parquet(file)

    return edit


def edit_meta(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "train_meta.parquet"
        change(pl.read_parquet(file)).write_parquet(file)

    return edit


def put(column: str, row: int, value: object) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda t: t.with_columns(
        pl.when(pl.int_range(pl.len()) == row).then(pl.lit(value, t.schema[column])).otherwise(column).alias(column)
    )


FAULTS = {
    "missing column": (edit_pulses(lambda t: t.drop("charge")), schema.MissingColumnError, "'charge'", None),
    "missing meta column": (
        edit_meta(lambda t: t.drop("event_id")),
        schema.MissingColumnError,
        "'event_id'",
        None,
    ),
    "float times": (
        edit_pulses(lambda t: t.cast({"time": pl.Float64})),
        schema.ColumnTypeError,
        "'time' is Float64, which is not Int64 without loss",
        None,
    ),
    "text charges": (
        edit_pulses(lambda t: t.cast({"charge": pl.String})),
        schema.ColumnTypeError,
        "String",
        None,
    ),
    "integer flags": (
        edit_pulses(lambda t: t.cast({"auxiliary": pl.Int8})),
        schema.ColumnTypeError,
        "Int8",
        None,
    ),
    "no value": (edit_pulses(put("time", 3, None)), schema.NullValueError, "'time' has no value", 3),
    "negative index": (edit_meta(put("first_pulse_index", 0, -4)), schema.PulseIndexError, "negative", 0),
    "last below first": (edit_meta(put("last_pulse_index", 2, 3)), schema.PulseIndexError, "is below", 2),
    "beyond the file": (
        edit_meta(put("last_pulse_index", 4, 99)),
        schema.PulseIndexError,
        "beyond the 19",
        4,
    ),
    "empty event": (edit_meta(put("last_pulse_index", 1, 3)), schema.EmptyEventError, "has no pulses", 1),
    "unsorted times": (edit_pulses(put("time", 8, 10**6)), schema.UnsortedTimesError, "sort the pulses", 9),
    "sensor": (edit_pulses(put("sensor_id", 7, 5160)), schema.SensorRangeError, "5160 is not in", 7),
    "negative sensor": (edit_pulses(put("sensor_id", 0, -1)), schema.SensorRangeError, "-1 is not in", 0),
    "NaN charge": (edit_pulses(put("charge", 5, float("nan"))), schema.ChargeError, "charge nan", 5),
    "negative charge": (edit_pulses(put("charge", 6, -1.0)), schema.ChargeError, "charge -1.0", 6),
    "ids disagree": (edit_meta(put("event_id", 1, 5)), schema.EventIdError, "gives this row to event 5", 4),
    "repeated id": (edit_meta(put("event_id", 1, 101_000)), schema.EventIdError, "appears twice", 1),
    "label": (edit_meta(put("zenith", 2, -0.5)), schema.LabelError, "zenith -0.5", 2),
    "batch not in meta": (
        edit_meta(lambda t: t.filter(pl.col("batch_id") == 3)),
        schema.EventIdError,
        "batch 1",
        None,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named_with_file_and_row(folder, name):
    edit, error, says, row = FAULTS[name]
    edit(folder)
    with pytest.raises(error, match=says) as caught:
        KaggleFolder(folder).read_batch(1)
    assert caught.value.row == row
    assert caught.value.file.name in ("batch_1.parquet", "train_meta.parquet")
    assert type(caught.value) is error


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(schema.MissingFileError, match="no such folder"):
        KaggleFolder(tmp_path / "none")
    with pytest.raises(schema.MissingFileError, match=r"no batch_\*.parquet in train/ or test/"):
        KaggleFolder(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_data_errors(tmp_path_factory, make_pulses, data):
    """Parquet has no checksums: damage that decodes to valid pulses goes unseen, the rest must be named."""
    folder = tmp_path_factory.mktemp("damaged")
    pulses = make_pulses([30, 20], seed=1)
    file = folder / "batch_1.parquet"
    write_batch(file, pulses)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        content[at : at + 16] = data.draw(st.binary(min_size=16, max_size=16), label="bytes")
    file.write_bytes(content)
    with suppress(DataError):
        assert KaggleFolder(folder).read_batch(1).n_pulses <= 50


def test_a_cut_file_says_so(folder):
    file = folder / "train" / "batch_1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(schema.CorruptFileError, match="cut short or not parquet"):
        KaggleFolder(folder).read_batch(1)


def test_a_failed_write_leaves_nothing(make_pulses, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        (tmp_path / "batch_1.parquet.part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    with pytest.raises(OSError, match="No space left"):
        write_batch(tmp_path / "batch_1.parquet", make_pulses([3]))
    assert not list(tmp_path.iterdir())


def test_truth_comes_in_the_order_asked_for(folder):
    source = KaggleFolder(folder)
    ids = source.read_batch(1).event_id_E.numpy()
    table = pl.DataFrame({"event_id": ids, "type": ["track", "cascade"] * 2 + ["track"], "energy": np.arange(5) * 1.5})
    table.reverse().write_parquet(folder / "truth.parquet")
    source = KaggleFolder(folder)
    truth = source.read_truth(ids[[3, 0]])
    assert truth is not None
    assert truth["type"].tolist() == [0, 1]
    assert truth["energy"].tolist() == [4.5, 0.0]
    with pytest.raises(schema.EventIdError, match="no row for event 7"):
        source.read_truth(np.array([7]))


def test_slices_of_events(make_pulses, same_pulses):
    pulses = make_pulses([3, 4, 5])
    part = slice_events(pulses, 1, 3)
    assert part.counts_E.tolist() == [4, 5]
    assert np.array_equal(part.time_P, pulses.time_P[3:])
    same_pulses(slice_events(pulses, 0, 3), pulses)


def test_columns_are_read_where_asked(folder):
    ids = read_columns(folder / "train_meta.parquet", {"event_id": "Int64"}, where=pl.col("batch_id") == 3)
    assert ids["event_id"].tolist() == [301_000, 301_007, 301_014, 301_021, 301_028]
