"""`rh-memory diagnose RUN|GLOB`: what a model's memory does, on fixed paired windows, with an interval everywhere.

The original diagnostics A to K are in `legacy`, each with the reason where it cannot say what it claims; the rebuilt
ones are one file each. Results of a run go to RUN/diagnostics.json; several runs (seeds) also get a table of mean and
spread and E4's verdict.
"""

from __future__ import annotations

import glob
import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.config import read_config
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from lab_shared.runs import pick_device

from rh_memory import baselines, linear
from rh_memory.config import TrainConfig
from rh_memory.dataset import Dataset, load_dataset
from rh_memory.diagnostics import ablation, aggregate, attention, blocks, geometry, identity, rollout
from rh_memory.diagnostics import legacy as legacy_tests
from rh_memory.diagnostics.golden import Golden, slot_states, window_nll
from rh_memory.diagnostics.text import summary_text
from rh_memory.evaluate import inference, load_run, scored_part, with_file
from rh_memory.models import Model
from rh_memory.records import experiment

_CONSTANT = "slots in front of the data do not see it: their states are the same in every window"
_NOT_READ = "predictions are read at the spacings, not from the slots"
LEFT_OUT = {
    "none": {"slots": "the model has none: no removal, permutation, content, gradient, attention or geometry of slots"},
    "prefix": {
        **dict.fromkeys(("mean", "resampled"), _CONSTANT),
        **dict.fromkeys(("subsets", "effect", "readout"), _NOT_READ),
    },
}
"""Diagnostics that a kind of memory does not have, each with the reason; they go into the result."""


@dataclass(frozen=True)
class Size:
    """How much to look at. A CPU makes a few dozen windows of a memory model a second, a GPU tens of thousands."""

    windows: int = 24_960
    """Golden windows; no more than there are at a stride of 8."""
    rollouts: int = 256
    rollout_steps: int = 200
    permutations: int = 8
    gradient_groups: int = 64
    batch: int = 512

    @classmethod
    def for_device(cls, device: torch.device, windows: int | None = None) -> Size:
        size = cls() if device.type == "cuda" else cls(256, 16, 50, 2, 8, 64)
        return size if windows is None else cls(**{**vars(size), "windows": windows})


def diagnose(
    run: Path,
    *,
    legacy: bool = False,
    data: Path | None = None,
    device: str | None = None,
    windows: int | None = None,
) -> dict[str, Any]:
    """All diagnostics of one run, written to RUN/diagnostics.json (legacy: RUN/diagnostics_legacy.json).

    windows: golden windows; default 24,960 on a GPU and 256 on a CPU. Raises UserError for a run without memory when
    legacy is asked for, for a memory of one slot, for one window, and for a folder that is no run.
    """
    where = pick_device(device)
    if windows is not None and windows < 2:
        raise UserError(
            f"--windows {windows}: slots are chosen on some windows and judged on others, so give 2 or more"
        )
    config, model = load_run(run, where)
    if config.model.memory != "none" and config.model.n_memory == 1:
        raise UserError(f"{run} has one memory slot: diagnostics remove slots and compare them, which takes two")
    config = with_file(config, data)
    dataset = load_dataset(config, where)
    size = Size.for_device(where, windows)
    with inference(config, where):
        result = _legacy(run, config, model, dataset, size) if legacy else _rebuilt(config, model, dataset, size)
    facts = {"run": run.name, "label": dataset.label, "seed": config.seed, "memory": config.model.memory}
    result = facts | result
    name = "diagnostics_legacy.json" if legacy else "diagnostics.json"
    atomic_write(run / name, json_module.dumps(result, indent=1) + "\n")
    return result


def _legacy(run: Path, config: TrainConfig, model: Model, dataset: Dataset, size: Size) -> dict[str, Any]:
    if config.model.memory == "none":
        raise UserError(
            f"{run} has no memory slots: the original diagnostics A to K are about slots; leave out --legacy"
        )
    width = dataset.width
    steps, long_N = rollout_starts(dataset, size.rollout_steps, width, stride=1)
    tests = legacy_tests.run(
        model,
        dataset.data,
        dataset.split.starts(scored_part(dataset), 1, width),
        long_N,
        width=width,
        has_heights=has_heights(dataset),
        rollouts=min(100, size.rollouts),
        steps=steps,
    )
    return {"legacy": tests}


def _rebuilt(config: TrainConfig, model: Model, dataset: Dataset, size: Size) -> dict[str, Any]:
    width = dataset.width
    starts = dataset.split.starts(scored_part(dataset), 8, width)
    golden = Golden.spread(dataset.data, starts, size.windows, size.batch, width)
    nll_W = window_nll(model, golden).double().cpu().numpy()
    result: dict[str, Any] = {
        "windows": len(golden),
        "base": golden.estimate(nll_W).json(),
        "rollout": _rollout(model, dataset, size, width),
    }
    left_out = dict(LEFT_OUT.get(config.model.memory, {}))
    if (found := blocks.count(golden.spacing_W)) >= blocks.FEWEST:
        result["blocks"] = blocks.block_differences(nll_W, golden.spacing_W)
    else:
        left_out["blocks"] = f"targets in {found} blocks of {blocks.BLOCK} spacings, comparing takes {blocks.FEWEST}"
    if left_out:
        result["left_out"] = left_out
    if config.model.memory == "none":
        return result
    train = np.concatenate([dataset.spacings.s[a:b] for a, b in dataset.split.train]).astype(np.float64)
    target = dataset.spacings.s[golden.spacing_W].astype(np.float64)
    result |= ablation.removals(model, golden)
    result["permutation"] = identity.permutation_test(model, golden, count=size.permutations)
    result["content"] = identity.content_test(model, golden, float(baselines.marginal_nll(train, target).mean()))
    result["gradient"] = geometry.gradient_geometry(geometry.gradients(model, golden, groups=size.gradient_groups))
    result["attention"] = attention.summary(attention.profiles(model, golden), config.model.memory)
    h_WMD = slot_states(model, golden)
    result["geometry"] = geometry.slot_geometry(model, golden, h_WMD)
    if config.model.memory == "postfix":
        result |= ablation.replacements(model, golden, h_WMD)
        result["subsets"] = ablation.subsets(model, golden, h_WMD)
        result["effect"] = ablation.effect_sizes(model, h_WMD)
        result["readout"] = geometry.readout_weights(model)
    return result


def has_heights(dataset: Dataset) -> bool:
    """Whether the spacings have heights; controls (GUE, shuffled) have a constant instead."""
    return float(np.ptp(dataset.spacings.log_height)) > 0


def rollout_starts(dataset: Dataset, steps: int, width: int, *, stride: int) -> tuple[int, torch.Tensor]:
    """How many steps windows can be continued by, at most `steps`, and the starts of windows that can."""
    part = scored_part(dataset)
    steps = min(steps, max(last - first for first, last in getattr(dataset.split, part)) - width)
    if steps < 1:
        raise UserError(f"no stretch of held-out spacings is longer than {width}: rollouts need more spacings")
    return steps, dataset.split.starts(part, stride, width + steps)


def _rollout(model: Model, dataset: Dataset, size: Size, width: int) -> dict[str, Any]:
    steps, starts = rollout_starts(dataset, size.rollout_steps, width, stride=8)
    golden = Golden.spread(dataset.data, starts, size.rollouts, size.batch, width)
    with_heights = has_heights(dataset)
    series = linear.Series.of(dataset.spacings)
    stretches = baselines.nearest(dataset.split.train, 100_000)
    lags = linear.Features(lags=min(baselines.AR.lags, width - 1))
    fit = linear.accumulate(series, lags, stretches, degree=0, title="AR fit").solve()
    truth = rollout.true_future(golden, steps)
    rolled = {
        "model": rollout.roll(model, golden, steps, has_heights=with_heights),
        "AR": rollout.roll_linear(fit, golden, steps),
        "constant": torch.ones(truth.shape),
    }
    sampled = rollout.roll(model, golden, steps, has_heights=with_heights, seed=0)
    return {
        "starts": len(golden),
        "steps": steps,
        "phase_errors": rollout.phase_errors(golden, truth, rolled),
        "spectral": rollout.spectral_comparison(golden, truth, sampled),
    }


def _check_seeds(runs: Sequence[Path]) -> None:
    """Raises UserError unless the runs are one experiment with different seeds: others have no mean."""
    configs = {run: read_config(TrainConfig, run / "config.json") for run in runs}
    experiments = {experiment(config)[1]: run for run, config in configs.items()}
    if len(experiments) > 1:
        (one, a), (other, b) = list(experiments.items())[:2]
        raise UserError(f"{a} is {one} and {b} is {other}: give runs of one experiment, or one run")
    aggregate.check_different([config.seed for config in configs.values()])


def main(
    run_or_glob: str | Path,
    legacy: bool = False,
    json: bool = False,
    data: Path | None = None,
    device: str | None = None,
    windows: int | None = None,
) -> dict[str, Any]:
    """`rh-memory diagnose RUN|GLOB`: print the findings (or one JSON object) and return them.

    Several runs give {"runs": [...], "summary": mean and spread, "e4": verdict for postfix memories}. Raises UserError,
    before the first is diagnosed, when they are not one experiment with different seeds.
    """
    runs = sorted(Path(p) for p in glob.glob(str(run_or_glob)) if (Path(p) / "config.json").is_file())
    if not runs:
        raise UserError(
            f"no run matches {run_or_glob}: give a folder that `rh-memory train` wrote, or a pattern in quotes"
        )
    if len(runs) > 1:
        _check_seeds(runs)
    results = [diagnose(run, legacy=legacy, data=data, device=device, windows=windows) for run in runs]
    result: dict[str, Any] = results[0] if len(results) == 1 else {"runs": results}
    table = None
    if len(results) > 1:
        table = aggregate.over_seeds(results)
        result["summary"] = {name: s._asdict() for name, s in table.summary.items()}
        if not legacy and all(r["memory"] == "postfix" for r in results):
            result["e4"] = aggregate.e4_verdict(results)
    if json:
        print(json_module.dumps(result))
        return result
    for one in results:
        print(summary_text(one), end="\n\n")
    if table is not None:
        print(table.text())
    if "e4" in result:
        for row in result["e4"]["criteria"]:
            print(f"{'met    ' if row['met'] else 'not met'}  {row['criterion']}: {row['measured']}")
        verdict = {True: "met", False: "not met", None: "open: it takes three seeds"}[result["e4"]["met"]]
        print(f"E4's success criteria on {result['e4']['seeds']} seeds: {verdict}")
    return result
