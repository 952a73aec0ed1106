"""Differences between orderings, paired by seed: what the experiment concludes.

Runs of one seed share their initial weights and their data, so that orderings are compared seed by seed. One contrast
is primary and its test stands alone; a short list is secondary and corrected by Holm; all else is exploratory. Lists,
test and verdict are those of PREREGISTRATION.md.

The endpoint: accuracy of the topic probe, mean over the middle half of the blocks, as a fraction of the way from what a
token alone tells (0) to what the Bayes filter knows (1) at the same positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.stats import bca_interval, holm, paired_sign_flip

from attn_clustering.folders import read_object

MIN_SEEDS = 6
"""Below, the exact test cannot reach p < .05 (2^(1 - 5) = .0625), and no stars are given."""
MARGIN = 0.01
"""Smallest difference of the primary endpoint that would matter."""

Result = Mapping[str, Any]
"""The content of an analysis.json."""
METRICS = {
    "endpoint": "topic probe, fraction of token floor to Bayes ceiling",
    "probe": "topic probe, accuracy in the middle blocks",
    "transfer": "RoPE model's probes on this model, accuracy in the middle blocks",
    "excess_lag": "within-topic attention above the lag-matched null, mean over heads",
    "most_clustering_head": "the same, largest head",
    "recurrence": "attention to a recurring topic (A-B-A-C), mean over heads",
    "specialisation": "specialisation of heads by topic",
    "val_loss": "validation loss (nats)",
}


@dataclass(frozen=True)
class Comparison:
    """`treated` minus `control`, paired by seed."""

    metric: str
    treated: str
    control: str
    attention: str
    phase: str
    seeds: tuple[int, ...]
    treated_values: tuple[float, ...]
    control_values: tuple[float, ...]
    difference: float
    low: float | None
    high: float | None
    """95% BCa interval over seeds; None for one seed."""
    p: float
    """Exact two-sided sign-flip test."""
    p_holm: float | None = None
    """Corrected for the secondary family; None outside it."""
    role: str = "exploratory"
    """"primary", "secondary" or "exploratory"."""

    @property
    def stars(self) -> str:
        """For p (corrected in the family) below .05, .01, .001; none below MIN_SEEDS seeds or if exploratory."""
        if self.role == "exploratory":
            return ""
        p = self.p if self.p_holm is None else self.p_holm
        return "" if len(self.seeds) < MIN_SEEDS else "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every analysis.json of a matrix folder, by run name. Raises UserError when one is damaged."""
    return [
        read_object(path, "delete it and analyse the run again", "run", "training", "probe", "attention", "inputs")
        for path in sorted(folder.glob("*/analysis/analysis.json"))
    ]


def metric(result: Result, name: str) -> float | None:
    """One number of a run, by its name in METRICS, or "block N": the probe's accuracy after block N.

    None where it does not exist (no Bayes filter for text, no transfer into RoPE runs).
    """
    probe = result["probe"]
    if name == "endpoint":
        if probe["bayes"] is None or probe["bayes"] <= probe["token"]:
            return None
        return (probe["middle"] - probe["token"]) / (probe["bayes"] - probe["token"])
    if name == "probe":
        return float(probe["middle"])
    if name.startswith("block "):
        return float(probe["accuracy"][int(name.removeprefix("block "))])
    if name == "transfer":
        return float(np.mean([probe["transfer"][i] for i in probe["middle_places"]])) if "transfer" in probe else None
    if name == "val_loss":
        return float(result["training"]["val_loss"])
    return result["attention"].get(name)


def by_seed(
    results: Sequence[Result], name: str, attention: str, ordering: str, phase: str, recal: str | None
) -> dict[int, float]:
    """{seed: value} of a condition."""
    wanted = (attention, ordering, phase, recal if phase in ("drope", "extra") else None)
    found = {}
    for result in results:
        run = result["run"]
        if (run["attention"], run["ordering"], run["phase"], run["recal"]) == wanted:
            value = metric(result, name)
            if value is not None:
                found[run["seed"]] = value
    return dict(sorted(found.items()))


def complete(results: Sequence[Result]) -> list[Result]:
    """Where time ended early: the results of those seeds that have every condition any seed has.

    Each part by itself, that of the endpoint (MHA with its recalibrations), NoPE, and GQA: a part that was run on fewer
    seeds takes none from the others.
    """
    conditions: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    for result in results:
        run = result["run"]
        what = tuple(run[key] for key in ("ordering", "phase", "recal"))
        conditions.setdefault((*_part(run), run["seed"]), set()).add(what)
    every: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    for (*part, _), found in conditions.items():
        every.setdefault(tuple(part), set()).update(found)
    return [r for r in results if conditions[(*_part(r["run"]), r["run"]["seed"])] == every[_part(r["run"])]]


def _part(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["attention"], run["phase"] == "nope"


def compare(
    results: Sequence[Result],
    name: str,
    treated: str,
    control: str,
    *,
    attention: str = "mha",
    phase: str = "drope",
    recal: str | None = None,
) -> Comparison | None:
    """The paired comparison over the seeds both orderings have; None when there are none."""
    a, b = (by_seed(results, name, attention, ordering, phase, recal) for ordering in (treated, control))
    seeds = tuple(seed for seed in a if seed in b)
    if not seeds:
        return None
    x, y = (tuple(values[seed] for seed in seeds) for values in (a, b))
    difference = np.subtract(x, y)
    low = high = None
    if len(seeds) > 1:
        low, high = bca_interval(difference) if np.ptp(difference) else (difference[0], difference[0])
    p = paired_sign_flip(x, y).p
    return Comparison(
        name, treated, control, attention, phase, seeds, x, y, float(difference.mean()),
        None if low is None else float(low), None if high is None else float(high), p,
    )  # fmt: skip


def endpoint_of(results: Sequence[Result]) -> str:
    """ "endpoint", or "probe" (plain accuracy) for data without a Bayes ceiling."""
    return "endpoint" if any(metric(result, "endpoint") is not None for result in results) else "probe"


def primary(results: Sequence[Result], recal: str | None) -> Comparison | None:
    """topic_ordered against shuffled in the MHA models after DroPE, on the endpoint. recal: that of the DroPE runs."""
    results = complete(results)
    found = compare(results, endpoint_of(results), "topic_ordered", "shuffled", recal=recal)
    return None if found is None else replace(found, role="primary")


def table(results: Sequence[Result], recal: str | None) -> list[Comparison]:
    """The secondary family with Holm's correction, then exploratory contrasts without any."""
    results = complete(results)
    name = endpoint_of(results)
    ordered, shuffled, blocks = "topic_ordered", "shuffled", "random_blocks"
    family: list[tuple[str, str, str, str, str]] = [
        (name, ordered, shuffled, "gqa", "drope"),
        (name, blocks, shuffled, "mha", "drope"),
        (name, ordered, blocks, "mha", "drope"),
        *((name, ordered, shuffled, "mha", phase) for phase in ("rope", "extra", "nope")),
        *((other, ordered, shuffled, "mha", "drope") for other in ("excess_lag", "recurrence")),
    ]
    others = [
        (other, treated, shuffled, attention, phase)
        for treated in dict.fromkeys(result["run"]["ordering"] for result in results)
        if treated != shuffled
        for attention in ("mha", "gqa")
        for phase in ("drope", "rope")
        for other in METRICS
    ]
    others = [what for what in others if what not in family and what != (name, ordered, shuffled, "mha", "drope")]
    secondary, exploratory = (_all(results, listed, recal) for listed in (family, others))
    adjusted = holm([one.p for one in secondary])
    return [
        *(replace(one, p_holm=p, role="secondary") for one, p in zip(secondary, adjusted, strict=True)),
        *exploratory,
    ]


def _all(
    results: Sequence[Result], contrasts: Sequence[tuple[str, str, str, str, str]], recal: str | None
) -> list[Comparison]:
    """Those (metric, treated, control, attention, phase) contrasts that the results allow."""
    found = (
        compare(results, name, treated, control, attention=attention, phase=phase, recal=recal)
        for name, treated, control, attention, phase in contrasts
    )
    return [one for one in found if one is not None]


def not_recovered(results: Sequence[Result], found: Comparison, recal: str | None) -> tuple[int, int]:
    """(how many models of a comparison stayed above their RoPE parent's loss, of how many)."""
    flags = [
        not result["training"]["recovered"]
        for result in results
        if result["run"]["phase"] == found.phase == "drope"
        and result["run"]["recal"] == recal
        and result["run"]["attention"] == found.attention
        and result["run"]["ordering"] in (found.treated, found.control)
        and result["run"]["seed"] in found.seeds
    ]
    return sum(flags), len(flags)


def verdict(found: Comparison | None) -> tuple[str, str]:
    """("supported", "refuted", "real and negligible" or "undecided", the reason), from the primary comparison alone.

    supported: p < .05 and a positive difference. refuted: the 95% interval lies below MARGIN. Both: real and
    negligible. Otherwise, and always with fewer than MIN_SEEDS seeds or without a Bayes ceiling, undecided.
    """
    if found is None:
        return "undecided", "there is no seed with both orderings after DroPE"
    n, text = len(found.seeds), f"difference {found.difference:+.4f}, p = {found.p:.4f}, {len(found.seeds)} seeds"
    if found.metric != "endpoint":
        return "undecided", f"the primary endpoint needs a Bayes ceiling, which these data lack ({text})"
    if n < MIN_SEEDS or found.low is None or found.high is None:
        return "undecided", f"the exact test needs {MIN_SEEDS} seeds ({text})"
    text += f", 95% interval {found.low:+.4f} to {found.high:+.4f}"
    positive, excluded = found.p < 0.05 and found.difference > 0, found.high < MARGIN
    if positive and excluded:
        return "real and negligible", text
    return ("supported" if positive else "refuted" if excluded else "undecided"), text
