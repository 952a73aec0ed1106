"""What was claimed about memory slots, each claim with the statistic that decides it.

The figures under `said` are those of the original notes (PROJECT_MAP.md, 2026-01-01), but for E0's -.572: that is of
another document of the original (docs/PROJECT_GUIDE.md), where the notes have "~-0.25". The original's scores of E0
to E2 are means over whole sequences, those of E3 to E5 of the last spacing alone: they were compared with each other,
and their signs were lost. Here both sides of a difference are the same score on the same windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rh_memory.diagnostics.aggregate import ABLATION, headlines
from rh_memory.records import Record

Value = Callable[[Record], float | None]


def score(name: str) -> Value:
    """A score of evaluation.json."""
    return lambda record: None if record.evaluation is None else float(record.evaluation[name]["value"])


def found(name: str) -> Value:
    """A headline of diagnostics.json."""
    return lambda record: None if record.diagnostics is None else headlines(record.diagnostics).get(name)


def stretches_differ_by(record: Record) -> float | None:
    """Standard deviation between long stretches beyond that of noise, nats."""
    blocks = (record.diagnostics or {}).get("blocks")
    return None if blocks is None else blocks["std_between"] - blocks["std_expected_from_noise"]


def slots_look_apart(record: Record) -> float | None:
    """Standard deviation over slots of the mean distance they look back, in the last layer, spacings."""
    layers = (record.diagnostics or {}).get("attention")
    return layers[-1]["spread over slots"]["value"] if layers and "spread over slots" in layers[-1] else None


@dataclass(frozen=True)
class Claim:
    """A claim holds when the statistic lies below (above) a bound with its whole interval over seeds.

    experiments: alternatives, of which the one with most seeds is used. minus: the statistic is the difference to
    these, seed by seed. spread: it is the standard deviation over seeds instead of the mean.
    """

    claim: str
    said: str
    statistic: str
    value: Value
    experiments: tuple[str, ...]
    minus: tuple[str, ...] = ()
    below: float | None = None
    above: float | None = None
    spread: bool = False


LAST, ALL = score("nll_last"), score("nll_all")
CLAIMS = (
    Claim(
        "E0 without memory reaches -.572",
        "-.572 (the original's guide; about -.25 in its notes)",
        "nll_all",
        ALL,
        ("e0",),
        below=-0.55,
    ),
    Claim(
        "prefix memory is decorative (E1)",
        "ablation about 0",
        "cost of removing the most important slot",
        found("largest_removal_cost"),
        ("e1-rope", "e1"),
        below=ABLATION,
    ),
    Claim(
        "prefix memory is decorative (E2)",
        "ablation about 0",
        "cost of removing the most important slot",
        found("largest_removal_cost"),
        ("e2-rope", "e2"),
        below=ABLATION,
    ),
    Claim(
        "prefix memory gains nothing over none (E1)",
        "-.379 against -.572 (the guide)",
        "nll_last less that without memory",
        LAST,
        ("e1-rope", "e1"),
        minus=("e0-rope", "e0"),
        above=-0.01,
    ),
    Claim(
        "prefix memory gains nothing over none (E2)",
        "-.384 against -.572 (the guide)",
        "nll_last less that without memory",
        LAST,
        ("e2-rope", "e2"),
        minus=("e0-rope", "e0"),
        above=-0.01,
    ),
    Claim(
        "postfix memory beats prefix memory (E3, E2)",
        "+14 %",
        "nll_last less that of E2",
        LAST,
        ("e3", "e3-original"),
        minus=("e2-rope", "e2"),
        below=0.0,
    ),
    Claim(
        "E3's slots are told apart by their identities",
        "+93 to +117 % NLL permuted",
        "cost of permuting the whole identity",
        found("whole_identity_cost"),
        ("e3", "e3-original"),
        above=ABLATION,
    ),
    Claim(
        "permuted identities and auxiliary targets improve on E3 (E4)",
        "+36 %",
        "nll_last less that of E3",
        LAST,
        ("e4", "e4-original"),
        minus=("e3", "e3-original"),
        below=0.0,
    ),
    Claim("E4 as it was reaches .194", ".194, .329, .343", "nll_last", LAST, ("e4-original",), below=0.2),
    Claim(
        "E4 does without identities",
        "+1.0 % NLL permuted",
        "cost of permuting the whole identity",
        found("whole_identity_cost"),
        ("e4", "e4-original"),
        below=ABLATION,
    ),
    Claim(
        "E4's slots are redundant",
        "largest ablation .0058",
        "cost of removing the most important slot",
        found("largest_removal_cost"),
        ("e4", "e4-original"),
        below=ABLATION,
    ),
    Claim(
        "E4's slots learn apart from each other",
        "gradient correlation .296, .9 in E1",
        "mean cosine of the slots' gradients",
        found("gradient_cosine"),
        ("e4", "e4-original"),
        below=0.7,
    ),
    Claim(
        "the slots' gradients have high rank",
        "rank ratio over .5",
        "effective rank over number of slots",
        found("gradient_rank_share"),
        ("e4", "e4-original"),
        above=0.5,
    ),
    Claim(
        "E4's slots do not specialise in places",
        "spread of centres 4.3 spacings",
        "spread over slots of the distance looked back",
        slots_look_apart,
        ("e4", "e4-original"),
        below=10.0,
    ),
    Claim(
        "the difficulty shifts along the data",
        "CV .644",
        "spread between stretches beyond noise",
        stretches_differ_by,
        ("e4", "e4-original"),
        above=0.0,
    ),
    Claim(
        "rollouts drift little",
        "slope .076",
        "RMS error of u at the last step, less that of AR(64)",
        found("rollout_rms_minus_ar"),
        ("e4", "e4-original"),
        below=0.0,
    ),
    Claim(
        "seeds differ much",
        "one of three is good",
        "standard deviation of nll_last over seeds",
        LAST,
        ("e4", "e4-original"),
        above=0.05,
        spread=True,
    ),
    Claim(
        "orthogonal and dropped slots get roles of their own (E5)",
        "an option for E5",
        "largest removal cost less that of E4",
        found("largest_removal_cost"),
        ("e5", "e5-original"),
        minus=("e4", "e4-original"),
        above=0.0,
    ),
    Claim(
        "running normalisation removes the shift (E5)",
        "an option for E5",
        "spread between stretches beyond noise, less that of E4",
        stretches_differ_by,
        ("e5", "e5-original"),
        minus=("e4", "e4-original"),
        below=0.0,
    ),
)
