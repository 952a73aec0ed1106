"""Ordering of training data and attention heads: matrices of conditions, reference levels, speeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence import speeds
from evidence.drawing import Drawing
from evidence.record import ROOT, Claim, bare, markdown, observed, read, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "packages/attn_clustering/results"
GPU_SPEEDS, CPU_SPEEDS = (f"{RESULTS}/bench/attn-clustering-{device}.json" for device in ("cuda", "cpu"))
STATED = {
    "unigram topic filter, all positions": ("unigram_filter_with_first", 3, {"faithful-v1": 8.036, "sanity": 5.274}),
    "Bayes floor, all positions": ("bayes_floor_with_first", 3, {"faithful-v1": 7.310, "sanity": 4.534}),
    "chance within-topic share, causal": ("within_ratio_chance", 3, {"faithful-v1": 0.597, "sanity": 0.694}),
    "chance within-topic share, the original's non-causal metric": (
        "within_ratio_legacy_chance", 3, {"faithful-v1": 0.477, "sanity": 0.592},
    ),
}  # fmt: skip
"""Level -> (its entry in the record, digits, what was stated for the first run)."""
CONTROLLED = ("controlled-v1", "controlled-small")
"""The pre-registered experiments, the larger first."""
_SANITY_STEPS = 5000


def levels() -> str:
    """What can be reached on the languages, and by chance, beside what was stated."""
    names = ("faithful-v1", "sanity")
    found = {name: read(f"{RESULTS}/levels/{name}.json") for name in names}
    body = [
        [
            text,
            *(cell for name in names for cell in (bare(found[name][key]["value"], digits), bare(said[name], digits))),
        ]
        for text, (key, digits, said) in STATED.items()
    ]
    return markdown(["level", "`faithful-v1`", "stated", "`sanity`", "stated"], body, "lrrrr")


def speed() -> str:
    return speeds.table({"one H200": GPU_SPEEDS, "2 shared cores": CPU_SPEEDS})


@cache
def _matrix(name: str) -> Any:
    """The collected record of an experiment."""
    from attn_clustering.report_data import read_matrix

    return read_matrix(ROOT / RESULTS / name)


@cache
def _conclusion(name: str) -> Any:
    """What the pre-registered rules conclude from an experiment."""
    from attn_clustering.conclusion import conclude

    return conclude(_matrix(name))


def conditions(name: str) -> str:
    """The endpoint and the loss of every condition of an experiment: means over seeds with their range."""
    from attn_clustering.figures import PHASE
    from attn_clustering.report_data import condition_rows

    body = [
        [row["ordering"], PHASE[row["phase"]], str(row["seeds"]), *(_spread(row[key]) for key in ("probe", "endpoint")),
         _spread(row["loss"]), _spread(row["above"], "+")]
        for row in condition_rows(_matrix(name))
    ]  # fmt: skip
    header = ["ordering", "models", "seeds", "topic probe", "endpoint", "validation loss, nats", "above the floor"]
    return markdown(header, body, "llrrrrr")


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, least and largest."""
    mean = sum(values) / len(values)
    return f"{mean:{sign}.3f} [{min(values):{sign}.3f}, {max(values):{sign}.3f}]"


def comparisons(name: str) -> str:
    """The primary contrast and the secondary family of an experiment."""
    from attn_clustering.analysis import compare

    body = [
        [
            one.role,
            compare.METRICS[one.metric],
            f"{one.treated} − {one.control}",
            f"{one.attention}, {one.phase}",
            str(len(one.seeds)),
            f"{one.difference:+.4f}" + ("" if one.low is None else f" [{one.low:+.4f}, {one.high:+.4f}]"),
            f"{one.p:.4f}",
            "" if one.p_holm is None else f"{one.p_holm:.4f}",
        ]
        for one in _compared(name)
    ]
    header = ["", "metric", "orderings", "models", "seeds", "difference", "p", "Holm"]
    return markdown(header, body, "llllrrrr")


def _compared(name: str) -> list[Any]:
    """The primary comparison and the secondary ones."""
    from attn_clustering.analysis import compare

    files, first = _matrix(name), _conclusion(name).primary
    others = [one for one in compare.table(files.results, files.recal) if one.role == "secondary"]
    return [*([] if first is None else [first]), *others]


def primary_text() -> str:
    """The pre-registered contrast in a few words, of the largest experiment that has a record."""
    name = next((name for name in CONTROLLED if name in _matrices()), None)
    if name is None:
        return "not run yet"
    one = _compared(name)[0]
    spread = "" if one.low is None else f" [{one.low:+.3f}, {one.high:+.3f}]"
    return f"{one.difference:+.3f}{spread}, {len(one.seeds)} seeds of `{name}`: {_conclusion(name).named}"


def claims() -> list[Claim]:
    """Comparisons of the collected matrices, levels, speeds."""
    found = []
    for name in _matrices():
        found += _of_matrix(name)
    for name in ("faithful-v1", "sanity"):
        path = f"{RESULTS}/levels/{name}.json"
        for text, (key, digits, said) in STATED.items():
            level = read(path)[key]
            found.append(
                Claim(
                    f"attn_clustering/level-{name}-{key.replace('_', '-')}",
                    f"{name}: {text} is {bare(level['value'], digits)}, stated for the first run "
                    f"{bare(said[name], digits)} (generated language).",
                    text,
                    [level["value"]],
                    "measured",
                    [path],
                    config=path,
                    test=f"standard error {level['se']:.2g}",
                )
            )
    sanity = _sanity_step_ms()
    both = 2 * _SANITY_STEPS * sanity / 1e3
    found.append(
        Claim(
            "attn_clustering/sanity-time",
            f"A step of sanity (64 x 256 tokens) takes {sanity:.1f} ms on one H200, so that training both orderings "
            f"alone takes {both:.0f} s, where 60 s are asked for the whole matrix.",
            "seconds of two trainings",
            [both],
            verdict(both, 60, at_most=True),
            [GPU_SPEEDS],
            test="median of repeats, times steps",
            required="the sanity matrix within 60 s",
        )
    )
    found += observed("attn_clustering", f"{RESULTS}/observed.json")
    found += speeds.claims("attn_clustering", GPU_SPEEDS, "on one H200", "random tokens and generated data")
    return found + speeds.claims("attn_clustering", CPU_SPEEDS, "on 2 shared cores", "random tokens and generated data")


def _sanity_step_ms() -> float:
    """Median milliseconds of a training step."""
    return float(next(row["ms_per_step"] for row in read(GPU_SPEEDS)["rows"] if row["stage"] == "train sanity mha"))


def _of_matrix(name: str) -> list[Claim]:
    from attn_clustering.analysis import compare

    found, data, conclusion = [], _matrix(name).results[0]["run"]["data"], _conclusion(name)
    for i, one in enumerate(_compared(name)):
        word, why = f"p = {one.p_holm:.4f} (Holm)" if one.p_holm is not None else "", "secondary family"
        if one.role == "primary":
            word, why = conclusion.named, conclusion.why
        found.append(
            Claim(
                f"attn_clustering/{name}-{i:02d}",
                f"{name}: {compare.METRICS[one.metric]}, {one.treated} less {one.control} ({one.attention}, "
                f"{one.phase}): {one.difference:+.4f} over {len(one.seeds)} seeds ({data}): {word} ({why}).",
                compare.METRICS[one.metric],
                [a - b for a, b in zip(one.treated_values, one.control_values, strict=True)],
                word,
                _raw(name, one),
                config=f"{RESULTS}/{name}/experiment.json",
                seeds=one.seeds,
                interval=None if one.low is None else (one.low, one.high),
                test=f"exact paired sign-flip, p = {one.p:.4f}; BCa over seeds",
            )
        )
    found.append(
        Claim(
            f"attn_clustering/{name}-caveats",
            f"{name} ({data}): {' '.join(conclusion.sentences())}",
            "nats above the Bayes floor, shuffled models with RoPE",
            [] if conclusion.above_floor is None else [conclusion.above_floor],
            "measured",
            _analyses(name),
            config=f"{RESULTS}/{name}/experiment.json",
            seeds=() if conclusion.primary is None else conclusion.primary.seeds,
            test="mean over seeds",
        )
    )
    return found


def _analyses(name: str) -> list[str]:
    """Every analysis of a matrix."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / RESULTS / name).glob("*/analysis/analysis.json"))]


def _raw(name: str, one: Any) -> list[str]:
    """The analyses a comparison is made from."""
    wanted = {"attention": (one.attention,), "phase": (one.phase,), "ordering": (one.treated, one.control)}
    chosen = ((path, read(path)["run"]) for path in _analyses(name))
    return [path for path, run in chosen if run["seed"] in one.seeds and all(run[k] in v for k, v in wanted.items())]


def _matrices() -> list[str]:
    """Collected matrices, by folder."""
    return sorted(path.parent.name for path in Path(ROOT / RESULTS).glob("*/experiment.json"))


TABLES = {
    "attn_clustering.levels": levels,
    "attn_clustering.speed": speed,
    **{f"attn_clustering.{name}": lambda name=name: comparisons(name) for name in _matrices()},  # type: ignore[misc]
    **{
        f"attn_clustering.{name}-conditions": lambda name=name: conditions(name)  # type: ignore[misc]
        for name in _matrices()
        if name in CONTROLLED
    },
}


def endpoint_figure(name: str) -> Figure:
    """The endpoint of every seed by ordering, before and after DroPE, between its two levels."""
    from attn_clustering import figures, report_data
    from attn_clustering.analysis import compare

    rows = report_data.seed_rows(_matrix(name), compare.endpoint_of(_matrix(name).results))
    return figures.seed_scatter(rows, "topic probe, fraction of the way", report_data.ENDPOINT_LEVELS)


DRAWINGS = [
    Drawing(f"{RESULTS}/{name}/figures/endpoint.png", _analyses(name), lambda name=name: endpoint_figure(name))  # type: ignore[misc]
    for name in _matrices()
    if name in CONTROLLED
]
