"""Training: one visible loop, the same on a CPU, one GPU, or every process of a torchrun job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lab_shared.checkpoint import seed_everything
from lab_shared.dist import Dist, init, weighted_mean_loss
from lab_shared.files import atomic_write
from lab_shared.graphs import StepGraph
from lab_shared.loop import ticks
from lab_shared.memory import lower_when_full
from lab_shared.optim import lr_multiplier
from lab_shared.run import Run, default_folder
from lab_shared.runs import start_run
from torch import Tensor
from torch.nn import functional as F

from gauge_attn.checks import checked, checked_run
from gauge_attn.compiled import COMPILE_FROM, compiled_model
from gauge_attn.config import TrainConfig
from gauge_attn.data import Batches, Corpus, Windows, load_corpus, remember_text, same_text, windows
from gauge_attn.evaluate import TOKENIZER, autocast, diagnose, mean_loss, table, write_evaluation
from gauge_attn.measure import calibrate
from gauge_attn.models import Model, build_model, build_optimizer
from gauge_attn.report import write_report


def train(config: TrainConfig, out: Path | None = None, *, name: str = "run") -> str | None:
    """Run a configuration from nothing to its report; returns the result as text on rank 0, None on the others.

    out: run folder, made here; default runs/gauge_attn/NAME-seedS-TIME.
    """
    if out is None:
        out = default_folder("runs/gauge_attn", name, config.seed)
    with init() as dist:
        result = train_in(config, out, dist)
    return None if result is None else f"{table(result)}\n\nreport: {write_report(out)}"


def resume(path: Path) -> str | None:
    """Continue a stopped run from its newest checkpoint; bit-identical to never having stopped (on a CPU)."""
    with init() as dist, Run.open(path, dist=dist) as run:
        config = checked_run(run.path, run.config(TrainConfig))
        result = _train(config, _prepare(config, dist), run, dist)
    return None if result is None else f"{table(result)}\n\nreport: {write_report(path)}"


def train_in(config: TrainConfig, out: Path, dist: Dist) -> dict[str, Any] | None:
    """Train in the folder `out`, from nothing or from where it was stopped; the evaluation on rank 0.

    The folder is made once the data and the model are there: what is wrong with them leaves none behind.
    """
    prepared = _prepare(checked(config), dist)
    with start_run("gauge-attn", config, out, dist, go_on=True) as run:
        return _train(config, prepared, run, dist)


class _Prepared(NamedTuple):
    """What a training starts from."""

    corpus: Corpus
    batches: Batches
    held_out: Windows
    model: Model


@lower_when_full("--data.batch", "--data.window")
def _prepare(config: TrainConfig, dist: Dist) -> _Prepared:
    seed_everything(config.seed)
    device = dist.device
    corpus = load_corpus(config.data)
    batches = Batches(corpus, seed=config.seed, device=device, rank=dist.rank, world=dist.world)
    held_out = windows(corpus, "valid", device, seed=config.seed)
    model = build_model(config.model, corpus.vocab, config.data.window, config.optim).to(device)
    calibrate(model, next(Batches(corpus, seed=config.seed, device=device))[:, :-1])
    return _Prepared(corpus, batches, held_out, model)


@lower_when_full("--data.batch", "--data.window")
def _train(config: TrainConfig, prepared: _Prepared, run: Run, dist: Dist) -> dict[str, Any] | None:
    device = dist.device
    corpus, batches, held_out, model = prepared
    optimizer = build_optimizer(model, config.optim)
    fast = config.compile
    if fast is None:
        fast = device.type == "cuda" and config.steps >= COMPILE_FROM
    recorded = fast and device.type == "cuda" and dist.world == 1
    forward: Any = model
    if fast:
        run.progress.line("Compiling the model takes about a minute (--compile False goes without)")
        example_BN = next(Batches(corpus, seed=config.seed, device=device, rank=dist.rank, world=dist.world))[:, :-1]
        forward = compiled_model(model, example_BN)
    if not recorded:
        forward = dist.wrap(forward)
    metrics: dict[str, Tensor] = {}

    def loss_of(tokens_BN: Tensor) -> Tensor:
        """What is minimised. Its parts are left in `metrics`, whose tensors a recorded step fills anew."""
        with autocast(config, device, cache=not recorded):  # converted weights would outlive the recording
            out = forward(tokens_BN[:, :-1])
        loss = F.cross_entropy(out.logits_BNV.float().flatten(0, 1), tokens_BN[:, 1:].flatten())
        metrics["ce"] = loss.detach()
        if out.alignment is None:
            return loss
        metrics["alignment"] = out.alignment.detach()
        return loss + config.optim.alignment * out.alignment

    step = StepGraph(loss_of, model, optimizer, clip=config.optim.clip) if recorded else None
    yardsticks = corpus.yardsticks()
    run.progress.line(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {corpus.vocab:,} symbols ({corpus.label}), "
        f"{config.steps:,} steps of {config.data.batch} x {config.data.window} tokens on {dist.world} x {device.type}; "
        + ", ".join(f"{name} {nats:.3f}" for name, nats in yardsticks.items())
        + " nats"
    )
    same_text(run.path, corpus)
    if dist.is_main and corpus.tokenizer is not None:
        atomic_write(run.path / TOKENIZER, corpus.tokenizer.to_json())
        remember_text(run.path, corpus)

    for tick in ticks(
        run,
        config.steps,
        model=model,
        optimizer=optimizer,
        lr=lambda step: lr_multiplier(
            config.optim.schedule, step, config.steps, warmup=min(config.optim.warmup, config.steps)
        ),
        clip=config.optim.clip,
        state={"data": batches},
        unit="windows",
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        dist=dist,
    ):
        tokens_BN = next(batches)
        n, ids = tokens_BN.size(0), [f"windows of step {tick.step}"]
        if step is None:
            objective = loss_of(tokens_BN)
            tick.update(weighted_mean_loss(objective * n, n, dist), ids=ids, n=n, **metrics)
        else:
            tick.stepped(*step(tokens_BN), ids=ids, n=n, **metrics)
        if tick.every(config.eval_every) and dist.is_main:
            nats = mean_loss(model, held_out, config)
            tick.log("val", loss=nats, **{f"{name}_loss": value for name, value in yardsticks.items()})
            diagnosis = diagnose(model, held_out)
            run.log(tick.step, "heads", flat(diagnosis))
            for line in diagnosis["lines"]:
                run.progress.line(line)

    if not dist.is_main:
        return None
    result = write_evaluation(run.path, model, corpus, held_out, config)
    run.finish({"label": corpus.label, "loss": result["loss"], "perplexity": result["perplexity"]})
    return result


def flat(diagnosis: dict[str, Any]) -> dict[str, float]:
    """A diagnosis as one level of numbers: "L0.H8.row_std", "mu_dist", ... for the metrics file."""
    numbers = {
        f"L{r['layer']}.H{r['head']}.{name}": r[name]
        for r in diagnosis["heads"]
        for name in ("row_std", "entropy_ratio", "kappa", "attended_kl")
    }
    return numbers | (diagnosis["diversity"] or {})
