"""The run folder: who may have it, what it records, what a person sees, and where the mirror writes."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lab_shared import manifest
from lab_shared.config import ConfigError
from lab_shared.dist import Dist
from lab_shared.files import StorageError
from lab_shared.progress import Progress, format_metrics
from lab_shared.run import Run, RunError, read_metrics


@dataclass(frozen=True)
class Config:
    width: int = 4


def create(path, config=None, **options):
    defaults = {"seed": 3, "project": "p", "resume_command": "go --resume {path}", "wandb": "disabled"}
    return Run.create(path, config or Config(), **{**defaults, **options})


def test_a_run_from_creation_to_the_end(tmp_path):
    with create(tmp_path / "new" / "run", Config(width=7)) as run:
        assert run.resume_command == f"go --resume {run.path}"
        run.log(1, "train", {"loss": torch.tensor(0.5), "angle": np.float32(2.0), "odd": math.nan})
        assert not (run.path / "DONE.json").exists()
        run.finish({"angle": np.float64(1.5), "low": -math.inf, "table": [{"n": torch.tensor(2)}]})
    done = json.loads((run.path / "DONE.json").read_text())
    assert done["summary"] == {"angle": 1.5, "low": None, "table": [{"n": 2}]}
    [line] = read_metrics(run.path)
    assert line.pop("time") >= 0
    assert line == {"step": 1, "split": "train", "loss": 0.5, "angle": 2.0, "odd": None}
    assert json.loads((run.path / "config.json").read_text()) == {"width": 7}
    assert (run.path / "figures").is_dir()
    with Run.open(run.path) as again:
        assert (again.seed, again.config(Config)) == (3, Config(7))
    facts = json.loads((run.path / "manifest.json").read_text())
    assert len(facts["resumes"]) == 1
    for record in (facts, facts["resumes"][0]):
        assert "torch" in record["versions"]
        assert {
            "git_sha",
            "git_dirty",
            "diff_sha256",
            "lock_sha256",
            "device",
            "argv",
            "python",
        } <= record.keys()


def test_a_folder_belongs_to_one_run(tmp_path):
    run = create(tmp_path / "run")
    with pytest.raises(RunError, match=rf"run is in use by another run \(process {os.getpid()}\)"):
        create(run.path)
    with pytest.raises(RunError, match="in use by another run"):
        Run.open(run.path)
    run.close()
    run.close()
    with pytest.raises(RunError, match=r"already holds a run \(config.json\): go on with `go --resume .*/run`"):
        create(run.path)
    (run.path / "run.lock").write_text("999999999")  # the process is gone, its note remains
    Run.open(run.path).close()


def test_leftovers_of_another_run_are_not_taken_over(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match=r"already holds a run \(checkpoints\)"):
        create(tmp_path)
    with pytest.raises(RunError, match=r"holds no run \(no config.json"):
        Run.open(tmp_path)


def test_a_folder_with_data_in_it_is_fine(tmp_path):
    (tmp_path / "data").mkdir()
    create(tmp_path).close()


def test_folders_and_disks_that_refuse(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/run: Not a directory; .* choose another folder"):
        create(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="width: expected int"):
        create(tmp_path / "run", Config(width="4"))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
    create(tmp_path / "run").close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    with (
        Run.open(tmp_path / "run") as run,
        pytest.raises(StorageError, match=r"metrics.jsonl: No space left.*Then go on with: go --resume"),
    ):
        run.log(1, "train", {"loss": 1.0})


def test_rewind_forgets_later_lines_and_a_cut_one(tmp_path):
    with create(tmp_path / "run") as run:
        for step in range(1, 5):
            run.log(step, "train", {"loss": step})
            run.log(step, "val", {"loss": step})
        with open(run.path / "metrics.jsonl", "a") as f:
            f.write('{"step": 2, "split": "tr')
        assert len(read_metrics(run.path)) == 8
        run.rewind(2, elapsed=100.0)
        run.log(3, "train", {"loss": 9})
    lines = read_metrics(run.path)
    places = [(line["step"], line["split"]) for line in lines]
    assert places == [(1, "train"), (1, "val"), (2, "train"), (2, "val"), (3, "train")]
    assert lines[-1]["time"] >= 100
    assert read_metrics(run.path, "val") == [lines[1], lines[3]]


def test_other_ranks_touch_nothing(tmp_path, capsys, monkeypatch):
    create(tmp_path / "run").close()
    before = sorted(tmp_path.rglob("*"))
    rank_0_says = [str(tmp_path / "run"), ""]
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda told, src: told.__setitem__(0, rank_0_says.pop(0))
    )
    with Run.open(tmp_path / "elsewhere", dist=Dist(rank=1, world=2)) as run:
        assert (run.path, run.is_main) == (tmp_path / "run", False)
        run.log(1, "train", {"loss": 1.0})
        run.rewind(0)
        run.sync()
        run.progress.start(0, 5)
        run.progress.show(1, {"loss": 1.0})
        run.finish({})
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert capsys.readouterr() == ("", "")
    with pytest.raises(RunError, match="rank 0 could not start"):
        create(tmp_path / "new", dist=Dist(rank=1, world=2))


# --- manifest ---


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_state(tmp_path):
    file = tmp_path / "pkg" / "code.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    assert manifest.git_state(file)[0]["git_sha"] is None
    git(tmp_path, "init", "-q")
    assert manifest.git_state(file)[0]["git_sha"] is None  # not tracked: some other project's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    clean, diff = manifest.git_state(file)
    assert (len(clean["git_sha"]), clean["git_dirty"], clean["git_untracked"], diff) == (40, False, 0, "")
    file.write_text("a = 2\n")
    (tmp_path / "new.txt").write_text("")
    dirty, diff = manifest.git_state(file)
    assert (dirty["git_sha"], dirty["git_dirty"], dirty["git_untracked"]) == (clean["git_sha"], True, 1)
    assert "+a = 2" in diff
    assert len(dirty["diff_sha256"]) == 64


def test_uncommitted_changes_are_kept_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "git_state", lambda file: ({"git_dirty": True}, "+a = 2\n"))
    with create(tmp_path / "run") as run:
        assert (run.path / "dirty.diff").read_text() == "+a = 2\n"
    Run.open(run.path).close()
    assert (run.path / "dirty.resume1.diff").exists()
    monkeypatch.setattr(manifest, "git_state", lambda file: ({"git_dirty": True}, "x" * 2_000_000))
    with create(tmp_path / "other") as run:
        assert not (run.path / "dirty.diff").exists()


def test_the_command_line_names_no_folder_of_the_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/.venv/bin/iceaggr", "train", "small"])
    assert manifest.command_line() == ["iceaggr", "train", "small"]
    monkeypatch.setattr(sys, "argv", ["/home/someone/src/iceaggr/__main__.py", "train"])
    assert manifest.command_line() == ["python", "-m", "iceaggr", "train"]


# --- progress ---


def test_metrics_as_text():
    metrics = {"loss": 0.81234, "lr": 2.9e-5, "it_per_s": 31.26, "events_per_s": 20512.3}
    assert format_metrics(metrics) == "loss 0.8123  lr 2.9e-05  31.3 it/s  20,512 events/s"


def test_plain_lines_go_to_stderr_and_not_too_often(capsys):
    progress = Progress()
    progress.start(0, 100)
    for step in range(1, 101):
        progress.advance(step)
        progress.show(step, {"loss": 1 / step})
    progress.stop()
    out, err = capsys.readouterr()
    first, last = err.splitlines()  # 100 steps in less than the 2 s between lines, and always the last
    assert first.startswith("step 1/100  loss 1  ETA 0:0")
    assert last == "step 100/100  loss 0.01  ETA 0:00"
    assert out == ""


def test_a_terminal_gets_a_live_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    progress = Progress()
    progress.start(3, 10)
    progress.advance(4)
    progress.show(4, {"loss": 0.25})
    progress.line("a line [not markup]")
    progress.stop()
    progress.stop()
    text = screen.getvalue()
    for part in ("4/10", "loss 0.25  ETA", "a line [not markup]"):
        assert part in text


# --- W&B ---


def test_without_wandb_the_run_goes_on_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with create(tmp_path / "run", wandb="offline") as run:
        run.log(1, "train", {"loss": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "wandb is not installed: metrics.jsonl is the only record (pip install wandb for the mirror)"
    ]
    assert len(read_metrics(run.path)) == 1


_MIRRORED = """
from dataclasses import make_dataclass
from lab_shared.run import Run

Config = make_dataclass("Config", [("x", int, 1)], frozen=True)
for again in (False, True):
    create = lambda: Run.create("run", Config(), seed=0, project="p", resume_command="{path}")
    with Run.open("run") if again else create() as run:
        run.log(1, "train", {"loss": 1.0})
"""


@pytest.mark.slow
def test_wandb_mirrors_offline_and_writes_inside_the_run_only(tmp_path):
    pytest.importorskip("wandb", reason="the mirror's package is not installed")
    for name in ("home", "tmp", "work"):
        (tmp_path / name).mkdir()
    environment = {key: x for key, x in os.environ.items() if not key.startswith(("WANDB", "XDG"))}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", _MIRRORED]
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    run = tmp_path / "work" / "run"
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    assert [p for p in tmp_path.rglob("*") if p.is_file() and run not in p.parents] == []


class Moody:
    def log(self, *_, **__):
        raise RuntimeError("the service is gone")

    finish = log


def test_a_mirror_that_breaks_stops_no_run(tmp_path, capsys):
    with create(tmp_path / "run") as run:
        run._wandb = Moody()
        run.log(1, "train", {"loss": 1.0})
        run.log(2, "train", {"loss": 0.5})
        run._wandb = Moody()
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    said = capsys.readouterr().err
    assert "wandb failed (the service is gone): from step 1 on" in said
    assert "wandb did not finish" in said


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run.lock").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"run\.lock"):
        create(tmp_path)
