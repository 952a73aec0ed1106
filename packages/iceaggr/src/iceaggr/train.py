"""Training: one visible loop, the same on a CPU, one GPU, or every process of a torchrun job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lab_shared.checkpoint import seed_everything
from lab_shared.dist import Dist, init, weighted_mean_loss
from lab_shared.loop import ticks
from lab_shared.optim import lr_multiplier, make_optimizer
from lab_shared.run import Run
from torch import Tensor, nn
from torch.optim import Optimizer

from iceaggr.config import OptimConfig, TrainConfig
from iceaggr.data.batches import TokenBatches
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables, feature_width
from iceaggr.data.prepare import prepare, split
from iceaggr.data.pulses import TokenBatch
from iceaggr.evaluate import remember_training_events, table, write_evaluation
from iceaggr.losses import angle_loss, vmf_nll
from iceaggr.metrics import opening_angle_deg
from iceaggr.models.flat import FlatTransformer, build_model, not_hidden
from iceaggr.predict import autocast, predict_events, token_budget, token_mask
from iceaggr.report import write_report

RESUME = "uv run iceaggr train --resume {path}"


def train(config: TrainConfig, out: Path | None = None, *, name: str = "run") -> str | None:
    """Run a configuration from nothing to its report; returns the result table on rank 0, None on the others.

    out: run folder, made here; default runs/iceaggr/NAME-seedS-TIME.
    """
    if out is None:
        out = Path("runs/iceaggr") / f"{name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    with (
        init() as dist,
        Run.create(
            out,
            config,
            seed=config.seed,
            project="iceaggr",
            resume_command=RESUME,
            wandb=config.wandb,
            dist=dist,
        ) as run,
    ):
        return _train(config, run, dist)


def resume(path: Path) -> str | None:
    """Continue a stopped run from its newest checkpoint; bit-identical to never having stopped (on a CPU)."""
    with init() as dist, Run.open(path, dist=dist) as run:
        return _train(run.config(TrainConfig), run, dist)


class Parts(NamedTuple):
    """What a training loop works with."""

    batches: TokenBatches
    model: FlatTransformer
    forward: nn.Module  # the model, compiled and wrapped for data parallelism where that applies
    optimizer: Optimizer


def training_parts(config: TrainConfig, cache: EventCache, events: np.ndarray, tables: Tables, dist: Dist) -> Parts:
    """Batches, model and optimizer of a configuration, on the device of `dist`."""
    device = dist.device
    batches = TokenBatches(
        cache,
        events,
        config.model,
        tables,
        token_budget=token_budget(config, device),
        seed=config.seed,
        rank=dist.rank,
        world=dist.world,
        rotate=config.optim.rotate,
        static=device.type == "cuda",
    )
    model = build_model(config.model, feature_width(config.model)).to(device)
    optimizer = make_optimizer(
        model,
        kind=config.optim.optimizer,
        lr=config.optim.lr,
        muon_lr=config.optim.muon_lr,
        weight_decay=config.optim.weight_decay,
        not_hidden=not_hidden(model),
    )
    compiled = device.type == "cuda" if config.compile is None else config.compile
    # A small model's step is short beside the launches of its kernels: without gradient hooks between them they are
    # replayed as CUDA graphs.
    mode = "reduce-overhead" if device.type == "cuda" and dist.world == 1 else None
    forward: Any = torch.compile(model, dynamic=False, mode=mode) if compiled else model
    return Parts(batches, model, dist.wrap(forward), optimizer)


def loss_sums(v_E3: Tensor, batch: TokenBatch, optim: OptimConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over this process's events of the training loss and of the opening angle (rad), and their number."""
    assert batch.target_E3 is not None  # split() refuses unlabelled data
    angle_sum, n = angle_loss(v_E3, batch.target_E3, batch.valid_E)
    loss_sum = optim.angle_weight * angle_sum
    if optim.vmf_weight:
        loss_sum = loss_sum + optim.vmf_weight * vmf_nll(v_E3, batch.target_E3, batch.valid_E)[0]
    return loss_sum, angle_sum.detach(), n


def _train(config: TrainConfig, run: Run, dist: Dist) -> str | None:
    seed_everything(config.seed)
    data = prepare(config.data, seed=config.seed, device=dist.device.type)
    train_E, held_out_E = split(data.cache, config.data)
    look_E = held_out_E[:: max(1, held_out_E.size // 2000)]
    tables = Tables.of(data.geometry, dist.device)
    batches, model, forward, optimizer = training_parts(config, data.cache, train_E, tables, dist)
    steps = max(1, round(config.epochs * batches.steps_per_epoch))
    warmup = round(config.optim.warmup * steps)
    run.progress.line(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {train_E.size:,} training and "
        f"{held_out_E.size:,} held-out events ({data.label}), {steps:,} steps on {dist.world} x {dist.device.type}"
    )
    if dist.is_main:
        remember_training_events(run.path, data.cache.event_id[train_E])

    for tick in ticks(
        run,
        steps,
        model=model,
        optimizer=optimizer,
        lr=lambda step: lr_multiplier(config.optim.schedule, step, steps, warmup=warmup),
        clip=config.optim.clip,
        state={"data": batches},
        unit="events",
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        dist=dist,
    ):
        batch = next(batches)
        with autocast(config, dist.device):
            v_E3 = forward(batch.features_TF, token_mask(batch), batch.cls_E)
        loss_sum, angle_sum, n = loss_sums(v_E3, batch, config.optim)
        loss = weighted_mean_loss(loss_sum, n, dist)
        event_ids = data.cache.event_id[batch.index_E]
        tick.update(loss, ids=event_ids, n=batch.n_events, angle_deg=torch.rad2deg(angle_sum / n))
        if tick.every(config.eval_every) and dist.is_main:
            v_N3 = predict_events(model, data.cache, look_E, config, tables)
            tick.log("val", angle_deg=float(opening_angle_deg(v_N3, data.cache.direction_E3[look_E]).mean()))

    batches.close()
    if not dist.is_main:
        return None
    result = write_evaluation(run.path, model, data.cache, held_out_E, config, tables, label=data.label)
    run.finish({"label": data.label, **result["predictors"]["model"]})
    return f"{table(result)}\n\nreport: {write_report(run.path)}"
