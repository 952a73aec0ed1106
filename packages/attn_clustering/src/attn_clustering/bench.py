"""Training speed on this machine, measured beside what is required: whole steps, optimiser included."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch
from lab_shared.bench import environment
from lab_shared.dist import init
from lab_shared.errors import UserError
from lab_shared.graphs import StepGraph
from lab_shared.optim import clip_grads, set_lr
from torch import Tensor

from attn_clustering.config import Attention, OptimConfig
from attn_clustering.experiments import Experiment, experiment_named, with_attention
from attn_clustering.model import build_model, n_parameters, next_token_targets
from attn_clustering.train import compile_blocks, set_precision, step_graphed, training_optimizer

# tokens/s that this package promises on one H200 in bfloat16
REQUIRED = {"faithful-v1 mha": 1_500_000, "v2 mha": 550_000}
CASES: dict[str, tuple[tuple[str, Attention], ...]] = {
    "cpu": (("smoke", "mha"),),
    "cuda": (
        ("sanity", "mha"),
        ("controlled-v1", "mha"),
        ("controlled-v1", "gqa"),
        ("faithful-v1", "mha"),
        ("faithful-v1", "gqa"),
        ("v2", "mha"),
    ),
}
REPEATS = 5


def bench(*, device: str | None = None, only: Sequence[str] | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training, and the languages and probes; one row a stage.

    only: stages to keep, of train, languages, probes. quick: fewer steps, rougher figures. Raises UserError for an
    unknown stage.
    """
    stages = list(only or ("train", "languages", "probes"))
    if unknown := set(stages) - {"train", "languages", "probes"}:
        raise UserError(f"--only {' '.join(sorted(unknown))}: the stages are train, languages, probes")
    with init(device) as dist:
        where = dist.device
    rows: list[dict[str, Any]] = []
    if "train" in stages:
        for name, attention in CASES[where.type]:
            rows.append(bench_training(experiment_named(name), attention, device=str(where), quick=quick))
    if "languages" in stages:
        from attn_clustering.data.languages import bench_languages

        rows += bench_languages(str(where))
    if "probes" in stages:
        from attn_clustering.analysis.probes import bench_probes

        rows += bench_probes(str(where))
    return rows


def bench_training(
    experiment: Experiment,
    attention: Attention = "mha",
    *,
    device: str | None = None,
    optim: OptimConfig | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Speed of an experiment's whole training steps on random tokens; `optim` replaces its options (compile, residual).

    Returns {"stage", "tokens_per_s" (median), "quartiles", "ms_per_step", "first_step_s" (compilation), "peak_gb",
    "required", ...}. Counted are the T positions of a sequence, of which T - 1 have a target.
    """
    optim = optim or experiment.optim
    with init(device) as dist:
        where = dist.device
    on_cuda = where.type == "cuda"
    model = build_model(with_attention(experiment.model, attention), 0).to(where)
    autocast, graphed = set_precision(model, optim, where), step_graphed(optim, dist)
    compile_blocks(model, optim, where)
    optimizer, parameters = training_optimizer(model, optim, graphed=graphed), list(model.parameters())
    n_tokens = experiment.data.language.seq_len if experiment.data.language else 512
    pool_NT = torch.randint(experiment.model.vocab, (8 * optim.batch, n_tokens), dtype=torch.int32, device=where)
    ids = torch.randint(len(pool_NT), (64, optim.batch), device=where)

    def loss_of(tokens_BT: Tensor) -> Tensor:
        with autocast():
            return model(tokens_BT, next_token_targets(tokens_BT))

    graph = StepGraph(loss_of, model, optimizer, clip=optim.clip) if graphed else None

    def step(i: int) -> None:
        tokens_BT = pool_NT[ids[i % len(ids)]]
        set_lr(optimizer, 1.0 - i / 10_000)
        if graph is not None:
            graph(tokens_BT)
            return
        loss_of(tokens_BT).backward()
        clip_grads(parameters, optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def seconds(n: int) -> float:
        start = time.perf_counter()
        for i in range(n):
            step(i)
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    first = seconds(1)
    seconds(10 if on_cuda else 2)
    n_steps = (10 if quick else 50) if on_cuda else (3 if quick else 10)
    per_step = [seconds(n_steps) / n_steps for _ in range(REPEATS)]
    rates = [optim.batch * n_tokens / s for s in per_step]
    low, _, high = quantiles(rates, n=4)
    name = f"{experiment.name} {attention}"
    return {
        "stage": f"train {name}",
        "tokens_per_s": median(rates),
        "quartiles": [low, high],
        "repeats": REPEATS,
        "required": REQUIRED.get(name) if on_cuda else None,
        "ms_per_step": 1000 * median(per_step),
        "first_step_s": first,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_cuda else None,
        "parameters": n_parameters(model.config),
        "batch": [optim.batch, n_tokens],
        "compile": optim.compile,
        "step_graph": graphed,
        "residual": optim.residual,
    }


def bench_options(name: str, *, device: str | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """The same training compiled or not, as one CUDA graph or not, with both residual types: what `auto` rests on."""
    experiment = experiment_named(name)
    with init(device) as dist:
        on_cuda = dist.device.type == "cuda"
    variants: list[tuple[Any, Any]] = [("off", "off"), ("block", "off")]
    if on_cuda:
        variants += [("off", "on"), ("block", "on")]
    return [
        bench_training(
            experiment,
            "mha",
            device=device,
            optim=replace(experiment.optim, compile=how, step_graph=graph, residual=residual),
            quick=quick,
        )
        for how, graph in variants
        for residual in ("float32", "bfloat16")
    ]


def record(rows: list[dict[str, Any]], device: str | None) -> dict[str, Any]:
    """The rows with the machine they were measured on, for a file."""
    with init(device) as dist:
        return {"environment": environment(dist.device), "label": "random tokens and generated data", "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row: its main figure beside what is required. Variants of one training are told apart."""
    lines = [f"{'stage':64} {'measured':>16} {'unit':10} {'required':>12}"]
    stages = [row["stage"] for row in rows]
    for row in rows:
        stage = row["stage"]
        if stages.count(stage) > 1:
            stage += f", compile {row['compile']}, step graph {row['step_graph']}, residual {row['residual']}"
        unit = next((key for key in row if key.endswith("_per_s")), "seconds")
        value = row.get(unit)
        measured = "" if value is None else f"{value:16,.0f}" if unit != "seconds" else f"{value:16.3f}"
        required = f"{row['required']:,}" if row.get("required") else ""
        lines.append(f"{stage:64} {measured:>16} {unit.replace('_per_s', '/s'):10} {required:>12}")
    return "\n".join(lines)
