"""Training under torchrun: two processes learn what one does, on generated data and on text."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gauge_attn.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from gauge_attn.data import Batches, load_corpus
from gauge_attn.train import train_in
from lab_shared.dist import Dist, init, torchrun
from lab_shared.run import read_metrics
from safetensors.numpy import load_file

CONFIG = TrainConfig(
    model=ModelConfig(
        spec="1x0e+1x1e", layers=2, scalars=8, copies=2, hidden=8, value_scalars=2, kappa_mode="learnable"
    ),
    optim=OptimConfig(alignment=0.01),
    data=DataConfig(keys=4, window=8, batch=6, val_windows=4),
    steps=5,
    log_every=1,
    wandb="disabled",
)
CONFIGS = {
    "practical": CONFIG,
    "faithful": replace(CONFIG, model=ModelConfig(arch="faithful", spec="1x0e+1x1e", kappa_mode="standardised")),
}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        torchrun(2, __file__, str(tmp_path)), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, config in CONFIGS.items():
        train_in(config, tmp_path / f"{name}-alone", Dist())
        both = [read_metrics(tmp_path / f"{name}-{kind}", "train") for kind in ("alone", "two")]
        for ours, theirs in zip(*both, strict=True):
            for metric in ("loss", "ce", "grad_norm"):
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), (name, metric)
        alone, two = (load_file(tmp_path / f"{name}-{kind}" / "weights.safetensors") for kind in ("alone", "two"))
        for key, weight in alone.items():
            np.testing.assert_allclose(two[key], weight, atol=2e-6, err_msg=f"{name} {key}")


@pytest.mark.parametrize("world", [2, 3])
def test_shares_make_up_the_batch_of_one_process(world: int) -> None:
    corpus, device = load_corpus(CONFIG.data), torch.device("cpu")
    whole = Batches(corpus, seed=3, device=device)
    shares = [Batches(corpus, seed=3, device=device, rank=r, world=world) for r in range(world)]
    for _ in range(2):
        assert torch.equal(torch.cat([next(share) for share in shares]), next(whole))


if __name__ == "__main__":
    with init("cpu") as dist:
        for name, config in CONFIGS.items():
            train_in(config, Path(sys.argv[1]) / f"{name}-two", dist)
