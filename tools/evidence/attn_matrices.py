"""Collected matrices of attn_clustering: their tables, claims and figures, whatever the experiment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence.record import ROOT, Claim, markdown, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "packages/attn_clustering/results"
TEXT = "real text: OpenStax textbooks and books of Standard Ebooks"
CONTROLLED = ("controlled-v1", "controlled-small")
"""The pre-registered experiments, the larger first."""
EXPLORED = (
    ("val_loss", "validation loss", " nats"),
    ("specialisation", "specialisation of heads by topic, mean over heads,", ""),
)
"""Metric, its name in a sentence, its unit."""


def matrices() -> list[str]:
    """Collected matrices, by folder."""
    return sorted(path.parent.name for path in Path(ROOT / RESULTS).glob("*/experiment.json"))


def repeated() -> list[str]:
    """Collected matrices of more than one seed: with one there is nothing to compare."""
    return [name for name in matrices() if read(f"{RESULTS}/{name}/experiment.json")["seeds"] > 1]


def controlled() -> list[str]:
    """The pre-registered experiments that have a record, the larger first."""
    return [name for name in CONTROLLED if name in matrices()]


@cache
def matrix(name: str) -> Any:
    """The collected record of an experiment."""
    from attn_clustering.report_data import read_matrix

    return read_matrix(ROOT / RESULTS / name)


@cache
def conclusion(name: str) -> Any:
    """What the pre-registered rules conclude from an experiment."""
    from attn_clustering.conclusion import conclude

    return conclude(matrix(name))


def analyses(name: str) -> list[str]:
    """Every analysis of a matrix."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / RESULTS / name).glob("*/analysis/analysis.json"))]


def data_of(name: str) -> str:
    """What an experiment was measured on, for a sentence."""
    said = str(matrix(name).results[0]["run"]["data"])
    return TEXT if said.startswith("text corpus") else said


def raw_of(name: str, one: Any) -> list[str]:
    """The analyses a comparison is made from."""
    wanted = {"attention": (one.attention,), "phase": (one.phase,), "ordering": (one.treated, one.control)}
    chosen = ((path, read(path)["run"]) for path in analyses(name))
    return [path for path, run in chosen if run["seed"] in one.seeds and all(run[k] in v for k, v in wanted.items())]


def conditions(name: str) -> str:
    """The endpoint and the loss of every condition of an experiment: means over seeds with their range.

    Data without a Bayes filter have no endpoint and no floor.
    """
    from attn_clustering.figures import PHASE
    from attn_clustering.report_data import condition_rows

    rows = condition_rows(matrix(name))
    columns = [
        (text, key, sign)
        for text, key, sign in (
            ("topic probe", "probe", ""),
            ("endpoint", "endpoint", ""),
            ("validation loss, nats", "loss", ""),
            ("above the floor", "above", "+"),
        )
        if rows[0][key]
    ]
    body = [
        [
            row["ordering"],
            PHASE[row["phase"]],
            str(row["seeds"]),
            *(_spread(row[key], sign) for _, key, sign in columns),
        ]
        for row in rows
    ]
    header = ["ordering", "models", "seeds", *(text for text, _, _ in columns)]
    return markdown(header, body, "ll" + "r" * (len(header) - 2))


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

    files, first = matrix(name), conclusion(name).primary
    others = [one for one in compare.table(files.results, files.recal) if one.role == "secondary"]
    return [*([] if first is None else [first]), *others]


def _blocks(name: str, phase: str) -> list[Any]:
    """Exploratory: topic_ordered less shuffled in the probe's accuracy, block by block."""
    from attn_clustering.analysis import compare

    files = matrix(name)
    results = compare.complete(files.results)
    found = [
        compare.compare(results, f"block {i}", "topic_ordered", "shuffled", phase=phase, recal=files.recal)
        for i in range(1, files.experiment.model.layers + 1)
    ]
    return [one for one in found if one is not None]


def blocks(name: str) -> str:
    """Probe accuracy after every block: means over seeds, and what ordering changes."""
    from attn_clustering.figures import PHASE

    body = []
    for phase in ("rope", "extra", "drope"):
        found = _blocks(name, phase)
        for ordering, values in (("shuffled", "control_values"), ("topic_ordered", "treated_values")):
            means = [sum(getattr(one, values)) / len(one.seeds) for one in found]
            body.append([PHASE[phase], ordering, *(f"{mean:.3f}" for mean in means)])
        body.append([PHASE[phase], "difference", *(_block(one) for one in found)])
    header = ["models", "ordering", *(f"block {i}" for i in range(1, len(body[0]) - 1))]
    return markdown(header, body, "ll" + "r" * (len(header) - 2))


def _interval(one: Any) -> tuple[float, float] | None:
    return None if one.low is None else (one.low, one.high)


def _block(one: Any) -> str:
    return f"{one.difference:+.3f}" + ("" if one.low is None else f" [{one.low:+.3f}, {one.high:+.3f}]")


def primary_text() -> str:
    """The pre-registered contrast in a few words, of the largest experiment that has a record."""
    name = next(iter(controlled()), None)
    if name is None:
        return "not run yet"
    one = _compared(name)[0]
    spread = "" if one.low is None else f" [{one.low:+.3f}, {one.high:+.3f}]"
    return f"{one.difference:+.3f}{spread}, {len(one.seeds)} seeds of `{name}`: {conclusion(name).named}"


def of_matrix(name: str) -> list[Claim]:
    from attn_clustering.analysis import compare

    found, data, judged = [], data_of(name), conclusion(name)
    for i, one in enumerate(_compared(name)):
        word, why = f"p = {one.p_holm:.4f} (Holm)" if one.p_holm is not None else "", "secondary family"
        if one.role == "primary":
            word, why = judged.named, judged.why
        found.append(
            Claim(
                f"attn_clustering/{name}-{i:02d}",
                f"{name}: {compare.METRICS[one.metric]}, {one.treated} less {one.control} ({one.attention}, "
                f"{one.phase}): {one.difference:+.4f} over {len(one.seeds)} seeds ({data}): {word} ({why}).",
                compare.METRICS[one.metric],
                [a - b for a, b in zip(one.treated_values, one.control_values, strict=True)],
                word,
                raw_of(name, one),
                config=f"{RESULTS}/{name}/experiment.json",
                seeds=one.seeds,
                interval=_interval(one),
                test=f"exact paired sign-flip, p = {one.p:.4f}; BCa over seeds",
            )
        )
    found.append(
        Claim(
            f"attn_clustering/{name}-caveats",
            f"{name} ({data}): {' '.join(judged.sentences())}",
            "nats above the Bayes floor, shuffled models with RoPE",
            [] if judged.above_floor is None else [judged.above_floor],
            "measured",
            analyses(name),
            config=f"{RESULTS}/{name}/experiment.json",
            seeds=() if judged.primary is None else judged.primary.seeds,
            test="mean over seeds",
        )
    )
    return found


def exploratory(name: str) -> list[Claim]:
    """Not corrected, and no part of the verdict: the same contrast block by block, and in other numbers."""
    from attn_clustering.analysis import compare

    data, files = data_of(name), matrix(name)
    by_block = _blocks(name, "drope")
    said = ", ".join(f"{_block(one)} after block {i} (p = {one.p:.4f})" for i, one in enumerate(by_block, 1))
    found = [
        Claim(
            f"attn_clustering/{name}-blocks",
            f"{name}, exploratory and not corrected: accuracy of the topic probe after DroPE, topic_ordered less "
            f"shuffled over {len(by_block[0].seeds)} seeds ({data}): {said}.",
            "topic probe accuracy, means over seeds by block",
            [one.difference for one in by_block],
            "measured",
            raw_of(name, by_block[0]),
            config=f"{RESULTS}/{name}/experiment.json",
            test="exact paired sign-flip and BCa over seeds, by block",
        )
    ]
    results = compare.complete(files.results)
    for metric, text, unit in EXPLORED:
        for phase, models in (("rope", "with RoPE"), ("drope", "after DroPE")):
            one: Any = compare.compare(results, metric, "topic_ordered", "shuffled", phase=phase, recal=files.recal)
            means = [sum(values) / len(one.seeds) for values in (one.treated_values, one.control_values)]
            found.append(
                Claim(
                    f"attn_clustering/{name}-{metric.replace('_', '-')}-{phase}",
                    f"{name}, exploratory and not corrected: {text} {models}, topic_ordered less shuffled over "
                    f"{len(one.seeds)} seeds ({data}): {means[0]:.4f} less {means[1]:.4f}, {one.difference:+.4f} "
                    f"[{one.low:+.4f}, {one.high:+.4f}]{unit} (p = {one.p:.4f}).",
                    compare.METRICS[metric],
                    [a - b for a, b in zip(one.treated_values, one.control_values, strict=True)],
                    "measured",
                    raw_of(name, one),
                    config=f"{RESULTS}/{name}/experiment.json",
                    seeds=one.seeds,
                    interval=_interval(one),
                    test=f"exact paired sign-flip, p = {one.p:.4f}; BCa over seeds",
                )
            )
    return found


def endpoint_figure(name: str) -> Figure:
    """The endpoint of every seed by ordering, before and after DroPE, between its two levels."""
    from attn_clustering import figures, report_data
    from attn_clustering.analysis import compare

    rows = report_data.seed_rows(matrix(name), compare.endpoint_of(matrix(name).results))
    return figures.seed_scatter(rows, "topic probe, fraction of the way", report_data.ENDPOINT_LEVELS)


def probes_figure(name: str) -> Figure:
    """The topic probe by block, ordering and phase, between the same two levels."""
    from attn_clustering import figures, report_data

    drawn = matrix(name).drawn
    token, bayes = (sum(r["probe"][key] for r in drawn) / len(drawn) for key in ("token", "bayes"))
    return figures.probe_curves(report_data.probe_rows(matrix(name)), token, bayes)
