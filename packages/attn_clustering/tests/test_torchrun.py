"""Training under torchrun: two processes learn what one does, and go on by themselves when one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attn_clustering.cli import main
from lab_shared.dist import torchrun
from lab_shared.run import read_metrics
from safetensors.numpy import load_file

SHORT = {"optim.steps": "6", "optim.log-every": "1", "optim.checkpoint-every": "2", "device": "cpu"}
TRAIN = ["train", "mha-shuffled", *(word for name, value in SHORT.items() for word in (f"--{name}", value))]
DEATH = 4
"""The step in whose middle rank 1 dies, in the first attempt."""


def die_in_the_middle() -> None:
    from lab_shared.optim import MuonAdamW

    step, calls = MuonAdamW.step, []

    def step_or_die(self, *args):
        calls.append(1)
        if len(calls) == DEATH and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    MuonAdamW.step = step_or_die


def on_two_processes(out: Path, how: str, *flags: str, max_restarts: int = 0) -> Path:
    program = torchrun(2, __file__, how, *TRAIN, *flags, "--out", str(out), max_restarts=max_restarts)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_two_processes(tmp_path_factory.mktemp("runs") / "two", "whole")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, two: Path) -> None:
    assert main([*TRAIN, "--out", str(tmp_path / "one")]) == 0
    for ours, theirs in zip(read_metrics(tmp_path / "one"), read_metrics(two), strict=True):
        for name in {"loss", "grad_norm"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours, name)
    one, other = (load_file(folder / "weights.safetensors") for folder in (tmp_path / "one", two))
    for name, weight in one.items():
        # Muon amplifies rounding in the small singular directions of a gradient.
        np.testing.assert_allclose(other[name], weight, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_after_a_killed_worker_the_job_goes_on_from_its_checkpoint(tmp_path: Path, two: Path) -> None:
    out = on_two_processes(tmp_path / "killed", "killed", max_restarts=1)
    log = read_metrics(out)
    assert [record["step"] for record in log] == [record["step"] for record in read_metrics(two)]
    assert (out / "dirty.resume1.diff").exists() or '"resumes": []' not in (out / "manifest.json").read_text()
    one, other = (load_file(folder / "weights.safetensors") for folder in (out, two))
    assert all(np.array_equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["off", "on"])
def test_two_gpus_learn_what_one_does(tmp_path: Path, graph: str) -> None:
    """With DistributedDataParallel, and with the sum over ranks inside the recorded step."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    flags = ["--device", "cuda", "--optim.dtype", "float32", "--optim.steps", "8", "--optim.step-graph", graph]
    assert main([*TRAIN, *flags, "--out", str(tmp_path / "one")]) == 0
    on_two_processes(tmp_path / "two", "whole", *flags)
    one, two = ([record["loss"] for record in read_metrics(tmp_path / name, "train")] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=2e-3)


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        die_in_the_middle()
    raise SystemExit(main(sys.argv[2:]))
