"""Training: one visible loop, the same on a CPU, one GPU, or every process of a torchrun job.

Shape suffixes: N sequences, B sequences of a batch, T tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lab_shared.checkpoint import save_weights, seed_everything
from lab_shared.config import read_config
from lab_shared.dist import Dist, init
from lab_shared.errors import UserError
from lab_shared.graphs import StepGraph
from lab_shared.loop import ticks
from lab_shared.memory import lower_when_full
from lab_shared.optim import MuonAdamW, lr_multiplier, make_optimizer
from lab_shared.run import Run, read_metrics
from lab_shared.runs import start_run
from torch import Tensor

from attn_clustering import drope
from attn_clustering.config import OptimConfig, RunConfig
from attn_clustering.model import Transformer, build_model, n_parameters, next_token_targets
from attn_clustering.runs import load_sequences, read_summary, training_data, vocabulary

COMPILE_FROM = 500
"""Steps below which compiling and recording take longer than they save: on an H200 `sanity` waits 9 s for them, and a
step then takes 3 ms in place of 15."""


def train(config: RunConfig, out: Path, *, device: str | None = None) -> dict[str, Any] | None:
    """Run a configuration in the folder `out`, or finish what was begun there; returns its summary on rank 0.

    A finished run is not touched: its summary is read. Raises UserError when `out` holds another configuration.
    """
    with init(device) as dist:
        if (out / "config.json").is_file():
            begun = read_config(RunConfig, out / "config.json")
            if begun != config:
                raise UserError(f"{out} holds a run of another configuration ({begun.name}): choose another folder")
            if (out / "DONE.json").is_file():
                summary = read_summary(out)
                return summary if dist.is_main else None
            with Run.open(out, dist=dist) as run:
                return _train(config, run, dist)
        _check(config, dist)  # before there is a folder
        with start_run("attn-clustering", config, out, dist, wandb=config.optim.wandb) as run:
            return _train(config, run, dist)


def resume(path: Path) -> dict[str, Any] | None:
    """Finish the run in `path` from its newest checkpoint; on a CPU the same bits as if it had never stopped."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no run (no config.json): check the path")
    return train(read_config(RunConfig, path / "config.json"), path)


def training_optimizer(model: Transformer, optim: OptimConfig, *, graphed: bool = False) -> MuonAdamW:
    """Muon on the hidden matrices, AdamW on embedding and gains. graphed: for a step that is one CUDA graph."""
    # Compiling Muon's few large products takes seconds and saves launches, which a graph saves by itself.
    compile_muon = False if graphed or optim.steps < COMPILE_FROM else None
    optimizer = make_optimizer(
        model, lr=optim.lr, muon_lr=optim.muon_lr, weight_decay=optim.weight_decay, compile=compile_muon
    )
    for group in optimizer.param_groups:
        if "eps" in group:  # AdamW's
            group["eps"] = optim.adam_eps
            if optim.decay_gains:
                group["weight_decay"] = optim.weight_decay
    return optimizer


def compile_blocks(model: Transformer, optim: OptimConfig, device: torch.device) -> None:
    """Compile the model in place, as `optim.compile` asks: embedding, block and head.

    The blocks share their code, and so do models of the same shape in one process. The rotation's sines and cosines
    are made outside: a compiler that sees where they come from computes them again for every query and key, which
    took a quarter of a step.
    """
    if optim.compile == "off" or (optim.compile == "auto" and not preparing_pays(optim, device)):
        return
    # One process may train several shapes, each with and without positions: past the default limit of 8 Dynamo would
    # go on uncompiled.
    torch._dynamo.config.recompile_limit = 256
    for part in (model.embed, *model.blocks):
        part.compile(dynamic=False)
    setattr(model, "head", torch.compile(model.head, dynamic=False))  # noqa: B010 - a method, for mypy


def preparing_pays(optim: OptimConfig, device: torch.device) -> bool:
    """Whether a run is long enough, and on the device, for compilation and recording to save time."""
    return device.type == "cuda" and optim.steps >= COMPILE_FROM


def step_graphed(optim: OptimConfig, dist: Dist) -> bool:
    """Whether a training step is to be one CUDA graph; by itself for one process only."""
    pays = dist.world == 1 and preparing_pays(optim, dist.device)
    return optim.step_graph == "on" or (optim.step_graph == "auto" and pays)


def set_precision(model: Transformer, optim: OptimConfig, device: torch.device) -> Callable[[], Any]:
    """Prepare the model for `optim.dtype`; returns what makes the autocast context of a forward pass."""
    dtype = optim.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    low = dtype == "bfloat16"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model.residual_dtype = torch.bfloat16 if low and optim.residual == "bfloat16" else None
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=low)


def evaluate(forward: Callable[..., Tensor], autocast: Callable[[], Any], tokens_NT: Tensor, batch: int) -> float:
    """Mean next-token loss in nats over whole batches of `tokens_NT`, in the arithmetic of training.

    Raises UserError when there is not one whole batch.
    """
    batches = tokens_NT[: len(tokens_NT) // batch * batch].split(batch)
    if not batches or len(batches[0]) < batch:
        raise _too_few(len(tokens_NT), batch)
    losses = []
    # With gradients, which nobody asks for: without them the model would be compiled once more.
    with autocast():
        for tokens_BT in batches:
            losses.append(forward(tokens_BT, next_token_targets(tokens_BT)).detach().double())
    return float(torch.stack(losses).mean())


@lower_when_full("--optim.batch")
def _check(config: RunConfig, dist: Dist) -> None:
    """Raise UserError on every rank for what cannot be trained, on this many processes."""
    optim = config.optim
    if optim.batch % dist.world:
        raise UserError(
            f"optim.batch={optim.batch} does not divide among {dist.world} processes: it is the total, set a multiple"
        )
    if vocabulary(config.data) > config.model.vocab:
        raise UserError(
            f"the data have {vocabulary(config.data)} tokens, the model {config.model.vocab}: set model.vocab"
        )
    val_NT = load_sequences(config.data, "val", str(dist.device)).tokens_NT[: optim.eval_sequences]
    if val_NT.size(1) < 2:
        raise UserError("sequences of one token have no next token to predict: set a longer seq_len")
    if len(val_NT) < optim.batch:
        raise _too_few(len(val_NT), optim.batch)


def _val_losses(run: Run) -> dict[int, float]:
    """Step -> validation loss, of what is left in metrics.jsonl."""
    return {r["step"]: r["loss"] for r in read_metrics(run.path, "val") if isinstance(r.get("loss"), float)}


def _too_few(sequences: int, batch: int) -> UserError:
    return UserError(f"{sequences} validation sequences are less than one batch of {batch}: lower optim.batch")


@lower_when_full("--optim.batch")
def _train(config: RunConfig, run: Run, dist: Dist) -> dict[str, Any] | None:
    _check(config, dist)
    optim, device = config.optim, dist.device
    seed_everything(config.seed)
    phase_1 = config.recal is None
    model = build_model(config.model, config.seed) if phase_1 else drope.starting_model(config, run.path)
    model = model.to(device).train()
    autocast = set_precision(model, optim, device)
    compile_blocks(model, optim, device)
    val_NT = load_sequences(config.data, "val", str(device)).tokens_NT[: optim.eval_sequences]
    summary: dict[str, Any] = {"name": config.name, "phase": config.phase, "parameters": n_parameters(config.model)}
    run.progress.line(f"{config.name}: {summary['parameters']:,} parameters, {dist.world} x {device.type}")
    if dist.is_main and 0 not in _val_losses(run):
        run.log(0, "val", {"loss": evaluate(model, autocast, val_NT, optim.batch)})

    if optim.steps:
        sequences, order = training_data(config, str(device), run.path)
        tokens_NT, index_S = sequences.tokens_NT, order.index_S.to(device)
        if dist.is_main:
            order.save(run.path / "plan.npz")
        summary |= {"epochs": order.epochs, "plan": order.hash, "sequences": len(tokens_NT)}
        run.progress.line(
            f"{optim.steps:,} steps of {optim.batch} x {tokens_NT.size(1)} tokens, "
            f"{order.epochs:.2f} epochs of {len(tokens_NT):,} sequences, {order.kind}"
        )
        graphed = step_graphed(optim, dist)
        forward = model if graphed else dist.wrap(model)
        optimizer = training_optimizer(model, optim, graphed=graphed)

        def loss_of(tokens_BT: Tensor) -> Tensor:
            with autocast():
                loss: Tensor = forward(tokens_BT, next_token_targets(tokens_BT))
            return loss

        graph = StepGraph(loss_of, model, optimizer, clip=optim.clip, dist=dist) if graphed else None
        for tick in ticks(
            run,
            optim.steps,
            model=model,
            optimizer=optimizer,
            lr=lambda step: lr_multiplier(optim.schedule, step, optim.steps, warmup=min(optim.warmup, optim.steps)),
            clip=optim.clip,
            unit="tokens",
            log_every=optim.log_every,
            checkpoint_every=optim.checkpoint_every,
            keep=1,
            dist=dist,
        ):
            start = (tick.step - 1) * optim.batch
            ids_B = index_S[start + dist.rank : start + optim.batch : dist.world]
            tokens_BT = tokens_NT[ids_B]
            if graph is None:
                tick.update(loss_of(tokens_BT), ids=ids_B, n=tokens_BT.numel())
            else:
                tick.stepped(*graph(tokens_BT), ids=ids_B, n=tokens_BT.numel())
            if tick.every(optim.eval_every) and dist.is_main:
                tick.log("val", loss=evaluate(model, autocast, val_NT, optim.batch))
    elif dist.is_main:
        save_weights(run.path / "weights.safetensors", model)

    if not dist.is_main:
        return None
    losses = _val_losses(run)
    if optim.steps not in losses:  # metrics.jsonl lost lines between the last checkpoint and here
        losses[optim.steps] = evaluate(model, autocast, val_NT, optim.batch)
        run.log(optim.steps, "val", {"loss": losses[optim.steps]})
    last = losses[optim.steps]
    summary |= {"steps": optim.steps, "val_loss": last, "val_loss_at_start": losses[0], "train_s": run.elapsed}
    if not phase_1:
        summary |= drope.verdict(config, run.path, last)
        run.progress.line(drope.verdict_line(summary))
    run.finish(summary)
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # as large as the model three times, and of no use any more
    return summary
