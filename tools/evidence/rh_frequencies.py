"""Zeta zeros: how many evenly spaced frequencies the small model needs, and how far they have to reach."""

from __future__ import annotations

import math

from evidence.record import bare, markdown, read
from evidence.rh_runs import folders, runs
from evidence.rh_training import MIN_SEEDS, over_seeds

ALL = "explicit-small, frequencies=even"
"""A frequency for every pair of channels, up to that of the last prime power."""


def density() -> str:
    """Evenly spaced frequencies by number and range, each row less a frequency for every pair, seed by seed."""
    from rh_memory.models.rotary import log_frequencies

    configs = {run.experiment: run.config.model for run in runs() if run.experiment.startswith(ALL)}
    rows = []
    for name, model in configs.items():
        frequencies = log_frequencies(model)
        different = sorted(set(frequencies.tolist()))
        top, step = different[-1], different[1] - different[0] if len(different) > 1 else math.inf
        scores = _scores(name)
        seeds = sorted(set(scores) & set(_scores(ALL)))
        less = [scores[seed] - _scores(ALL)[seed] for seed in seeds]
        rows.append(
            (
                (top, step),
                [
                    str(len(different)),
                    bare(different[0], 2) + (f" to {top:.2f}" if len(different) > 1 else ""),
                    bare(step, 2) if math.isfinite(step) else "",
                    _mean(list(scores), list(scores.values())),
                    ", ".join(bare(score, 3) for score in scores.values()),
                    _mean(seeds, less) if name != ALL else "",
                ],
            )
        )
    header = ["frequencies", "range", "step", "nll_last", "by seed", "less 32 of the same range as the primes'"]
    return markdown(header, [row for _, row in sorted(rows)], "rrrrrr")


def _scores(name: str) -> dict[int, float]:
    """nll_last on the tail by seed."""
    found = sorted((seed, folder) for (known, seed), folder in folders().items() if known == name)
    return {seed: read(f"{folder}/evaluation.json")["nll_last"]["value"] for seed, folder in found}


def _mean(seeds: list[int], values: list[float]) -> str:
    return over_seeds(seeds, values, 3)[0] if len(seeds) >= MIN_SEEDS else f"{len(seeds)} seeds"


TABLES = {"rh_memory.density": density}
