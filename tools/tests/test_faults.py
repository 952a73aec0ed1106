"""`make faults` in short, and what else can go wrong in every package's training: a full GPU, a second run, a clock."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import faults
import pytest
import torch
from lab_shared import loop, run
from lab_shared.memory import DeviceMemoryError
from lab_shared.run import Run, RunError, read_metrics
from scenarios import SCENARIOS
from scenarios.base import Scenario, digests

PROGRAM = Path(faults.__file__)
TRAININGS = [name for name in SCENARIOS if name.startswith("train-")]
LOWER = {
    "train-iceaggr": "--tokens-per-batch",
    "train-attn-clustering": "--optim.batch",
    "train-gauge-attn": "--data.batch",
    "train-rh-memory": "--batch-size",
}


@pytest.fixture(scope="module", params=TRAININGS)
def training(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """(name, scenario, inputs) of a package's training, with what the scenario patches put back."""
    inputs = tmp_path_factory.mktemp("inputs")
    patch = pytest.MonkeyPatch()
    modules = {"iceaggr.train": "write_report", "gauge_attn.train": "write_report", "rh_memory.report": "write"}
    for module, name in modules.items():
        __import__(module)
        patch.setattr(sys.modules[module], name, getattr(sys.modules[module], name))
    patch.setattr(torch.cuda, "is_available", lambda: False)
    scenario = SCENARIOS[request.param]()
    scenario.prepare(inputs)
    yield request.param, scenario, inputs
    patch.undo()


def test_a_full_gpu_names_the_flag_to_lower(training: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, scenario, inputs = training

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr(loop.Tick, "update", full)
    with pytest.raises(DeviceMemoryError, match=f"Tried to allocate 2.00 GiB.*{LOWER[name]}"):
        scenario.work(inputs, tmp_path / "run")


def test_a_second_run_in_the_folder_is_told_who_is_there(training: tuple, tmp_path: Path) -> None:
    _, scenario, inputs = training
    folder = tmp_path / "run"
    _begin(scenario, inputs, folder)
    with Run.open(folder), pytest.raises(RunError, match=r"in use by another run \(process \d+\)"):
        scenario.work(inputs, folder)


def _begin(scenario: Scenario, inputs: Path, folder: Path) -> None:
    """Leave a run that was stopped in its first step."""

    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Tick, "update", stop)
        with pytest.raises(Stop):
            scenario.work(inputs, folder)


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day loses an hour at every look; rates and times come from a clock that only goes on."""
    scenario, looks = SCENARIOS["checkpointing"](), count()
    for folder in ("plain", "jumping"):
        (tmp_path / folder).mkdir()
    scenario.work(tmp_path, tmp_path / "plain")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1.7e9 - 3600 * next(looks))
        scenario.work(tmp_path, tmp_path / "jumping")
    assert scenario.outcome(tmp_path / "plain") == scenario.outcome(tmp_path / "jumping")
    records = read_metrics(tmp_path / "jumping", "train")
    assert all(record["it_per_s"] > 0 for record in records)
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)
    assert run.time is time


def test_faults_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that writes in place, does all of it again and leaves its temporary file has all three faults."""

    class Sloppy:
        @staticmethod
        def make(name: str) -> bytes:
            return name.encode() * 1000

    def work(inputs: Path, folder: Path) -> None:
        for name in "abcdefgh":
            (folder / f"{name}.tmp").write_text("x")
            with open(folder / f"{name}.json", "w") as file:
                file.write("[")
                file.flush()
                time.sleep(0.02)
                Sloppy.make(name)
                file.write("]")

    def scenario() -> Scenario:
        def done(folder: Path) -> set[str]:
            return {file.stem for file in folder.glob("*.json") if file.read_text() == "[]"}

        unit = (Sloppy, "make", lambda name: name)
        return Scenario(lambda inputs: None, work, lambda folder: digests(folder, "*.json"), done, unit)

    monkeypatch.setitem(faults.SCENARIOS, "sloppy", scenario)
    found = ""
    for seed in range(4):  # on a busy machine the kills of one attack may all come too early or too late
        (tmp_path / str(seed)).mkdir()
        found += " ".join(faults.attack("sloppy", 6, seed, tmp_path / str(seed)).faults)
    assert "half-written" in found
    assert "did again" in found
    assert "left a.tmp behind" in found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAININGS, "iceaggr-cache"])
def test_killed_trainings_come_to_the_same_bits(name: str) -> None:
    command = [sys.executable, str(PROGRAM), "--kills", "2", "--disks", "1", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
