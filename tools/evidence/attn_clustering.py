"""Ordering of training data and attention heads: reference levels, the easy data of the first run, speeds."""

from __future__ import annotations

from typing import Any

from evidence import attn_faithful, attn_nope, attn_text, speeds
from evidence.attn_matrices import (
    RESULTS,
    analyses,
    blocks,
    comparisons,
    conditions,
    controlled,
    endpoint_figure,
    exploratory,
    matrices,
    matrix,
    of_matrix,
    probes_figure,
    repeated,
)
from evidence.drawing import Drawing
from evidence.record import Claim, bare, markdown, observed, read, verdict

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
_SANITY_STEPS = 5000
_SANITY_LOG = {"parameters": "about 3.8 million", "ln V": "6.24", "gap": "about 1.7"}
"""What the log of the first run says about its easy data; it has no results of it."""


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


def sanity() -> str:
    """The easy data of the first run: what its log says, what can be reached, and what two runs of each kind reach."""
    files = matrix("sanity")
    level = {key: value["value"] for key, value in files.levels.items() if isinstance(value, dict) and "value" in value}
    runs = [_run(files, ordering, phase) for phase in ("rope", "drope") for ordering in ("shuffled", "topic_ordered")]
    loss = [run["training"]["val_loss"] for run in runs]
    above = [""] * 2 + [f" ({run['training']['val_loss_above_parent']:+.3f})" for run in runs[2:]]
    floor, filtered, token, bayes = (
        level[key] for key in ("bayes_floor", "unigram_filter", "one_token_accuracy", "bigram_filter_accuracy")
    )
    top, chance = level["ln_vocab"], level["within_ratio_legacy_chance"]
    body = [
        ["parameters", _SANITY_LOG["parameters"], "3,296,000", *(f"{run['training']['parameters']:,}" for run in runs)],
        ["validation loss, nats", f"{_SANITY_LOG['ln V']} at random", f"{floor:.3f} to {filtered:.3f}",
         *(f"{x:.3f}{more}" for x, more in zip(loss, above, strict=True))],
        ["nats below ln V", _SANITY_LOG["gap"], f"{top - filtered:.3f} to {top - floor:.3f}",
         *(f"{top - x:.3f}" for x in loss)],
        ["topic probe on the embedding", "", f"{token:.3f}", *(f"{run['probe']['accuracy'][0]:.3f}" for run in runs)],
        ["topic probe after the last block", "", f"{token:.3f} to {bayes:.3f}",
         *(f"{run['probe']['accuracy'][-1]:.3f}" for run in runs)],
        ["within-topic attention above the lag-matched null", "", "0 by chance",
         *(f"{run['attention']['excess_lag']:.3f}" for run in runs)],
        ["within-topic share, the original's non-causal metric", "", f"{chance:.3f} by chance",
         *(f"{run['legacy']['legacy_within_noncausal']:.3f}" for run in runs)],
    ]  # fmt: skip
    header = ["", "log", "level", "shuffled", "topic_ordered", "shuffled, DroPE", "topic_ordered, DroPE"]
    return markdown(header, body, "lrrrrrr")


def _run(files: Any, ordering: str, phase: str) -> Any:
    """The only analysed run of a condition of an experiment with one seed."""
    (found,) = (r for r in files.drawn if (r["run"]["ordering"], r["run"]["phase"]) == (ordering, phase))
    return found


def _of_sanity() -> list[Claim]:
    """Loss between its levels, recovery after DroPE, seconds of the two trainings."""
    files = matrix("sanity")
    level, raw = files.levels, analyses("sanity")
    floor, filtered = (level[key]["value"] for key in ("bayes_floor", "unigram_filter"))
    trained = [_run(files, ordering, "rope")["training"] for ordering in ("shuffled", "topic_ordered")]
    dropped = [_run(files, ordering, "drope")["training"] for ordering in ("shuffled", "topic_ordered")]
    loss, above = [x["val_loss"] for x in trained], [x["val_loss_above_parent"] for x in dropped]
    closed = [100 * (filtered - x) / (filtered - floor) for x in loss]
    inside = all(floor <= x <= filtered for x in loss)
    return [
        Claim(
            "attn_clustering/sanity-loss",
            f"sanity (generated dirichlet language, one seed): validation losses of {loss[0]:.3f} (shuffled) and "
            f"{loss[1]:.3f} nats (topic_ordered) lie {'' if inside else 'NOT '}between the unigram topic filter "
            f"({filtered:.3f}) and the Bayes floor ({floor:.3f}): {closed[0]:.0f}% and {closed[1]:.0f}% of the way.",
            "validation loss with RoPE, nats",
            loss,
            "met" if inside else "NOT met",
            raw,
            config=f"{RESULTS}/sanity/experiment.json",
            seeds=(files.experiment.first_seed,),
            required="between unigram topic filter and Bayes floor",
        ),
        Claim(
            "attn_clustering/sanity-recovery",
            f"sanity (generated dirichlet language, one seed): recalibrated as the first run was, the models end "
            f"{above[0]:+.3f} (shuffled) and {above[1]:+.3f} nats (topic_ordered) from their loss with RoPE, where "
            "+0.02 counts as recovered.",
            "validation loss after DroPE less that with RoPE, nats",
            above,
            verdict(max(above), 0.02, at_most=True),
            raw,
            config=f"{RESULTS}/sanity/experiment.json",
            seeds=(files.experiment.first_seed,),
            required="at most 0.02 nats",
        ),
        Claim(
            "attn_clustering/sanity-training",
            f"One after the other on one H200 that nothing else used, the two trainings of {_SANITY_STEPS:,} steps "
            f"took {trained[0]['train_s']:.0f} s and {trained[1]['train_s']:.0f} s from their first step.",
            "seconds",
            [x["train_s"] for x in trained],
            "measured",
            raw,
            config=f"{RESULTS}/sanity/experiment.json",
        ),
    ]


def claims() -> list[Claim]:
    """Comparisons of the collected matrices, levels, speeds."""
    found = []
    for name in repeated():
        found += of_matrix(name)
    for name in controlled():
        found += exploratory(name)
    if "sanity" in matrices():
        found += _of_sanity()
    found += attn_faithful.claims() + attn_text.claims() + attn_nope.claims()
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
    step = _sanity_step_ms()
    both = 2 * _SANITY_STEPS * step / 1e3
    found.append(
        Claim(
            "attn_clustering/sanity-time",
            f"A step of sanity (64 x 256 tokens) takes {step:.1f} ms on one H200 of its own, so that training both "
            f"orderings alone takes {both:.0f} s of the 60 s that are asked for the whole matrix.",
            "seconds of two trainings",
            [both],
            "measured",
            [GPU_SPEEDS],
            test="median of repeats, times steps",
        )
    )
    found += observed("attn_clustering", f"{RESULTS}/observed.json")
    found += speeds.claims("attn_clustering", GPU_SPEEDS, "on one H200", "random tokens and generated data")
    return found + speeds.claims("attn_clustering", CPU_SPEEDS, "on 2 shared cores", "random tokens and generated data")


def _sanity_step_ms() -> float:
    """Median milliseconds of a training step."""
    return float(next(row["ms_per_step"] for row in read(GPU_SPEEDS)["rows"] if row["stage"] == "train sanity mha"))


TABLES = {
    "attn_clustering.levels": levels,
    "attn_clustering.speed": speed,
    **{f"attn_clustering.{name}": lambda name=name: comparisons(name) for name in repeated()},  # type: ignore[misc]
    **{
        f"attn_clustering.{name}-{part}": lambda name=name, table=table: table(name)  # type: ignore[misc]
        for name in controlled()
        for part, table in (("conditions", conditions), ("blocks", blocks))
    },
    **({"attn_clustering.sanity": sanity} if "sanity" in matrices() else {}),
    "attn_clustering.faithful-v1": attn_faithful.beside,
    "attn_clustering.faithful-v1-conditions": attn_faithful.conditions,
    "attn_clustering.text-conditions": lambda: conditions(attn_text.NAME),
    "attn_clustering.text-contrasts": attn_text.contrasts,
}


DRAWINGS = [
    Drawing(f"{RESULTS}/{name}/figures/{file}.png", analyses(name), lambda name=name, draw=draw: draw(name))  # type: ignore[misc]
    for name, file, draw in (
        *((name, "endpoint", endpoint_figure) for name in controlled()),
        *((name, "probes", probes_figure) for name in (*controlled(), attn_faithful.NAME)),
        (attn_text.NAME, "loss", attn_text.loss_figure),
    )
]
