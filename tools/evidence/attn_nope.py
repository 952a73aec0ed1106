"""What models can do that never had positions, beside those that DroPE took them from."""

from __future__ import annotations

from typing import Any

from lab_shared.bootstrap import bca_interval

from evidence.attn_matrices import RESULTS, controlled, data_of, matrix
from evidence.record import Claim


def claims() -> list[Claim]:
    """For each controlled experiment in which models were trained without positions from scratch."""
    return [_claim(name) for name in controlled() if _losses(name, "nope")]


def _losses(name: str, phase: str) -> dict[int, Any]:
    """Analyses of models trained on shuffled data, by seed."""
    runs = ((r["run"], r) for r in matrix(name).results)
    return {run["seed"]: r for run, r in runs if (run["ordering"], run["phase"]) == ("shuffled", phase)}


def _claim(name: str) -> Claim:
    never, dropped = _losses(name, "nope"), _losses(name, "drope")
    seeds = sorted(never.keys() & dropped.keys())
    losses = [[runs[seed]["training"]["val_loss"] for seed in seeds] for runs in (dropped, never)]
    differences = [a - b for a, b in zip(*losses, strict=True)]
    steps = [matrix(name).experiment.optim.steps, dropped[seeds[0]]["training"]["steps"]]
    found, means = bca_interval(differences), [sum(x) / len(seeds) for x in (*losses, differences)]
    return Claim(
        f"attn_clustering/{name}-nope",
        f"{name}, run afterwards, exploratory and not corrected: on shuffled data models without positions from "
        f"scratch end at {means[1]:.4f} nats after {steps[0]} steps, those that DroPE took them from at {means[0]:.4f} "
        f"after {steps[1]} more: {means[2]:+.4f} [{found.low:+.4f}, {found.high:+.4f}] over {len(seeds)} seeds "
        f"({data_of(name)}).",
        "validation loss after DroPE less that without positions from scratch, nats",
        differences,
        "measured",
        [
            f"{RESULTS}/{name}/{run['run']['name']}/analysis/analysis.json"
            for runs in (never, dropped)
            for run in runs.values()
        ],
        config=f"{RESULTS}/{name}/experiment.json",
        seeds=seeds,
        interval=(found.low, found.high),
        test="BCa over seeds",
    )
