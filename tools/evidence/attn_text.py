"""Real text: what the orderings differ in over three seeds, which decide nothing, and what the corpus is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from evidence.attn_matrices import RESULTS, matrix, raw_of
from evidence.record import Claim, markdown, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "text"
CORPUS = f"{RESULTS}/{NAME}/corpus.json"
METRICS = (
    ("val_loss", "validation loss, nats", 3),
    ("probe", "topic probe, blocks 3 to 6", 3),
    ("block 8", "topic probe, last block", 3),
    ("excess_lag", "within-topic attention above the lag-matched null", 4),
    ("recurrence", "attention to a recurring topic", 4),
    ("specialisation", "specialisation of heads by topic", 4),
)
"""Metric, what it is called, digits."""
PHASES = (("rope", "RoPE"), ("drope", "after DroPE"))


class Contrast(NamedTuple):
    """topic_ordered less shuffled, paired by seed."""

    one: Any
    """The comparison itself."""
    low: float
    high: float
    """95% Student-t interval of the mean: three seeds are too few for a bootstrap."""

    @property
    def differences(self) -> list[float]:
        return [a - b for a, b in zip(self.one.treated_values, self.one.control_values, strict=True)]

    @property
    def same_sign(self) -> int:
        """Seeds whose difference has the mean's sign."""
        return sum(x * self.one.difference > 0 for x in self.differences)


def _contrast(metric: str, phase: str) -> Contrast:
    from attn_clustering.analysis import compare
    from lab_shared.stats import seeds_table

    files = matrix(NAME)
    one: Any = compare.compare(
        compare.complete(files.results), metric, "topic_ordered", "shuffled", phase=phase, recal=files.recal
    )
    pairs = zip(one.seeds, one.treated_values, one.control_values, strict=True)
    summary: Any = seeds_table([{"seed": seed, "x": a - b} for seed, a, b in pairs]).summary["x"]
    return Contrast(one, summary.low, summary.high)


def contrasts() -> str:
    """Means over seeds by ordering, and their difference; nothing is corrected or judged."""
    body = []
    for metric, text, digits in METRICS:
        for phase, models in PHASES:
            found = _contrast(metric, phase)
            means = [_mean(values) for values in (found.one.control_values, found.one.treated_values)]
            difference = f"{found.one.difference:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
            body.append([
                text, models, *(f"{mean:.{digits}f}" for mean in means), difference,
                f"{found.same_sign} of {len(found.one.seeds)}", f"{found.one.p:.2f}",
            ])  # fmt: skip
    header = ["metric", "models", "shuffled", "topic_ordered", "difference", "seeds of this sign", "p"]
    return markdown(header, body, "llrrrrr")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def claims() -> list[Claim]:
    """The contrasts, recovery, and the corpus."""
    files, found = matrix(NAME), [_corpus()]
    for metric, text, digits in METRICS:
        for phase, models in PHASES:
            it = _contrast(metric, phase)
            found.append(
                Claim(
                    f"attn_clustering/{NAME}-{metric.replace('_', '-').replace(' ', '-')}-{phase}",
                    f"text, exploratory and not corrected (real text, {len(it.one.seeds)} seeds): {text}, "
                    f"{'with RoPE' if phase == 'rope' else models}, topic_ordered less shuffled "
                    f"{it.one.difference:+.{digits}f} [{it.low:+.{digits}f}, {it.high:+.{digits}f}], of this sign in "
                    f"{it.same_sign} of {len(it.one.seeds)} seeds (p = {it.one.p:.2f}).",
                    text,
                    it.differences,
                    "undecided",
                    raw_of(NAME, it.one),
                    config=f"{RESULTS}/{NAME}/experiment.json",
                    seeds=it.one.seeds,
                    interval=(it.low, it.high),
                    test=f"exact paired sign-flip, p = {it.one.p:.4f}; Student t over seeds",
                )
            )
    dropped = [r for r in files.results if r["run"]["phase"] == "drope"]
    above = [float(r["training"]["val_loss_above_parent"]) for r in dropped]
    missed = sum(not r["training"]["recovered"] for r in dropped)
    found.append(
        Claim(
            f"attn_clustering/{NAME}-recovery",
            f"text (real text, {files.experiment.seeds} seeds): {missed} of {len(dropped)} models did not recover: "
            f"after DroPE they end {min(above):+.3f} to {max(above):+.3f} nats from their loss with RoPE, where +0.02 "
            "counts as recovered.",
            "validation loss after DroPE less that with RoPE, nats",
            above,
            "NOT met" if missed else "met",
            [f"{RESULTS}/{NAME}/{r['run']['name']}/analysis/analysis.json" for r in dropped],
            config=f"{RESULTS}/{NAME}/experiment.json",
            required="at most 0.02 nats",
        )
    )
    return found


def _corpus() -> Claim:
    corpus = read(CORPUS)
    pools, sequences = corpus["pools"], corpus["sequences"]
    passes = sequences["val"]["passes"]
    whole = next(r["training"]["epochs"] for r in matrix(NAME).results if r["run"]["phase"] == "rope")
    return Claim(
        f"attn_clustering/{NAME}-corpus",
        f"The corpus: {corpus['paragraphs']['documents']:,} documents of "
        f"{' and '.join(source['text'] for source in corpus['sources'])}; {len(corpus['topics']['names'])} topics as "
        f"given; {pools['train']['tokens'] / 1e6:.1f} million tokens for training, {sequences['train']['sequences']:,} "
        f"sequences of {corpus['settings']['seq_len']}, seen {whole:.1f} times; {pools['val']['tokens'] / 1e6:.2f} "
        f"million held out by document, of which the smallest topics are repeated up to {max(passes):.1f} times.",
        "tokens for training",
        [pools["train"]["tokens"]],
        "measured",
        [CORPUS],
        config=CORPUS,
    )


def loss_figure(name: str) -> Figure:
    """Validation loss of every seed by ordering, before and after DroPE."""
    from attn_clustering import figures, report_data

    return figures.seed_scatter(report_data.seed_rows(matrix(name), "val_loss"), "validation loss (nats)")
