"""Training: one visible loop. ticks() saves and restores torch's generators, which the lines are drawn from."""

from pathlib import Path

import torch
from lab_shared.checkpoint import seed_everything
from lab_shared.dist import Dist, init, weighted_mean_loss
from lab_shared.loop import ticks
from lab_shared.optim import lr_multiplier, make_optimizer
from lab_shared.run import Run, default_folder
from lab_shared.runs import start_run
from torch.nn import functional as F

from mirror.config import TrainConfig
from mirror.model import Head


def train(config: TrainConfig, out: Path | None = None, *, name: str = "run") -> str:
    """Train in the folder `out`; the result in one line."""
    out = out or default_folder("runs/mirror", name, config.seed)
    with init() as dist, start_run("mirror", config, out, dist) as run:
        return _train(config, run, dist)


def resume(path: Path) -> str:
    """Go on with a stopped run; on a CPU to the same bits as if it had never stopped."""
    with init() as dist, Run.open(path, dist=dist) as run:
        return _train(run.config(TrainConfig), run, dist)


def _train(config: TrainConfig, run: Run, dist: Dist) -> str:
    seed_everything(config.seed + dist.rank)
    model = Head(config).to(dist.device)
    forward, optimizer = dist.wrap(model), make_optimizer(model, lr=config.lr, kind="adamw")
    for tick in ticks(
        run, config.steps, model=model, optimizer=optimizer, dist=dist, unit="lines", checkpoint_every=50,
        lr=lambda step: lr_multiplier("cosine", step, config.steps),
    ):  # fmt: skip
        x_BN = torch.randint(config.letters, (config.batch, config.length), device=dist.device)
        loss_sum = F.cross_entropy(forward(x_BN).flatten(0, 1), x_BN.flip(1).flatten()) * config.batch
        tick.update(weighted_mean_loss(loss_sum, config.batch, dist), n=config.batch)
    x_BN = torch.randint(config.letters, (1000, config.length), generator=torch.Generator().manual_seed(1))
    accuracy = float((model(x_BN.to(dist.device)).argmax(-1).cpu() == x_BN.flip(1)).float().mean())
    run.finish({"label": "generated lines", "accuracy": accuracy})
    return f"accuracy {accuracy:.3f} on 1,000 generated lines, chance {1 / config.letters:.3f}"
