"""Simulated folders: Kaggle's layout to the type, resumable, the same bytes again."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import polars as pl
import pytest
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.sim import stream, write
from iceaggr.sim.config import SimConfig
from iceaggr.sim.write import simulate_folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stream.BLOCK_SIZE, "cpu", 128)


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return simulate_folder(tmp_path / "sim", 100, seed=9, events_per_file=60)


def test_layout_and_types_are_kaggles(folder: Path, real_mini: Path) -> None:
    for name in ("train/batch_1.parquet", "train_meta.parquet"):
        assert pl.read_parquet_schema(folder / name) == pl.read_parquet_schema(real_mini / name)
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / ".parts").exists()


def test_files_agree_with_each_other(folder: Path) -> None:
    meta, truth = pl.read_parquet(folder / "train_meta.parquet"), pl.read_parquet(folder / "truth.parquet")
    assert meta["batch_id"].to_list() == [1] * 60 + [2] * 40
    ids = meta["event_id"].to_numpy()
    assert (ids[1:] > ids[:-1]).all()
    assert truth["event_id"].equals(meta["event_id"])
    assert set(truth["type"]) == {"track", "cascade"}
    for batch in (1, 2):
        pulses = pl.read_parquet(folder / "train" / f"batch_{batch}.parquet")
        signal = pl.read_parquet(folder / "pulse_truth" / f"batch_{batch}.parquet")
        mine, real = meta.filter(pl.col("batch_id") == batch), truth.filter(pl.col("batch_id") == batch)
        assert signal.height == pulses.height == mine["last_pulse_index"][-1] + 1
        per_event = pulses.with_columns(signal["is_signal"]).group_by("event_id", maintain_order=True)
        found = per_event.agg(pl.len().alias("n"), pl.col("is_signal").sum(), pl.col("time").is_sorted())
        assert found["event_id"].equals(mine["event_id"])
        assert found["n"].to_list() == (mine["last_pulse_index"] - mine["first_pulse_index"] + 1).to_list()
        assert found["n"].to_list() == real["n_pulses"].to_list()
        assert found["is_signal"].to_list() == real["n_signal"].to_list()
        assert found["time"].all()
    record = json.loads((folder / "simulation.json").read_text())
    assert "simulated data" in record["note"]
    assert record["seed"] == 9


def test_the_package_reads_what_it_writes(folder: Path) -> None:
    source = KaggleFolder(folder)
    assert source.n_events == 100
    assert source.read_batch(2).n_events == 40


def test_same_seed_same_bytes_and_a_finished_folder_stays(folder: Path, tmp_path: Path) -> None:
    again = simulate_folder(tmp_path / "again", 100, seed=9, events_per_file=60)
    assert digests(again) == digests(folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    simulate_folder(folder, 100, seed=9, events_per_file=60)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    other = simulate_folder(tmp_path / "other", 100, seed=10, events_per_file=60)
    assert digests(other)["train/batch_1.parquet"] != digests(folder)["train/batch_1.parquet"]


def test_an_interrupted_run_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut"
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        assert total == 100
        if done > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_folder(cut, 100, seed=9, events_per_file=60, progress=stop)
    assert not (cut / "simulation.json").exists()
    streams = []
    plain = stream.iter_events

    def watched(*args, **options):
        streams.append(options["stream"])
        return plain(*args, **options)

    monkeypatch.setattr(write, "iter_events", watched)
    simulate_folder(cut, 100, seed=9, events_per_file=60, progress=lambda done, total: seen.append(done))
    assert streams == [2], "the finished file was simulated again"
    assert seen[0] == 60
    assert seen[-1] == 100
    assert digests(cut) == digests(folder)


def test_other_settings_or_other_data_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"other settings \(seed\)"):
        simulate_folder(folder, 100, seed=8, events_per_file=60)
    with pytest.raises(FileExistsError, match="config"):
        simulate_folder(folder, 100, seed=9, events_per_file=60, config=SimConfig(noise_rate=600.0))
    (tmp_path / "real" / "train").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="no simulation"):
        simulate_folder(tmp_path / "real", 10, seed=1)


@pytest.mark.parametrize(("n", "per_file", "message"), [(0, 10, "n_events 0"), (10, 0, "events_per_file 0")])
def test_empty_requests_are_refused(n: int, per_file: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_folder(tmp_path, n, seed=1, events_per_file=per_file)


def test_event_ids_of_two_seeds_never_meet(folder: Path, tmp_path: Path) -> None:
    other = simulate_folder(tmp_path / "other", 60, seed=10, events_per_file=60)
    mine, theirs = (set(pl.read_parquet(f / "truth.parquet")["event_id"]) for f in (folder, other))
    assert len(mine) == 100
    assert not mine & theirs
    with pytest.raises(ValueError, match="seed -1"):
        simulate_folder(tmp_path / "negative", 10, seed=-1)


def test_more_events_than_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ids for 134217728"):
        simulate_folder(tmp_path, 200_000_000, seed=1)
