"""The runs of an ablation study: module-level calls for `lab_shared.sweep`, each leaving OUT/errors.npz.

Imports no torch at the top. Suffix: N held-out events.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.arrays import save_arrays

from iceaggr.config import DataConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from iceaggr.train import Fitted

DATA_SEED = 0
"""Of the store that all runs share; their own seeds are for weights and order."""


def train_variant(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Train one run (or go on with it) in the folder `out`, keep its errors, return its figures. JSON-able."""
    from lab_shared.config import from_json
    from lab_shared.dist import init
    from lab_shared.run import read_metrics
    from lab_shared.runs import start_run

    from iceaggr.train import fit

    settings = from_json(TrainConfig, json.dumps(config))
    _forget_compiled()
    with init() as dist, start_run("iceaggr", settings, out, dist, go_on=True) as run:
        fitted = fit(settings, run, dist)
        summary = _score(out, settings, fitted)
        speeds = [m["events_per_s"] for m in read_metrics(out, "train") if "events_per_s" in m]
        summary["train_events_per_s"] = float(np.median(speeds)) if speeds else None
        run.finish(summary)
    return summary


def score_variant(out: Path, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Score the weights of the finished run `source` beside `out` as `config` says."""
    from lab_shared.config import from_json
    from lab_shared.dist import init

    from iceaggr.data.features import Tables
    from iceaggr.data.prepare import prepare, split
    from iceaggr.predict import load_run
    from iceaggr.train import Fitted

    settings = from_json(TrainConfig, json.dumps(config))
    with init() as dist:
        _, model = load_run(out.parent / source, dist.device)
        data = prepare(settings.data, seed=settings.seed, device=dist.device.type)
        _, held_out_E = split(data.cache, settings.data)
        return _score(out, settings, Fitted(model, data, held_out_E, Tables.of(data.geometry, dist.device)))


def score_baselines(out: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Errors of a random guess and of the line fits on the study's held-out events, and what those events are.

    On a GPU also the oracle's, of as many as a training's own table has; NaN for the others.
    """
    from lab_shared.config import from_json
    from lab_shared.dist import init

    from iceaggr.data.features import Tables
    from iceaggr.data.prepare import prepare, split
    from iceaggr.evaluate import baseline_errors
    from iceaggr.oracle.run import held_out_errors
    from iceaggr.train import ORACLE_EVENTS

    settings = from_json(DataConfig, json.dumps(data))
    with init() as dist:
        prepared = prepare(settings, seed=DATA_SEED, device=dist.device.type)
        _, held_out_E = split(prepared.cache, settings)
        tables = Tables.of(prepared.geometry, dist.device)
        errors = baseline_errors(prepared.cache, held_out_E, tables, seed=DATA_SEED)
        cache = prepared.cache
        if asked := min(ORACLE_EVENTS[dist.device.type], held_out_E.size):
            errors["oracle"] = np.full(held_out_E.size, np.nan)
            pulses = cache.gather(held_out_E[:asked]).to("cpu")
            errors["oracle"][:asked] = held_out_errors(prepared.folder, pulses, dist.device)
    arrays: dict[str, Any] = {
        "event_id": cache.event_id[held_out_E],
        "true": cache.direction_E3[held_out_E].astype(np.float32),
        "n_pulses": cache.n_pulses_E[held_out_E].astype(np.int32),
        **{name: values[held_out_E] for name, values in (cache.truth or {}).items() if name in ("type", "energy")},
        **{f"{name}_error_deg": values.astype(np.float32) for name, values in errors.items()},
    }
    save_arrays(out / "errors.npz", **arrays)
    return {"label": prepared.label, "n_events": int(held_out_E.size), "device": dist.device.type}


def _score(out: Path, config: TrainConfig, fitted: Fitted) -> dict[str, Any]:
    """Keep the error of every held-out event in OUT/errors.npz, with its true direction, as CPU and GPU make different
    events of one id; the run's summary, speed and the rank of the head."""
    from lab_shared.progress import Counter

    from iceaggr.metrics import PERCENTILES, opening_angle_deg
    from iceaggr.models.build import build_model
    from iceaggr.predict import predict_events

    model, data, held_out_E, tables = fitted
    began = time.perf_counter()
    with Counter("evaluating", held_out_E.size * config.tta, "events") as counter:
        v_N3 = predict_events(model, data.cache, held_out_E, config, tables, counter)
    seconds = time.perf_counter() - began
    true_N3 = data.cache.direction_E3[held_out_E]
    error_N = opening_angle_deg(v_N3, true_N3)
    arrays: dict[str, Any] = {
        "event_id": data.cache.event_id[held_out_E],
        "true": true_N3.astype(np.float32),
        "error_deg": error_N.astype(np.float32),
    }
    save_arrays(out / "errors.npz", **arrays)
    return {
        "label": data.label,
        "n_events": int(held_out_E.size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "mean_deg": float(error_N.mean()),
        "median_deg": float(np.median(error_N)),
        **{f"p{p}": float(np.percentile(error_N, p)) for p in PERCENTILES},
        "predict_events_per_s": held_out_E.size / seconds,
        "head_rank": effective_rank(model.head.fc1.weight),
        "head_rank_untrained": effective_rank(build_model(config.model).head.fc1.weight),
        "head_rank_limit": min(model.head.fc1.weight.shape),
    }


def effective_rank(weight: Tensor) -> float:
    """exp of the entropy of the singular values s / sum(s) of a matrix (Roy & Vetterli, EUSIPCO 2007)."""
    import torch

    s = torch.linalg.svdvals(weight.detach().double().cpu())
    p = s / s.sum()
    return float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum()))


def _forget_compiled() -> None:
    """Drop the compiled code and the GPU memory of the run before in this process: each variant is a graph of its own,
    and past a limit torch.compile runs further ones without compiling them."""
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
