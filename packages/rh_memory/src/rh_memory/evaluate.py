"""`rh-memory evaluate RUN`: a trained model's scores beside the baselines, on the same held-out windows.

Writes RUN/evaluation.json (every figure with its interval) and RUN/predictions.npz (one row per scored window), from
which the report is drawn.
"""

from __future__ import annotations

import io
import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.checkpoint import load_weights
from lab_shared.files import atomic_write
from lab_shared.runs import finished_run, pick_device

from rh_memory import baselines
from rh_memory.config import TrainConfig
from rh_memory.data.windows import Part
from rh_memory.dataset import Dataset, load_dataset
from rh_memory.models import Model, build_model
from rh_memory.scores import (
    STRIDE,
    WIDTH,
    Scored,
    block_estimate,
    contexts_of,
    paired_difference,
    score_model,
    summarise,
)

PLATEAU = 0.005
"""A model this near the i.i.d. marginal has found nothing in the context."""


def load_run(run: Path, device: torch.device) -> tuple[TrainConfig, Model]:
    """Configuration and trained model of a run folder, in eval mode on `device`; the best weights where kept.

    Raises UserError when the folder holds no finished run.
    """
    config, weights = finished_run(run, TrainConfig, "rh-memory", weights=("best", "weights"))
    model = build_model(config.model)
    load_weights(weights, model)
    return config, model.to(device).eval()


@contextmanager
def inference(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """bfloat16 autocast as in training; heads and scores stay in float32."""
    low = device.type == "cuda" if config.use_amp is None else config.use_amp
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        yield


def with_file(config: TrainConfig, data: Path | None) -> TrainConfig:
    """The configuration, with its zeros taken from the file `data`."""
    return config if data is None else replace(config, data=replace(config.data, file=str(data)))


def scored_part(dataset: Dataset) -> Part:
    """val_tail where the split has one, else test."""
    return "val_tail" if dataset.split.val_tail else "test"


def scored_starts(dataset: Dataset, width: int, stride: int = STRIDE) -> torch.Tensor:
    """Starts (int64) of windows of `width` whose targets are among those of the baselines, which see WIDTH - 1."""
    shift = (WIDTH - width) % stride
    return dataset.split.starts(scored_part(dataset), stride, width + shift) + shift


def batch_size(device: torch.device) -> int:
    return 1024 if device.type == "cuda" else 64


def inside(spacing_W: np.ndarray, ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which indices lie in one of the ranges [first, last)."""
    found = np.zeros(len(spacing_W), dtype=bool)
    for first, last in ranges:
        found |= (spacing_W >= first) & (spacing_W < last)
    return found


def evaluate(run: Path, *, data: Path | None = None, device: str | None = None, stride: int = STRIDE) -> dict[str, Any]:
    """Score a run and write its files; see `summarise` for the figures. stride: between the starts of the windows."""
    where = pick_device(device)
    config, model = load_run(run, where)
    config = with_file(config, data)
    dataset = load_dataset(config, where)
    part = scored_part(dataset)
    width = dataset.width  # as trained: of a row of 256 spacings the model never saw the last as context
    starts_W = scored_starts(dataset, width, stride)
    with inference(config, where):
        scored = score_model(model, dataset.data, starts_W, batch=batch_size(where), width=width)
    known = baselines.cached(dataset, Path(config.data.folder))
    result = compare(scored, known, dataset) | {
        "label": dataset.label,
        "part": part,
        "seed": config.seed,
        "memory": config.model.memory,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    save(run, result, scored)
    return result


def compare(scored: Scored, known: baselines.Baselines, dataset: Dataset) -> dict[str, Any]:
    """Scores, their differences to every baseline on the shared windows, and the part nothing was chosen on."""
    at = scored.spacing_W
    minus = {
        name: paired_difference(scored.nll_last_W, at, values, known.spacing_W) for name, values in known.nll.items()
    }
    test_W = inside(at, dataset.split.test)
    return summarise(scored) | {
        "nll_last_test": block_estimate(scored.nll_last_W[test_W], at[test_W]).json(),
        "on_plateau": abs(minus["iid marginal"].value) < PLATEAU,
        "baselines": known.json(),
        "nll_last_minus": {name: estimate.json() for name, estimate in minus.items()},
    }


def save(run: Path, result: dict[str, Any], scored: Scored) -> None:
    """Write evaluation.json and predictions.npz. Raises StorageError."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        spacing=scored.spacing_W,
        nll_last=scored.nll_last_W,
        nll_all=scored.nll_all_W,
        crps_last=scored.crps_last_W,
        pit_last=scored.pit_last_W,
        below_zero_last=scored.below_zero_W,
        mean_last=scored.mean_W,
    )
    atomic_write(run / "predictions.npz", buffer.getvalue())
    atomic_write(run / "evaluation.json", json_module.dumps(result, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    """The model's scores and, below, every baseline on the same windows."""

    def cell(x: dict[str, Any], signed: bool = False) -> str:
        spec = "+.4f" if signed else ".4f"
        text = format(x["value"], spec)
        return text if x["low"] is None else f"{text} [{format(x['low'], spec)}, {format(x['high'], spec)}]"

    lines = [
        f"{result['windows']:,} windows of {result['part']} of {result['label']}; nats per unfolded spacing, lower is "
        "better; 95 % block-bootstrap intervals",
        f"{'':30}{'nll_last':>28}{'model minus it':>30}",
        f"{'model':30}{cell(result['nll_last']):>28}",
    ]
    minus = result["nll_last_minus"]
    for row in result["baselines"]["rows"]:
        lines.append(f"{row['name']:30}{cell(row['nll_last']):>28}{cell(minus[row['name']], signed=True):>30}")
    if gue := result["baselines"].get("gue"):
        lines += [f"{name + ' on GUE*':30}{cell(value):>28}" for name, value in gue["nll_last"].items()]
        lines.append(f"* {gue['data']}: another data set, for comparison only")
    pit = result["pit_last"]
    lines += [
        f"nll_all {cell(result['nll_all'])} ({contexts_of(result['nll_by_context'])})",
        f"nll_last on the test part {cell(result['nll_last_test'])}",
        f"crps_last {cell(result['crps_last'])}",
        f"pit_last mean {pit['mean']['value']:.4f} (0.5), std {pit['std']:.4f} (0.2887)"
        f"   mass below zero {result['below_zero_last']['value']:.2e}",
        "coverage_last "
        + "   ".join(f"{row['nominal']:.0%}: {row['observed']['value']:.1%}" for row in result["coverage_last"]),
    ]
    if result["on_plateau"]:
        lines.append("the model is on the plateau of the i.i.d. marginal: it predicts nothing from the context")
    return "\n".join(lines)


def main(run_folder: Path, json: bool = False, data: Path | None = None, device: str | None = None) -> dict[str, Any]:
    """`rh-memory evaluate RUN`: print the table (or one JSON object) and return the result."""
    result = evaluate(Path(run_folder), data=data, device=device)
    print(json_module.dumps(result) if json else table(result))
    return result
