"""Speed of every stage on this machine, measured beside what is required: simulate, cache, group, train, infer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from lab_shared.bench import environment
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.runs import pick_device

from iceaggr.bench_hierarchical import bench_hierarchical
from iceaggr.config import PRESETS, TrainConfig
from iceaggr.data.bench import bench_cache, bench_grouping
from iceaggr.data.cache import EventCache, open_cache
from iceaggr.data.features import Tables
from iceaggr.data.prepare import cache_folder, simulate
from iceaggr.geometry import icecube86
from iceaggr.predict import autocast, model_inputs, predict_events
from iceaggr.sim.feed import held_out_store
from iceaggr.sim.stream import bench_simulator
from iceaggr.train import loss_sums, training_parts

STAGES = ("simulate", "cache", "group", "train", "infer", "hierarchical")

# events/s that this package promises: one H200 in bfloat16, and two CPU cores
REQUIRED = {
    "cuda": {
        "simulate": 140_000,
        "group": 3_000_000,
        "train small": 279_000,
        "train 5M": 115_000,
        "train t1t2": 50_000,
        "infer small": 900_000,
        "infer 5M": 330_000,
    },
    "cpu": {"simulate": 3_000, "cache": 400_000, "group": 20_000, "train small": 250, "infer small": 900},
}
REPEATS = 5


def bench(*, device: str | None = None, only: Sequence[str] | None = None, quick: bool = False) -> dict[str, Any]:
    """Measure the stages; returns {"environment", "rows", "text"}, a row being a stage with its events/s.

    train and infer run end to end from an event store of simulated data: gather, group, build tokens, model. Each
    figure is the median over repeats after a warm-up, with the quartiles.
    """
    where = pick_device(device)
    # Minutes on a CPU, which the hierarchical model is not meant for: only when asked for there.
    stages = list(only or (STAGES if where.type == "cuda" else STAGES[:-1]))
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"--only {' '.join(sorted(unknown))}: the stages are {', '.join(STAGES)}")
    gpu = where.type == "cuda"
    rows: list[dict[str, Any]] = []
    notes: list[str] = []

    def add(name: str, rates: Sequence[float], **extra: Any) -> None:
        low, _, high = quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
        rows.append(
            {
                "stage": name,
                "events_per_s": median(rates),
                "quartiles": [low, high],
                "repeats": len(rates),
                "required": REQUIRED[where.type].get(name.partition(",")[0]),
                **extra,
            }
        )

    def repeat(name: str, measure: Callable[[], dict[str, Any]], key: str = "events_per_s") -> None:
        results = [measure() for _ in range(REPEATS)]
        add(name, [result[key] for result in results], last=results[-1])

    if "simulate" in stages:
        repeat("simulate", lambda: bench_simulator(where, seconds=0.5 if quick else 3))
    if "group" in stages:
        repeat(
            "group",
            lambda: bench_grouping(where, n_events=16_384 if gpu else 4096, repeats=5 if quick else 20),
        )
    n_events = (4_000 if quick else 20_000) if not gpu else (40_000 if quick else 400_000)
    if "cache" in stages:
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder) / "sim", n_events, seed=0, device=where.type)
            built = cache_folder(Path(folder) / "sim", Path(folder) / "cache")
            cache = open_cache(Path(folder) / "cache")
            add("build store", [built["events"] / max(built["seconds"], 0.01)])
            repeat("cache", lambda: bench_cache(cache, seconds=0.5 if quick else 2), key="gather_events_per_s")
    if {"train", "infer", "hierarchical"} & set(stages):
        # In memory and without a folder, so that these stages do without polars.
        cache = held_out_store(n_events, device=where, geometry=icecube86())
        tables = Tables.of(icecube86(), where)
        # On a GPU in bfloat16; CPUs with matrix tiles multiply it faster too, where it is asked for.
        formats = (("", "auto"),) if gpu else (("", "float32"), (", bfloat16", "bfloat16"))
        for preset, (suffix, dtype) in product(("quick", "small", "5M") if gpu else ("quick", "small"), formats):
            config = replace(PRESETS[preset][1], dtype=dtype)  # type: ignore[arg-type]
            if "train" in stages:
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                rates = train_rates(config, cache, tables, quick=quick)
                peak = {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if gpu else {}
                add(f"train {preset}{suffix}", rates, **_model_of(config), **peak)
            if "infer" in stages:
                add(f"infer {preset}{suffix}", infer_rates(config, cache, tables, quick=quick), **_model_of(config))
        if "hierarchical" in stages:
            config = PRESETS["t1t2"][1]
            parts = bench_hierarchical(config, cache, tables, quick=quick)
            notes.append(parts.pop("text"))
            add("train t1t2", parts["split"].pop("events_per_s"), **_model_of(config), **parts)
            add("infer t1t2", infer_rates(config, cache, tables, quick=quick), **_model_of(config))
    text = "\n".join([_table(rows), *notes])
    return {"environment": environment(where), "label": "simulated data", "rows": rows, "text": text}


def train_rates(config: TrainConfig, cache: EventCache, tables: Tables, *, quick: bool) -> list[float]:
    """Events/s of whole optimisation steps, one figure per repeat."""
    dist = Dist(device=tables.device)
    config = replace(config, epochs=1.0)
    parts = training_parts(config, cache, np.arange(cache.n_events), tables, dist)
    gpu = tables.device.type == "cuda"

    def step() -> int:
        batch = next(parts.batches)
        with autocast(config, tables.device):
            v_E3 = parts.forward(*model_inputs(batch))
        loss_sum, _, n = loss_sums(v_E3, batch, config.optim)
        (loss_sum / n).backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), config.optim.clip)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        return batch.n_events

    try:
        return _rates(step, warmup=8 if gpu else 2, steps=(5 if quick else 40) if gpu else (2 if quick else 8), gpu=gpu)
    finally:
        parts.batches.close()


def infer_rates(config: TrainConfig, cache: EventCache, tables: Tables, *, quick: bool) -> list[float]:
    """Events/s of prediction from the store, one figure per repeat."""
    dist = Dist(device=tables.device)
    gpu = tables.device.type == "cuda"
    n_events = min(cache.n_events, (100_000 if quick else 400_000) if gpu else (500 if quick else 2000))
    parts = training_parts(config, cache, np.arange(cache.n_events), tables, dist)
    parts.batches.close()
    index_N = np.arange(n_events)

    def run() -> int:
        predict_events(parts.forward, cache, index_N, config, tables)
        return n_events

    return _rates(run, warmup=1, steps=1, gpu=gpu)


def _rates(step: Callable[[], int], *, warmup: int, steps: int, gpu: bool) -> list[float]:
    """Events per second of `steps` calls, REPEATS times; `step` returns the events it handled."""
    for _ in range(warmup):
        step()
    rates = []
    for _ in range(REPEATS):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        events = sum(step() for _ in range(steps))
        if gpu:
            torch.cuda.synchronize()
        rates.append(events / (time.perf_counter() - start))
    return rates


def _model_of(config: TrainConfig) -> dict[str, Any]:
    m = config.model
    return {"model": f"{m.arch} K={m.slots} {m.features} {m.input} d={m.d_model} L={m.layers}"}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'stage':22} {'events/s':>12} {'quartiles':>24} {'required':>12}"]
    for row in rows:
        low, high = row["quartiles"]
        required = f"{row['required']:,}" if row["required"] else ""
        lines.append(
            f"{row['stage']:22} {row['events_per_s']:12,.0f} {f'{low:,.0f} .. {high:,.0f}':>24} {required:>12}"
        )
    return "\n".join(lines)
