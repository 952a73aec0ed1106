"""Training under torchrun: two processes learn what one does, whatever the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_shared.dist import Dist, init, torchrun
from lab_shared.run import Run, read_metrics
from rh_memory import train as train_module
from rh_memory.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from rh_memory.data.unfold import Spacings
from rh_memory.data.windows import SpacingData
from rh_memory.train import WindowStream
from safetensors.numpy import load_file

MODEL = ModelConfig(context=32, d_model=32, layers=2, heads=2, dropout=0.0, n_memory=4, pos="rope", sigma_floor=1e-3)
CONFIG = TrainConfig(
    model=MODEL,
    optim=OptimConfig(lr=3e-3, weight_decay=0.1, warmup=2),
    batch_size=6,
    steps=5,
    eval_every=5,
    log_every=1,
    eval_windows=8,
)
MODELS = {
    "e0": MODEL,
    "explicit": replace(MODEL, inputs="height", values="prime_rotary"),
    "postfix": replace(MODEL, memory="postfix", readouts=4),
    "rollout": replace(MODEL, memory="prefix"),
}
ROLLOUT = LossConfig(drift_weight=0.1, drift_every=1, drift_horizon=6, drift_batch=4)


def train_all(zeros: str, folder: Path, dist: Dist) -> None:
    """What each rank runs, and one process alone."""
    for name, model in MODELS.items():
        loss = ROLLOUT if name == "rollout" else CONFIG.loss
        config = replace(CONFIG, model=model, loss=loss, data=DataConfig(file=zeros))
        options = {"project": "test", "resume_command": "{path}", "wandb": "disabled", "dist": dist}
        with Run.create(folder / name, config, seed=0, **options) as run:
            train_module._train(config, run, dist)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(zeros_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = torchrun(2, __file__, str(zeros_file), str(tmp_path / "two"))
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(train_module, "_finish", lambda *_: "")
    train_all(str(zeros_file), tmp_path / "one", Dist())
    for name in MODELS:
        one, two = (read_metrics(tmp_path / kind / name, "train") for kind in ("one", "two"))
        for ours, theirs in zip(one, two, strict=True):
            for metric in ("loss", "nll", "grad_norm"):
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), (name, metric)
        weights = [load_file(tmp_path / kind / name / "weights.safetensors") for kind in ("one", "two")]
        for key, weight in weights[0].items():
            np.testing.assert_allclose(weights[1][key], weight, atol=2e-6, err_msg=f"{name} {key}")


def test_shares_make_up_the_batch_of_one_process() -> None:
    n = 200
    spacings = Spacings(np.arange(n, dtype=np.float32), np.arange(n) + 1e3, np.zeros(n), np.ones(n, np.float32))
    data, starts = SpacingData(spacings), torch.arange(n - 5)
    whole = WindowStream(data, starts, 5, 6, 3)
    shares = [WindowStream(data, starts, 5, 6, 3, rank=r, world=2) for r in range(2)]
    for _ in range(2):
        _, all_B = next(whole)
        for rank, share in enumerate(shares):
            window, starts_B = next(share)
            assert torch.equal(starts_B, all_B[rank::2])
            assert torch.equal(window.s_BW[:, 0], starts_B.float())


if __name__ == "__main__":
    train_module._finish = lambda *_: ""  # the report has nothing to do with ranks
    with init("cpu") as dist:
        train_all(sys.argv[1], Path(sys.argv[2]), dist)
