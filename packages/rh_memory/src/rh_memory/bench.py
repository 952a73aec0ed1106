"""Speed of training on this machine: whole optimisation steps of every preset, on spacings drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from lab_shared.bench import environment, measure
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.optim import clip_grads
from lab_shared.runs import pick_device

from rh_memory.config import PRESETS, TrainConfig
from rh_memory.data.controls import LOG_HEIGHT
from rh_memory.data.unfold import Spacings
from rh_memory.data.windows import SpacingData, split
from rh_memory.dataset import Dataset
from rh_memory.models import build_model
from rh_memory.objective import Objective
from rh_memory.train import WindowStream, make_optimizer

# windows/s (postfix: targets/s) that this package promises: one H200, and two CPU cores
REQUIRED = {
    "cuda": {"e0": 24_000, "explicit": 22_000, "e3": 160_000, "e3-explicit": 160_000},
    "cpu": {"explicit-small": 270},
}
ON_CPU = ("explicit-small",)
ON_GPU = (
    "e0", "e0-rope", "e1", "e1-rope", "e2-rope", "e3-original", "e3", "e3-explicit", "e4", "e5", "explicit",
    "explicit-small",
)  # fmt: skip


def bench(
    device: str | None = None, presets: Sequence[str] = (), *, repeats: int | None = None
) -> list[dict[str, Any]]:
    """Windows and targets per second of whole training steps: draw, forward, backward, clip, update.

    presets: by default those of interest on the device. One row a preset, with the median time and the quartile
    distance of a step; where a rollout loss comes every few steps, of a whole round of those. On a CPU a second row is
    in bfloat16 (use_amp), which those with matrix tiles multiply faster. repeats: default 10, on a CPU 60, whose cores
    others may use as well. Raises UserError.
    """
    where = pick_device(device)
    repeats = repeats or (10 if where.type == "cuda" else 60)
    names = list(presets) or list(ON_GPU if where.type == "cuda" else ON_CPU)
    if unknown := [name for name in names if name not in PRESETS]:
        raise UserError(f"no preset {unknown[0]!r}; there are {', '.join(PRESETS)}")
    machine = environment(where)
    rows = []
    formats = (("", None),) if where.type == "cuda" else (("", False), (", bfloat16", True))
    for name, (suffix, low) in product(names, formats):
        config = replace(PRESETS[name][1], use_amp=low)
        steps = measure_step(config, where, repeats=repeats)
        windows = config.batch_size / steps["median_s"]
        targets = windows * steps.pop("targets")
        counted = targets if config.model.memory == "postfix" else windows
        required = REQUIRED[where.type].get(name)
        rows.append(
            {
                "name": f"train {name}{suffix}",
                "data": "random spacings",
                "parameters": steps.pop("parameters"),
                "batch_size": config.batch_size,
                "windows_per_s": windows,
                "targets_per_s": targets,
                **steps,
                "required": required,
                "met": None if required is None else counted >= required,
                "environment": machine,
            }
        )
    return rows


def measure_step(config: TrainConfig, device: torch.device, *, repeats: int = 10) -> dict[str, Any]:
    """lab_shared.bench.measure of a training step, and the numbers of parameters and of targets of a window.

    With a rollout loss, what is timed is a round of steps of which one has it, over their number.
    """
    spacings = random_spacings(200_000)
    width = config.model.context + 1
    data = SpacingData(spacings, device)
    dataset = Dataset(spacings, data, split(len(spacings), width=width), "random spacings", width, by_rows=False)
    torch.manual_seed(0)
    model = build_model(config.model).to(device)
    optimizer = make_optimizer(model, config.optim)
    objective = Objective(config, model, dataset, Dist(device=device))
    stream = WindowStream(data, dataset.starts("train"), width, config.batch_size, seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]

    steps = config.loss.drift_every if config.loss.drift_weight else 1

    def step_round() -> None:
        for step in range(1, steps + 1):
            loss, _ = objective(next(stream)[0], step)
            loss.backward()
            clip_grads(parameters, config.optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    warmup = 5 if device.type == "cuda" else 2
    timing: dict[str, Any] = measure(step_round, repeats=repeats, warmup=warmup, device=device)
    timing |= {name: timing[name] / steps for name in ("median_s", "iqr_s")}
    return timing | {"parameters": sum(p.numel() for p in parameters), "targets": objective.index_T.numel()}


def random_spacings(n: int) -> Spacings:
    """Independent gamma-distributed spacings near height 6e5: as fast to train on as zeros, and at hand at once."""
    s = np.random.default_rng(0).gamma(6.0, 1 / 6, n).astype(np.float32)
    gamma = 6e5 + np.cumsum(s, dtype=np.float64) * (2 * np.pi / LOG_HEIGHT)
    centre = np.floor(gamma)
    return Spacings(s, centre, gamma - centre, np.full(n, LOG_HEIGHT, np.float32))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'training':26}{'parameters':>12}{'windows/s':>12}{'targets/s':>14}{'step':>11}{'required':>11}"]
    for row in rows:
        required = "" if row["required"] is None else f"{row['required']:,}{'' if row['met'] else ' NOT MET'}"
        lines.append(
            f"{row['name'].removeprefix('train '):26}{row['parameters']:12,}{row['windows_per_s']:12,.0f}"
            f"{row['targets_per_s']:14,.0f}{row['median_s'] * 1e3:8.1f} ms{required:>11}"
        )
    machine = rows[0]["environment"]
    return "\n".join([*lines, f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads"])
