"""What the hierarchical model costs: the time of its parts, how full its rows are, the memory of extreme events."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from lab_shared.bench import measure
from lab_shared.dist import Dist
from lab_shared.memory import peak_memory

from iceaggr.config import TrainConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.pulse_batches import PulseBatch, build_pulse_batch
from iceaggr.data.pulses import Pulses
from iceaggr.geometry import N_SENSORS
from iceaggr.models.build import build_model
from iceaggr.models.hierarchical import HierarchicalTransformer, pulse_inputs
from iceaggr.predict import autocast
from iceaggr.train import loss_sums, training_parts

EXTREME_EVENTS = {"110,517 pulses": (110_517, 2_015), "178,250 pulses": (178_250, 2_256)}
"""Pulses and DOMs of the largest event of Kaggle's first file, and of the largest of all; the number of DOMs of the
second is the most that any event of the first file has."""


def time_split(config: TrainConfig, cache: EventCache, tables: Tables, *, quick: bool) -> dict[str, Any]:
    """Seconds per training step of T1, T2 (each forward and backward) and the rest, and what batches add to it.

    T1 and T2 are timed apart from the step, so that they may sum to more than it: the rest is then below 0.
    events_per_s: of whole training steps, one figure per repeat.
    data_share: by how much of its time a step is shorter when it works on one batch again and again.
    packing_efficiency: pulses per row that T1 computes, over some batches.
    """
    device = tables.device
    gpu = device.type == "cuda"
    parts = training_parts(replace(config, epochs=1.0), cache, np.arange(cache.n_events), tables, Dist(device=device))
    model = cast(HierarchicalTransformer, parts.model)
    batches = cast(Any, parts.batches)
    batch: PulseBatch = next(batches)

    def step(batch: PulseBatch) -> int:
        with autocast(config, device):
            v_E3 = parts.forward(*pulse_inputs(batch))
        loss_sum, _, n = loss_sums(v_E3, batch, config.optim)
        (loss_sum / n).backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), config.optim.clip)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        return batch.n_events

    compiled: Any = torch.compile(dynamic=False) if parts.forward is not model else lambda part: part
    embed, t2 = compiled(model.embed_doms), compiled(model.t2)

    def t1_step() -> None:
        rows, dom_R, masks, count_D, *_ = pulse_inputs(batch)
        with autocast(config, device):
            embed(rows, dom_R, masks, count_D).sum().backward()

    def t2_step() -> None:
        *_, count_D, xyz_D3, event_D, event_mask, n_events = pulse_inputs(batch)
        x_DM = torch.zeros(count_D.shape[0], config.model.d_model, device=device, requires_grad=True)
        with autocast(config, device):
            t2(x_DM, xyz_D3, event_D, event_mask, n_events).sum().backward()

    def seconds(work: Callable[[], object]) -> float:
        repeats, warmup = (5, 3) if gpu and quick else (30, 5) if gpu else (1, 0)
        return measure(work, repeats=repeats, warmup=warmup, device=device)["median_s"]

    try:
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        once = median(s for s, _ in _wall(lambda: step(batch), gpu, quick))
        repeats = _wall(lambda: step(next(batches)), gpu, quick)
        stream = median(s for s, _ in repeats)
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if gpu else None
        t1, t2_s = seconds(t1_step), seconds(t2_step)
        looked_at: list[PulseBatch] = [next(batches) for _ in range(2 if quick else 10)]
    finally:
        parts.batches.close()
        model.zero_grad(set_to_none=True)
    return {
        "events_per_s": [n / s for s, n in repeats],
        "events_per_step": float(np.mean([b.n_events for b in looked_at])),
        "step_s": stream,
        "t1_s": t1,
        "t2_s": t2_s,
        "rest_s": once - t1 - t2_s,
        "data_share": max(1 - once / stream, 0.0),
        "packing_efficiency": sum(b.n_pulses for b in looked_at) / sum(b.dom_R.numel() for b in looked_at),
        "peak_memory_gb": peak,
    }


def extreme_event(n_pulses: int, n_doms: int, *, seed: int = 0) -> Pulses:
    """One generated event of this size; its brightest DOMs have far more than 512 pulses."""
    rng = np.random.default_rng(seed)
    sensor_D = rng.choice(N_SENSORS, n_doms, replace=False)
    weight_D = rng.lognormal(0, 1.5, n_doms)
    count_D = 1 + rng.multinomial(n_pulses - n_doms, weight_D / weight_D.sum())
    time_P = np.sort(rng.integers(9_000, 60_000, n_pulses)).astype(np.int32)
    return Pulses(
        event_id_E=torch.tensor([1]),
        offsets_E1=torch.tensor([0, n_pulses]),
        sensor_P=torch.from_numpy(rng.permutation(np.repeat(sensor_D, count_D)).astype(np.int32)),
        time_P=torch.from_numpy(time_P),
        charge_P=torch.from_numpy((rng.integers(1, 400, n_pulses) / 40).astype(np.float32)),
        auxiliary_P=torch.from_numpy(rng.random(n_pulses) < 0.1),
        azimuth_E=torch.tensor([1.0], dtype=torch.float64),
        zenith_E=torch.tensor([2.0], dtype=torch.float64),
    )


def extreme_memory(
    config: TrainConfig, tables: Tables, n_pulses: int, n_doms: int, *, max_batch_size: int = 32, train: bool
) -> dict[str, float]:
    """{"peak_gb", "seconds"} of predicting one generated event, or of one AdamW step on it with checkpointing.

    On a GPU the peak of allocated memory from the model's making on. On a CPU how much the process's largest
    resident size grew: only meaningful in a process that did nothing larger before.
    """
    device = tables.device
    pulses = extreme_event(n_pulses, n_doms).to(device)
    settings = replace(config.model, max_batch_size=max_batch_size, checkpoint=train)
    before = _memory_gb(device, reset=True)
    begin = time.perf_counter()
    model = build_model(settings).to(device)
    batch = build_pulse_batch(pulses, settings, tables)
    if train:
        optimizer = torch.optim.AdamW(model.parameters())
        with autocast(config, device):
            v_E3 = model(*pulse_inputs(batch))
        loss_sum, _, n = loss_sums(v_E3, batch, config.optim)
        (loss_sum / n).backward()
        optimizer.step()
    else:
        with torch.inference_mode(), autocast(config, device):
            model.eval()(*pulse_inputs(batch))
    return {"peak_gb": _memory_gb(device) - before, "seconds": time.perf_counter() - begin}


def bench_hierarchical(config: TrainConfig, cache: EventCache, tables: Tables, *, quick: bool) -> dict[str, Any]:
    """`time_split`, and on a GPU `extreme_memory` of both events; with lines of text to print under "text"."""
    split = time_split(config, cache, tables, quick=quick)
    extreme: dict[str, Any] = {}
    if tables.device.type == "cuda":
        for name, size in EXTREME_EVENTS.items():
            for train in (False, True):
                extreme[f"{name}, {'training step' if train else 'inference'}"] = extreme_memory(
                    config, tables, *size, train=train
                )
    parts = {name: split[f"{name}_s"] for name in ("t1", "t2", "rest")}
    whole = sum(parts.values())
    shares = ", ".join(f"{name.upper() if name != 'rest' else name} {s / whole:.0%}" for name, s in parts.items())
    peak = "" if split["peak_memory_gb"] is None else f", peak memory {split['peak_memory_gb']:.2f} GB"
    lines = [
        f"hierarchical, per step of {split['events_per_step']:,.0f} events: {split['step_s'] * 1e3:.1f} ms; of the "
        f"model's {whole * 1e3:.1f} ms {shares} (T1 and T2 timed apart); data {split['data_share']:.1%} of a step; "
        f"packing efficiency {split['packing_efficiency']:.1%}{peak} (simulated data)",
        *(f"{name}: {row['peak_gb']:.2f} GB (generated event)" for name, row in extreme.items()),
    ]
    return {"split": split, "extreme": extreme, "text": "\n".join(lines)}


def _wall(work: Callable[[], int], gpu: bool, quick: bool) -> list[tuple[float, float]]:
    """Per repeat, mean seconds and events of one call among several in a row: what the host waits for counts too."""
    runs, calls, warmup = (5, 5 if quick else 20, 8) if gpu else (1, 2, 1)
    for _ in range(warmup):
        work()
    figures = []
    for _ in range(runs):
        if gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        events = sum(work() for _ in range(calls))
        if gpu:
            torch.cuda.synchronize()
        figures.append(((time.perf_counter() - begin) / calls, events / calls))
    return figures


def _memory_gb(device: torch.device, *, reset: bool = False) -> float:
    if device.type == "cuda" and reset:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak_memory(device) / 1e9
