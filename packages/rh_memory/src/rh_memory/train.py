"""Training: one visible loop, the same on a CPU, one GPU, or every process of a torchrun job.

Shapes: B windows of this process, T targets of a window.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.checkpoint import load_weights, save_weights, seed_everything
from lab_shared.dist import Dist, init
from lab_shared.ema import Ema
from lab_shared.errors import UserError
from lab_shared.loop import ticks
from lab_shared.memory import lower_when_full
from lab_shared.muon import BatchedMuon
from lab_shared.optim import MuonAdamW, lr_multiplier, split_params
from lab_shared.run import Run, default_folder
from lab_shared.runs import refuse_taken, start_run
from torch import Tensor, nn

from rh_memory.config import OptimConfig, TrainConfig
from rh_memory.data.windows import SpacingData, WindowBatch
from rh_memory.dataset import ROW, Dataset, load_dataset
from rh_memory.evaluate import PLATEAU, evaluate, table
from rh_memory.models import Model, build_model
from rh_memory.objective import Objective, check_losses, validate


def train(config: TrainConfig, out: Path | None = None, *, name: str = "run") -> str | None:
    """Run a configuration to its report; returns the table of scores on rank 0, None on the others.

    out: run folder, made here; default runs/rh_memory/NAME-seedS-TIME.
    """
    if out is None:
        out = default_folder("runs/rh_memory", name, config.seed)
    refuse_taken("rh-memory", out)
    with init() as dist:
        dataset = _checked_data(config, dist)  # what is wrong with it leaves no folder behind
        with start_run("rh-memory", config, out, dist) as run:
            return _train(config, run, dist, dataset)


def resume(path: Path) -> str | None:
    """Continue a stopped run from its newest checkpoint; bit-identical to never having stopped (on a CPU)."""
    with init() as dist, Run.open(path, dist=dist) as run:
        return _train(run.config(TrainConfig), run, dist)


class WindowStream:
    """Endless random windows, drawn on the device with replacement; its position is its generator's state.

    batch: windows of all processes together, the same for the same seed however many there are; each gets its share.
    mirror: half of the windows, drawn at random, are read downwards.
    """

    def __init__(
        self,
        data: SpacingData,
        starts: Tensor,
        width: int,
        batch: int,
        seed: int,
        *,
        mirror: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._data, self._starts, self._width, self._batch, self._mirror = data, starts, width, batch, mirror
        self._share = slice(rank, None, world)
        self._generator = torch.Generator(starts.device).manual_seed(seed)

    def __iter__(self) -> WindowStream:
        return self

    def __next__(self) -> tuple[WindowBatch, Tensor]:
        """A batch and the indices of its windows' first spacings (B,)."""
        device = self._starts.device
        chosen = torch.randint(self._starts.numel(), (self._batch,), device=device, generator=self._generator)
        starts_B, mirrored_B = self._starts[chosen[self._share]], None
        if self._mirror:
            coin = torch.rand(self._batch, device=device, generator=self._generator)
            mirrored_B = coin[self._share] < 0.5
        return self._data.window(starts_B, self._width, mirrored_B), starts_B

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())


class Patience:
    """The step of the best validation loss so far, as state of a run that may stop early."""

    best_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_step = state["best_step"]


def make_optimizer(model: Model, optim: OptimConfig) -> MuonAdamW:
    """AdamW, or Muon on hidden matrices beside it; slots and readout weights at a rate of their own.

    Weight decay is for matrices only, not for biases, norms, embeddings and slots.
    """
    memory = {"slots.content_MD", "slots.identity_MD", "readout_M"}
    not_hidden = ["backbone.embed_data", "head", *(["slots"] if hasattr(model, "slots") else [])]
    hidden, _, vectors = split_params(model, not_hidden=not_hidden)
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"memory": [], "vectors": [], "matrices": [], "muon": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name in memory:
            groups["memory"].append((name, p))
        elif name in vectors or name == "backbone.position.weight":
            groups["vectors"].append((name, p))
        else:
            groups["muon" if optim.optimizer == "muon" and name in hidden else "matrices"].append((name, p))

    def group(name: str, lr: float, weight_decay: float) -> dict[str, Any]:
        return {"params": groups[name], "lr": lr, "base_lr": lr, "weight_decay": weight_decay}

    adamw = [
        group("memory", optim.lr * optim.memory_lr, 0.0),
        group("vectors", optim.lr, 0.0),
        group("matrices", optim.lr, optim.weight_decay),
    ]
    adamw = [g for g in adamw if g["params"]]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw, lr=optim.lr, betas=(0.9, optim.beta2), fused=True)]
    if groups["muon"]:
        parts.insert(0, BatchedMuon([group("muon", optim.muon_lr, optim.weight_decay)]))
    return MuonAdamW(parts)


def marginal_score(dataset: Dataset, target_BT: Tensor) -> float:
    """Mean NLL of the targets under the histogram of the training spacings: the score of ignoring the context."""
    from rh_memory.baselines import marginal_nll

    train = np.concatenate([dataset.spacings.s[first:last] for first, last in dataset.split.train])
    return float(marginal_nll(train.astype(np.float64), target_BT.flatten().double().cpu().numpy()).mean())


@lower_when_full("--data.zeros")
def _checked_data(config: TrainConfig, dist: Dist) -> Dataset:
    """What to train on. Raises UserError for a configuration that cannot be trained, on this many processes."""
    if config.batch_size % dist.world:
        raise UserError(
            f"batch_size = {config.batch_size} does not divide among {dist.world} processes: it is the total, set a "
            "multiple of them"
        )
    check_losses(config)
    m = config.model
    if config.data.windows == "rows" and m.pos == "learned" and m.context < ROW - 1:
        raise UserError(
            f"model.context = {m.context} learned positions are too few for data.windows = rows, which have {ROW - 1} "
            "spacings of context: set model.context = 256, or model.pos = rope"
        )
    with torch.device("meta"):
        build_model(config.model)  # raises for sizes that do not go together
    return load_dataset(config, dist.device)


@lower_when_full("--batch-size")
def _train(config: TrainConfig, run: Run, dist: Dist, dataset: Dataset | None = None) -> str | None:
    if dataset is None:
        dataset = _checked_data(config, dist)
    seed_everything(config.seed)
    per_process = config.batch_size // dist.world
    data, width = dataset.data, dataset.width
    train_starts, look = dataset.starts("train"), dataset.starts("val", config.eval_windows)
    model = build_model(config.model).to(dist.device)
    optimizer = make_optimizer(model, config.optim)
    ema = Ema(model, config.optim.ema) if config.optim.ema else None
    objective = Objective(config, model, dataset, dist)
    stream = WindowStream(
        data, train_starts, width, config.batch_size, config.seed,
        mirror=config.data.mirror, rank=dist.rank, world=dist.world,
    )  # fmt: skip
    patience = Patience()
    marginal = marginal_score(dataset, data.window(look, width).s_BW[:, objective.index_T])
    run.progress.line(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {train_starts.numel():,} training windows of "
        f"{dataset.label}, {config.steps:,} steps of {config.batch_size} on {dist.world} x {dist.device.type}; "
        f"the spacings' own distribution scores {marginal:.4f} nats"
    )
    warmup = min(config.optim.warmup, config.steps)

    loop: Any = ticks(
        run,
        config.steps,
        model=model,
        optimizer=optimizer,
        lr=lambda step: lr_multiplier("cosine", step, config.steps, warmup=warmup, final=config.optim.final),
        clip=config.optim.clip,
        state={"data": stream, "patience": patience, **({} if ema is None else {"ema": ema})},
        unit="windows",
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        dist=dist,
    )
    for tick in loop:
        batch, starts_B = next(stream)
        loss, parts = objective(batch, tick.step)
        tick.update(loss, ids=starts_B, n=per_process, **parts)
        if ema is not None:
            ema.update()
        if tick.every(config.eval_every):
            with nullcontext() if ema is None else ema.applied():
                found = validate(model, dataset, look, config)
                # rank 0's figure for all, so that every rank stops at the same step
                value = float(dist.reduce_sums({"nll": found["nll"] if dist.is_main else 0.0})["nll"])
                tick.log("val", **found, plateau=abs(value - marginal) < PLATEAU)
                if config.early_stop and tick.keep_best(value):
                    patience.best_step = tick.step
            if config.early_stop and tick.step - patience.best_step >= config.patience:
                loop.close()
                break

    if not dist.is_main:
        return None
    if ema is not None:
        ema.copy_to_model()
    if config.early_stop:  # the best weights are the run's weights
        load_weights(run.path / "best.safetensors", model)
    if config.early_stop or ema is not None:
        save_weights(run.path / "weights.safetensors", model)
    return _finish(run, dataset, marginal, dist)


def _finish(run: Run, dataset: Dataset, marginal: float, dist: Dist) -> str:
    """Evaluation, DONE.json and report of a run whose weights are written; the table."""
    from rh_memory.report import write

    result = evaluate(run.path, device=str(dist.device))
    figures = {name: result[name]["value"] for name in ("nll_last", "nll_all")}
    run.finish({"label": dataset.label, "part": result["part"], "val_marginal": marginal, **figures})
    return f"{table(result)}\n\nreport: {write(run.path)}"
