"""The training loop in processes of its own: killed, stopped, full, on one process and on two; and then resumed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab_shared.checkpoint import encode_tree, newest_checkpoint
from lab_shared.run import read_metrics
from safetensors.torch import load_file

STEPS, CHECKPOINT_EVERY = 23, 4  # of loop_program.py


@pytest.fixture(scope="session")
def train():
    """Run one job of loop_program.py in processes of its own; see there."""
    program = Path(__file__).with_name("loop_program.py")
    server = subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None

    def job(out, **fields):
        server.stdin.write(json.dumps({"out": str(out), **fields}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield job
    server.kill()
    server.communicate(timeout=30)


@pytest.fixture(scope="session")
def uninterrupted(train, tmp_path_factory):
    """(ranks, kind) -> the folder of a run that nobody disturbed."""
    done = {}

    def run(ranks=1, kind="muon"):
        if (ranks, kind) not in done:
            done[ranks, kind] = tmp_path_factory.mktemp("whole") / "run"
            answer = train(done[ranks, kind], ranks=ranks, config={"kind": kind})
            assert answer["status"] == [0] * ranks, answer
        return done[ranks, kind]

    return run


def final_state(path):
    """Everything in the newest checkpoint but the clock, as bytes: model, optimizer, random numbers, data."""
    tree, skipped = newest_checkpoint(path / "checkpoints")
    assert not skipped
    assert tree["loop"].pop("elapsed") > 0
    return encode_tree(tree)


def record(path):
    """metrics.jsonl without what depends on the clock."""
    clock = {"time", "it_per_s", "items_per_s"}
    return [{key: x for key, x in line.items() if key not in clock} for line in read_metrics(path)]


def assert_same_run(path, reference):
    assert final_state(path) == final_state(reference)
    assert record(path) == record(reference)
    assert (path / "weights.safetensors").read_bytes() == (reference / "weights.safetensors").read_bytes()
    best, expected = (load_file(folder / "best.safetensors") for folder in (path, reference))
    assert all(torch.equal(best[name], x) for name, x in expected.items())
    assert json.loads((path / "DONE.json").read_text())["summary"] == {"steps": STEPS}


# Before the first checkpoint, then at random; the seeds are fixed, so that a failure can be repeated.
_KILLS = [("before", 2), *[(random.Random(i).choice(["before", "after"]), 3 + 4 * i) for i in range(5)]]


@pytest.mark.parametrize(("where", "step"), [*_KILLS, ("saving", 4), ("saving", 12), ("saving", STEPS)])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_kill_9_and_resume_is_bit_identical(train, uninterrupted, tmp_path, kind, where, step):
    out = tmp_path / "run"
    answer = train(out, config={"kind": kind}, fault=[where, step], signals=["SIGKILL"])
    assert answer["status"] == [-signal.SIGKILL]
    assert not (out / "DONE.json").exists()
    answer = train(out, resume=True)
    assert answer["status"] == [0], answer["stderr"][0]
    assert ("Resumed" in answer["stderr"][0]) == (step > 4)
    assert not list(out.rglob("*.tmp"))
    assert_same_run(out, uninterrupted(kind=kind))


@pytest.mark.slow
def test_many_kills_in_one_run_at_random_moments(train, uninterrupted, tmp_path):
    choice, out, resume = random.Random(1), tmp_path / "run", False
    for step in sorted(choice.sample(range(1, STEPS + 1), 12)):
        where = "saving" if step % CHECKPOINT_EVERY == 0 else choice.choice(["before", "after"])
        answer = train(out, fault=[where, step], signals=["SIGKILL"], resume=resume)
        assert answer["status"] == [-signal.SIGKILL], answer["stderr"][0]
        resume = True
    assert train(out, resume=True)["status"] == [0]
    assert_same_run(out, uninterrupted())


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_signal_finishes_the_step_saves_and_tells_the_way_back(train, uninterrupted, tmp_path, name, code):
    out = tmp_path / "a run"
    answer = train(out, fault=["before", 6], signals=[name])
    assert answer["status"] == [code]
    assert f"{name}: finishing this step and saving" in answer["stderr"][0]
    assert f"Stopped and saved at step 6. Go on with: again --resume '{out}'" in answer["stderr"][0]
    assert "Traceback" not in answer["stderr"][0]
    assert newest_checkpoint(out / "checkpoints")[0]["loop"]["step"] == 6
    assert train(out, resume=True)["status"] == [0]
    assert_same_run(out, uninterrupted())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_stops_at_once(train, uninterrupted, tmp_path, name):
    out = tmp_path / "run"
    answer = train(out, fault=["before", 6], signals=[name, name])
    assert answer["status"] == [-signal.Signals[name]]
    assert newest_checkpoint(out / "checkpoints")[0]["loop"]["step"] == 4
    assert train(out, resume=True)["status"] == [0]
    assert_same_run(out, uninterrupted())


def test_a_truncated_newest_checkpoint_is_passed_over_with_a_warning(train, uninterrupted, tmp_path):
    out = tmp_path / "run"
    train(out, fault=["before", 10], signals=["SIGKILL"])
    newest = max((out / "checkpoints").glob("step_*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "spl')  # a line cut short
    answer = train(out, resume=True)
    assert answer["status"] == [0]
    assert f"warning: {newest} is damaged" in answer["stderr"][0]
    assert "Resumed at step 4" in answer["stderr"][0]
    assert_same_run(out, uninterrupted())


def test_a_disk_that_refuses_ends_the_run_with_the_way_back(train, uninterrupted, tmp_path):
    out = tmp_path / "run"
    train(out, fault=["before", 6], signals=["SIGKILL"])
    answer = train(out, resume=True, file_limit=1500)
    assert answer["status"] == [1]
    message = answer["stderr"][0]
    assert "Traceback" not in message
    assert f"StorageError: cannot write {out}/checkpoints/step_000000008.safetensors: File too large" in message
    assert "step_000000004.safetensors is intact" in message
    assert f"Then go on with: again --resume {out}" in message
    assert train(out, resume=True)["status"] == [0]
    assert_same_run(out, uninterrupted())


def test_two_ranks_agree_on_a_signal_and_resume_bit_identically(train, uninterrupted, tmp_path):
    out = tmp_path / "run"
    answer = train(out, ranks=2, fault=["before", 6], signals=["SIGTERM"], fault_rank=1)
    assert answer["status"] == [143, 143]
    assert "Stopped and saved at step 6" in answer["stderr"][0]
    assert "step" not in answer["stderr"][1]
    answer = train(out, resume=True)
    assert answer["status"] == [1]
    assert "written by 2 processes, this run has 1" in answer["stderr"][0]
    assert train(out, ranks=2, resume=True)["status"] == [0, 0]
    assert_same_run(out, uninterrupted(ranks=2))
    assert final_state(out) != final_state(uninterrupted())


def test_two_ranks_agree_on_a_loss_that_is_not_finite(train, tmp_path):
    answer = train(tmp_path / "run", ranks=2, nan=[1, 6])
    assert answer["status"] == [1, 1]
    for text in answer["stderr"]:
        assert "NonFiniteLoss: the loss is not finite at step 6, batch ids [" in text
        assert "step_000000004.safetensors" in text


def test_a_taken_folder_stops_every_rank(train, uninterrupted):
    answer = train(uninterrupted(), ranks=2)
    assert answer["status"] == [1, 1]
    assert "already holds a run" in answer["stderr"][0]
    assert "rank 0 could not start the run" in answer["stderr"][1]
