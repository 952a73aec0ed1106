"""Training: one visible loop, the same on a CPU, one GPU, or every process of a torchrun job."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lab_shared.checkpoint import save_weights, seed_everything
from lab_shared.dist import Dist, init, weighted_mean_loss
from lab_shared.ema import Ema
from lab_shared.errors import UserError
from lab_shared.loop import ticks
from lab_shared.memory import lower_when_full
from lab_shared.optim import lr_multiplier, make_optimizer
from lab_shared.run import Run, default_folder
from lab_shared.runs import refuse_taken, start_run
from torch import Tensor, nn
from torch.optim import Optimizer

from iceaggr.config import OptimConfig, TrainConfig
from iceaggr.data.batches import TokenBatches, checked_tokens
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.prepare import STREAM, Prepared, prepare, split
from iceaggr.data.pulse_batches import PulseBatch, PulseBatches
from iceaggr.data.pulses import TokenBatch
from iceaggr.evaluate import remember_training_events, table, write_evaluation
from iceaggr.geometry import Geometry, icecube86
from iceaggr.losses import angle_loss, mixture_nll, pointing, vmf_nll
from iceaggr.metrics import opening_angle_deg
from iceaggr.models.build import Model, build_model, not_hidden
from iceaggr.predict import autocast, model_inputs, predict_events, token_budget
from iceaggr.report import write_report
from iceaggr.sim.feed import SimulatedFeed

ORACLE_EVENTS = {"cpu": 0, "cuda": 5000}
"""Held-out simulated events that the oracle fits unless told otherwise; on a CPU it takes about as long as training."""


def train(config: TrainConfig, out: Path | None = None, *, name: str = "run") -> str | None:
    """Run a configuration from nothing to its report; returns the result table on rank 0, None on the others.

    out: run folder, made here; default runs/iceaggr/NAME-seedS-TIME.
    """
    if out is None:
        out = default_folder("runs/iceaggr", name, config.seed)
    refuse_what_cannot_be(config)  # before there is a folder
    refuse_taken("iceaggr", out)
    with init() as dist:
        data = _data(config, dist)  # what is wrong with it leaves no folder behind
        with start_run("iceaggr", config, out, dist) as run:
            return _train(config, run, dist, data)


def resume(path: Path) -> str | None:
    """Continue a stopped run from its newest checkpoint; bit-identical to never having stopped (on a CPU)."""
    with init() as dist, Run.open(path, dist=dist) as run:
        return _train(run.config(TrainConfig), run, dist)


class Parts(NamedTuple):
    """What a training loop works with."""

    batches: TokenBatches | SimulatedFeed
    model: Model
    forward: nn.Module  # the model, compiled and wrapped for data parallelism where that applies
    optimizer: Optimizer


def training_parts(
    config: TrainConfig,
    cache: EventCache,
    events: np.ndarray,
    tables: Tables,
    dist: Dist,
    geometry: Geometry | None = None,
) -> Parts:
    """Batches, model and optimizer of a configuration, on the device of `dist`.

    Batches are of these events of the store, or with data.data = "stream" simulated on the way with this geometry.
    """
    refuse_what_cannot_be(config)
    device = dist.device
    options: dict[str, Any] = {
        "token_budget": token_budget(config, device),
        "seed": config.seed,
        "rank": dist.rank,
        "world": dist.world,
        "rotate": config.optim.rotate,
        "static": device.type == "cuda",
    }
    batches: TokenBatches | SimulatedFeed
    if config.data.data == STREAM:
        epoch = config.data.train_events or 0  # prepare() has refused 0
        array = geometry or icecube86()
        batches = SimulatedFeed(config.model, tables, array, events_per_epoch=epoch, **options)
    elif config.model.arch == "hierarchical":
        batches = PulseBatches(cache, events, config.model, tables, **options)
    else:
        batches = TokenBatches(cache, events, config.model, tables, **options)
    model = build_model(config.model).to(device)
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


def refuse_what_cannot_be(config: TrainConfig) -> None:
    """Raise UserError for options that contradict each other."""
    if not config.optim.vmf_weight and not config.optim.angle_weight:
        raise UserError("optim.vmf_weight and optim.angle_weight are both 0, so there is nothing to learn: set one")
    hierarchical, components = config.model.arch == "hierarchical", config.model.head_mixture
    if hierarchical and config.data.data == STREAM:
        raise UserError("data.data = stream makes tokens, which arch = hierarchical does not take: give it a folder")
    if hierarchical and (components > 1 or config.model.interval):
        raise UserError("model.head_mixture and model.interval are for the flat models: leave them out")
    if components > 1 and not config.optim.vmf_weight:
        raise UserError(f"model.head_mixture = {components} learns nothing without optim.vmf_weight: set it to 1")
    if config.tta < 1:
        raise UserError(f"tta = {config.tta}: a prediction needs at least one look at the event")
    with torch.device("meta"):
        build_model(config.model)  # raises for sizes that do not go together


def loss_sums(out_EC: Tensor, batch: TokenBatch | PulseBatch, optim: OptimConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over this process's events of the training loss and of the opening angle (rad), and their number.

    out_EC: v_E3, or a mixture (E, 4 K), whose angle is that of its mean direction.
    """
    assert batch.target_E3 is not None  # split() refuses unlabelled data
    angle_sum, n = angle_loss(pointing(out_EC), batch.target_E3, batch.valid_E)
    loss_sum = optim.angle_weight * angle_sum
    if optim.vmf_weight:
        nll = vmf_nll if out_EC.shape[1] == 3 else mixture_nll
        loss_sum = loss_sum + optim.vmf_weight * nll(out_EC, batch.target_E3, batch.valid_E)[0]
    return loss_sum, angle_sum.detach(), n


class Fitted(NamedTuple):
    """A trained model (with the average of its weights where optim.ema asks for it) and what to judge it on."""

    model: Model
    data: Prepared
    held_out_E: np.ndarray
    tables: Tables


@lower_when_full("--tokens-per-batch")
def _train(config: TrainConfig, run: Run, dist: Dist, data: Prepared | None = None) -> str | None:
    model, data, held_out_E, tables = fit(config, run, dist, data)
    if not dist.is_main:
        return None
    oracle = config.oracle if config.oracle is not None else ORACLE_EVENTS[dist.device.type]
    result = write_evaluation(
        run.path, model, data.cache, held_out_E, config, tables, label=data.label, folder=data.folder, oracle=oracle
    )
    run.finish({"label": data.label, **result["predictors"]["model"]})
    return f"{table(result)}\n\nreport: {write_report(run.path)}"


@lower_when_full("--data.train-events")
def _data(config: TrainConfig, dist: Dist) -> Prepared:
    """The events to train on and those held out. Raises UserError for what cannot be split or batched."""
    data = prepare(config.data, seed=config.seed, device=dist.device.type)
    train_E, _ = split(data.cache, config.data)
    if train_E.size and config.model.arch != "hierarchical":
        checked_tokens(data.cache, train_E, config.model, token_budget(config, dist.device))
    return data


@lower_when_full("--tokens-per-batch")
def fit(config: TrainConfig, run: Run, dist: Dist, data: Prepared | None = None) -> Fitted:
    """All optimiser steps of a run that it has not taken yet; its weights stand in weights.safetensors then.

    data: None prepares what the configuration says.
    """
    seed_everything(config.seed)
    if data is None:
        data = prepare(config.data, seed=config.seed, device=dist.device.type)
    train_E, held_out_E = split(data.cache, config.data)
    look_E = held_out_E[:: max(1, held_out_E.size // 2000)]
    tables = Tables.of(data.geometry, dist.device)
    batches, model, forward, optimizer = training_parts(config, data.cache, train_E, tables, dist, data.geometry)
    ema = Ema(model, config.optim.ema) if config.optim.ema else None
    steps = max(1, round(config.epochs * batches.steps_per_epoch))
    warmup = round(config.optim.warmup * steps)
    shown = f"{train_E.size:,}" if train_E.size else "endless"
    run.progress.line(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {shown} training and "
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
        state={"data": batches} | ({} if ema is None else {"ema": ema}),
        unit="events",
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        dist=dist,
    ):
        batch = next(batches)
        with autocast(config, dist.device):
            out_EC = forward(*model_inputs(batch))
        loss_sum, angle_sum, n = loss_sums(out_EC, batch, config.optim)
        loss = weighted_mean_loss(loss_sum, n, dist)
        event_ids = data.cache.event_id[batch.index_E] if train_E.size else batch.index_E
        tick.update(loss, ids=event_ids, n=batch.n_events, angle_deg=torch.rad2deg(angle_sum / n))
        if ema is not None:
            ema.update()
        if tick.every(config.eval_every) and dist.is_main:
            with nullcontext() if ema is None else ema.applied():
                v_N3 = predict_events(model, data.cache, look_E, config, tables)
            tick.log("val", angle_deg=float(opening_angle_deg(v_N3, data.cache.direction_E3[look_E]).mean()))

    batches.close()
    if ema is not None:
        ema.copy_to_model()
        if dist.is_main:
            save_weights(run.path / "weights.safetensors", model)
    return Fitted(model, data, held_out_E, tables)
