"""Simulation dealt out to jobs: the same bytes as from one process, and nothing made twice."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from iceaggr.cli import main
from iceaggr.sim import shards, stream
from iceaggr.sim.shards import simulate_sharded
from iceaggr.sim.write import simulate_folder
from lab_shared.errors import UserError

OPTIONS = {"seed": 4, "device": "cpu", "events_per_file": 20}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stream.BLOCK_SIZE, "cpu", 64)


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, str]:
    return digests(simulate_folder(tmp_path / "whole", 70, **OPTIONS))


def test_shards_make_the_same_bytes(tmp_path: Path, whole: dict[str, str]) -> None:
    simulate_sharded(tmp_path / "sharded", 70, shards=3, workers=1, **OPTIONS)
    assert digests(tmp_path / "sharded") == whole
    simulate_sharded(tmp_path / "sharded", 70, shards=2, workers=1, **OPTIONS)  # done: nothing to do
    assert digests(tmp_path / "sharded") == whole
    with pytest.raises(FileExistsError, match="other settings"):
        simulate_sharded(tmp_path / "sharded", 70, shards=2, workers=1, **{**OPTIONS, "seed": 5})


def test_what_some_shards_have_made_the_next_call_keeps(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, make = tmp_path / "sharded", shards.simulate_folder

    def fails_at_file_3(*args: object, files: list[int] | None, **options: object) -> Path:
        if files and 3 in files:
            raise ValueError("the node is lost")
        return make(*args, files=files, **options)

    monkeypatch.setattr(shards, "simulate_folder", fails_at_file_3)
    with pytest.raises(UserError, match="the node is lost"):
        simulate_sharded(out, 70, shards=4, workers=1, **OPTIONS)
    assert not (out / "simulation.json").exists()
    made = {path: path.stat().st_mtime_ns for path in (out / "train").iterdir()}
    assert sorted(path.name for path in made) == ["batch_1.parquet", "batch_2.parquet", "batch_4.parquet"]
    monkeypatch.setattr(shards, "simulate_folder", make)
    simulate_sharded(out, 70, shards=2, workers=1, **OPTIONS)
    assert digests(out) == whole
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())


def test_a_file_is_not_divided(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards=5: 70 events make 4 files of 20"):
        simulate_sharded(tmp_path, 70, shards=5, **OPTIONS)


def test_an_engine_without_jobs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--out", str(tmp_path / "s"), "--events", "9", "--engine", "ray"]) == 1
    assert "--shards N" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the processes have blocks of the usual size
    command = ["simulate", "--events", "70", "--seed", "4", "--device", "cpu", "--events-per-file", "20", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert main([*command, str(tmp_path / "sharded"), "--shards", "2", "--workers", "2"]) == 0
    assert digests(tmp_path / "sharded") == digests(tmp_path / "whole")
    assert json.loads((tmp_path / "sharded" / "simulation.json").read_text())["n_events"] == 70
