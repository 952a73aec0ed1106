"""Training speed of whole models: the practical one beside a GPT of equal parameters, on the same device."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lab_shared.bench import environment, measure
from lab_shared.command import write_record
from lab_shared.graphs import StepGraph
from torch import Tensor
from torch.nn import functional as F

from gauge_attn.compiled import compiled_model
from gauge_attn.config import PRESETS, TrainConfig
from gauge_attn.evaluate import autocast
from gauge_attn.models import build_model, build_optimizer
from gauge_attn.models.gpt import matched_width

SLOWER_AT_MOST = 2.0
"""Required: training tokens/s of the GPT over those of the practical model."""


def bench_models(device: torch.device, out: Path | None = None, *, quick: bool = False) -> dict[str, Any]:
    """Tokens/s of whole optimiser steps: practical-small (quick: the preset quick) and its GPT; a table under "text".

    On CUDA compiled, recorded as one CUDA graph, and in bf16 autocast; there practical-small also with attention in
    split bfloat16, its number format for GPUs. The GPT's width is the one whose parameter count is nearest.
    """
    preset = "quick" if quick or device.type == "cpu" else "practical-small"
    config = PRESETS[preset][1]
    vocab = 256 if preset == "practical-small" else 2 * config.data.keys
    rows = [_row(preset, config, vocab, device)]
    if device.type == "cuda":
        split = replace(config, model=replace(config.model, precision="bf16x3"))
        rows.append(_row(f"{preset}, bf16x3", split, vocab, device))
    base = PRESETS["gpt-small" if preset == "practical-small" else "gpt-quick"][1]
    width = matched_width(rows[0]["parameters"], base.model.layers, vocab, base.model.heads)
    gpt = replace(base, model=replace(base.model, d_model=width))
    rows.append(_row(f"gpt, width {width}", gpt, vocab, device))
    slower = {row["name"]: rows[-1]["tokens_per_s"] / row["tokens_per_s"] for row in rows[:-1]}
    lines = [
        f"{row['name']:<20}{row['parameters']:>12,} parameters{row['tokens_per_s']:>14,.0f} tokens/s, "
        f"first step after {row['first_step_s']:.0f} s"
        for row in rows
    ]
    for name, times in slower.items():
        met = "met" if times <= SLOWER_AT_MOST else "NOT met"
        lines.append(f"the GPT is {times:.2f}x as fast as {name}; required: at most {SLOWER_AT_MOST:g}x: {met}")
    result = {
        "environment": environment(device),
        "rows": rows,
        "gpt_over": slower,
        "required": SLOWER_AT_MOST,
    }
    write_record(out, result)
    return result | {"text": "\n".join(lines)}


def _row(name: str, config: TrainConfig, vocab: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model(config.model, vocab, config.data.window, config.optim).to(device)
    optimizer = build_optimizer(model, config.optim)
    tokens_BN = torch.randint(vocab, (config.data.batch, config.data.window + 1), device=device)
    started = time.perf_counter()
    forward: Any = compiled_model(model, tokens_BN[:, :-1]) if device.type == "cuda" else model

    def loss_of(tokens_BN: Tensor) -> Tensor:
        with autocast(config, device, cache=False):
            logits_BNV = forward(tokens_BN[:, :-1]).logits_BNV
        return F.cross_entropy(logits_BNV.float().flatten(0, 1), tokens_BN[:, 1:].flatten())

    graph = StepGraph(loss_of, model, optimizer, clip=config.optim.clip)

    def step() -> None:
        graph(tokens_BN)

    step()
    first_s = time.perf_counter() - started
    seconds = measure(
        step, repeats=10 if device.type == "cuda" else 3, warmup=5 if device.type == "cuda" else 1, device=device
    )
    tokens = config.data.batch * config.data.window
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "name": name,
        "parameters": parameters,
        "tokens_per_s": tokens / seconds["median_s"],
        "first_step_s": first_s,
        **seconds,
    }
