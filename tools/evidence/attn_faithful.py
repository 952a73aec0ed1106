"""faithful-v1, the first run repeated: beside its log and its JSON record, its bands, and two ways to recalibrate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from evidence.attn_matrices import RESULTS, analyses, matrix
from evidence.record import Claim, markdown

NAME = "faithful-v1"
CONDITIONS = tuple((attention, ordering) for attention in ("mha", "gqa") for ordering in ("shuffled", "topic_ordered"))
OWN, SHARED = "1pct-x0.1-own", "1pct-x0.1"
"""Recalibration on the condition's own order, as the first run did, and on one shuffled stream for all."""


def _run(attention: str, ordering: str, recal: str | None = None) -> Any:
    """The analysis of a condition with RoPE, or after a recalibration."""
    wanted = {"attention": attention, "ordering": ordering, "recal": recal}
    (found,) = (r for r in matrix(NAME).results if all(r["run"][key] == value for key, value in wanted.items()))
    return found


def _each(value: Callable[[Any], float], recal: str | None = None) -> list[float]:
    """One number of each of the four conditions."""
    return [value(_run(*condition, recal)) for condition in CONDITIONS]


def _loss(run: Any) -> float:
    return float(run["training"]["val_loss"])


def _legacy(run: Any) -> float:
    return float(run["legacy"]["legacy_within_noncausal"])


def _published(value: Callable[[Any], Any], drope: bool, log: bool) -> list[Any]:
    """The same of the four conditions in a record of the first run: its log's table or its JSON."""
    from attn_clustering.analysis.original import JSON_RECORD, LOG_TABLE

    record = LOG_TABLE if log else JSON_RECORD
    return [value(record[f"{attention}-{ordering}" + "-drope" * drope]) for attention, ordering in CONDITIONS]


def _bands() -> dict[str, list[tuple[float, bool]]]:
    """Band -> of the four conditions, the value furthest out and whether it is inside."""
    from attn_clustering.analysis.original import band_values

    found: dict[str, list[tuple[float, bool]]] = {}
    for phase, recal in (("rope", None), ("drope", OWN)):
        for condition in CONDITIONS:
            run = _run(*condition, recal)
            for key, value in band_values(phase, _loss(run), run["probe"]["accuracy"], _legacy(run)).items():
                found.setdefault(key, []).append(value)
    return {key: values[: len(CONDITIONS)] for key, values in found.items()}  # of the embedding, those with RoPE


def beside() -> str:
    """A row per quantity: here / in the JSON record / in the log; and the band where there is one."""
    from attn_clustering.analysis.original import BANDS

    bands, body = _bands(), []
    for it in _QUANTITIES:
        here = [it.here(_run(*condition, it.recal)) for condition in CONDITIONS]
        record = _published(it.old, it.recal is not None, log=False)
        log = _published(it.old, it.recal is not None, log=True) if it.in_log else ["-"] * len(CONDITIONS)
        accepted = met = ""
        if it.band:
            accepted = f"{BANDS[it.band].low:g} to {BANDS[it.band].high:g}"
            met = "met" if all(inside for _, inside in bands[it.band]) else "NOT met"
        body.append([it.text, accepted, *(" / ".join(cell) for cell in zip(here, record, log, strict=True)), met])
    header = ["here / JSON / log", "accepted", *(f"{attention}, {ordering}" for attention, ordering in CONDITIONS), ""]
    return markdown(header, body, "llrrrrl")


def _number(x: float, digits: int = 4) -> str:
    return f"{x:.{digits}f}"


def _range(values: Sequence[float], digits: int = 3) -> str:
    return f"{_number(min(values), digits)} to {_number(max(values), digits)}"


class _Quantity(NamedTuple):
    """A row of the table beside the first run."""

    text: str
    band: str | None
    recal: str | None
    here: Callable[[Any], str]
    """Its text in an analysis."""
    old: Callable[[Any], str]
    """The same in a record of the first run."""
    in_log: bool = True


def _of_loss(text: str, band: str, recal: str | None) -> _Quantity:
    return _Quantity(text, band, recal, lambda run: _number(_loss(run)), lambda old: _number(old.val_loss))


def _of_block_4(text: str, band: str | None, recal: str | None) -> _Quantity:
    return _Quantity(
        text,
        band,
        recal,
        lambda run: _number(run["probe"]["accuracy"][4]),
        lambda old: _number(old.probe[min(4, len(old.probe) - 1)], 3),  # the log has block 4 alone
    )


def _of_share(text: str, band: str | None, recal: str | None) -> _Quantity:
    return _Quantity(text, band, recal, lambda run: _number(_legacy(run)), lambda old: _number(old.within, 3))


_QUANTITIES = (
    _of_loss("validation loss with RoPE, nats", "val_loss rope", None),
    _of_loss("validation loss after DroPE, nats", "val_loss drope", OWN),
    _Quantity(
        "topic probe with RoPE, blocks 3 to 8",
        "probe deep rope",
        None,
        lambda run: _range(run["probe"]["accuracy"][3:], 4),
        lambda old: _range(old.probe[3:]),
        in_log=False,
    ),
    _of_block_4("topic probe with RoPE, block 4", None, None),
    _of_block_4("topic probe after DroPE, block 4", "probe block 4 drope", OWN),
    _Quantity(
        "topic probe on the embedding",
        "probe embedding",
        None,
        lambda run: _number(run["probe"]["accuracy"][0]),
        lambda old: _number(old.probe[0], 3),
        in_log=False,
    ),
    _of_share("within-topic share with RoPE, non-causal", None, None),
    _of_share("within-topic share after DroPE, non-causal", "legacy within drope", OWN),
)


def conditions() -> str:
    """Every run: loss beside its parent's, probe, and the share of attention within topics by both ways to count."""
    body = []
    for condition in CONDITIONS:
        for recal, text in ((None, "RoPE"), (OWN, "DroPE, own order"), (SHARED, "DroPE, shared stream")):
            run = _run(*condition, recal)
            above = run["training"].get("val_loss_above_parent")
            attention, legacy = run["attention"], _legacy(run)
            body.append([
                *condition, text, f"{_loss(run):.3f}" + ("" if above is None else f" ({above:+.3f})"),
                f"{run['probe']['middle']:.3f}", f"{attention['within']:.3f} ({attention['excess_uniform']:+.3f})",
                f"{attention['excess_lag']:+.3f}", f"{legacy:.3f} ({legacy - run['legacy_chance']['within']:+.3f})",
            ])  # fmt: skip
    header = [
        "attention", "ordering", "models", "validation loss, nats (above RoPE)", "topic probe, blocks 3 to 6",
        "within-topic share (above uniform)", "above the lag-matched null", "non-causal share (above uniform)",
    ]  # fmt: skip
    return markdown(header, body, "lllrrrrr")


def claims() -> list[Claim]:
    """Bands, levels, recovery, ordering's part in loss and probe, attention beside chance."""
    ordering = [_ordering_loss(), _ordering_probe()]
    return [*_band_claims(), _level_claim(), _recovery_claim(), *ordering, *_attention_claims()]


def _claim(name: str, sentence: str, metric: str, values: Sequence[float], verdict: str, **more: Any) -> Claim:
    said = f"{NAME} (generated dirichlet language, one seed): {sentence}"
    return Claim(
        f"attn_clustering/{NAME}-{name}", said, metric, values, verdict, analyses(NAME),
        config=f"{RESULTS}/{NAME}/experiment.json", seeds=(matrix(NAME).experiment.first_seed,), **more,
    )  # fmt: skip


def _band_claims() -> list[Claim]:
    from attn_clustering.analysis.original import BANDS

    bands, found = _bands(), []
    for key, values in bands.items():
        band, out = BANDS[key], sum(not inside for _, inside in values)
        word, accepted = "NOT met" if out else "met", f"{band.low:g} to {band.high:g}"
        which = " (of each the block furthest out)" if key == "probe deep rope" else ""
        said = f"{', '.join(f'{x:.4f}' for x, _ in values)}; accepted {accepted}: {word}"
        sentence = f"{band.text} in the four conditions{which}: {said}{f' in {out} of {len(values)}' if out else ''}."
        name = f"band-{key.replace('_', '-').replace(' ', '-')}"
        found.append(_claim(name, sentence, band.text, [x for x, _ in values], word, required=accepted))
    each = [inside for values in bands.values() for _, inside in values]
    whole = sum(all(inside for _, inside in values) for values in bands.values())
    sentence = (
        f"{whole} of {len(bands)} acceptance bands are met in all four conditions; of {len(each)} values {sum(each)} "
        "lie inside."
    )
    word = "met" if whole == len(bands) else "NOT met"
    return [*found, _claim("bands", sentence, "values inside", [sum(each)], word, required="all inside")]


def _level_claim() -> Claim:
    level = matrix(NAME).levels
    top, filtered, floor = (level[key]["value"] for key in ("ln_vocab", "unigram_filter", "bayes_floor"))
    losses = _each(_loss)
    closed = ", ".join(f"{round(100 * (filtered - x) / (filtered - floor), 1) + 0.0:.1f}" for x in losses)
    of_all = [100 * (top - x) / (top - floor) for x in (*losses, filtered)]
    return _claim(
        "levels",
        f"with RoPE the four models go {closed}% of the way from the unigram topic filter ({filtered:.3f} nats) to the "
        f"Bayes floor ({floor:.3f}); from ln V ({top:.3f}) it is {min(of_all[:-1]):.0f}% to {max(of_all[:-1]):.0f}%, "
        f"where the filter alone is at {of_all[-1]:.0f}% (the log: about 30% of the gap).",
        "validation loss with RoPE, nats", losses, "measured",
    )  # fmt: skip


def _recovery_claim() -> Claim:
    above = [_each(lambda run: float(run["training"]["val_loss_above_parent"]), recal) for recal in (OWN, SHARED)]
    both = [x for values in above for x in values]
    missed = sum(x > 0.02 for x in both)
    return _claim(
        "recovery",
        f"after DroPE {missed} of {len(both)} models did not recover: they end {min(above[0]):+.3f} to "
        f"{max(above[0]):+.3f} nats from their loss with RoPE on their own order, {min(above[1]):+.3f} to "
        f"{max(above[1]):+.3f} on the shared stream, where +0.02 counts as recovered.",
        "validation loss after DroPE less that with RoPE, nats", both, "NOT met" if missed else "met",
        required="at most 0.02 nats",
    )  # fmt: skip


def _differences(values: Sequence[float]) -> list[float]:
    """topic_ordered less shuffled, MHA and GQA."""
    return [values[1] - values[0], values[3] - values[2]]


def _ordering_loss() -> Claim:
    here = _differences(_each(_loss))
    json, log = (_differences(_published(lambda old: old.val_loss, False, which)) for which in (False, True))
    own, shared = (_differences(_each(_loss, recal)) for recal in (OWN, SHARED))

    def said(pair: Sequence[float]) -> str:
        return f"{pair[0]:+.3f} and {pair[1]:+.3f}"

    return _claim(
        "ordering-loss",
        f"validation loss, topic_ordered less shuffled, MHA and GQA: {said(here)} nats with RoPE, where the first "
        f"run's JSON has {said(json)} and its log {said(log)}; after DroPE {said(own)} on the own order, "
        f"{said(shared)} on the shared stream.",
        "difference of validation losses, nats", [*here, *own, *shared], "measured",
    )  # fmt: skip


def _by_block(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """topic_ordered less shuffled after every block, MHA and GQA, from the probes of the four conditions."""
    return [[a - b for a, b in zip(rows[i + 1][1:], rows[i][1:], strict=True)] for i in (0, 2)]


def _ordering_probe() -> Claim:
    here = [_by_block([_run(*c, recal)["probe"]["accuracy"] for c in CONDITIONS]) for recal in (OWN, SHARED)]
    first = _by_block(_published(lambda old: old.probe, True, False))

    def said(pair: Sequence[Sequence[float]]) -> str:
        return " and ".join(f"{min(x):+.3f} to {max(x):+.3f}" for x in pair)

    return _claim(
        "ordering-probe",
        f"topic probe after DroPE, topic_ordered less shuffled, range over blocks 1 to 8, MHA and GQA: {said(here[0])} "
        f"on the own order, {said(here[1])} on the shared stream, {said(first)} in the first run's JSON.",
        "difference of probe accuracies by block", [x for pair in here for part in pair for x in part], "measured",
    )  # fmt: skip


def _attention_claims() -> list[Claim]:
    first = _run(*CONDITIONS[0])
    chance, uniform = first["legacy_chance"]["within"], first["attention"]["chance_uniform"]
    dropped = _each(_legacy, OWN)
    json, log = (_published(lambda old: old.within, True, which) for which in (False, True))
    causal = {recal: _each(lambda run: run["attention"]["within"], recal) for recal in (None, OWN)}
    lag = _each(lambda run: run["attention"]["excess_lag"])
    return [
        _claim(
            "chance",
            f"after DroPE the first run's non-causal within-topic share is {_range(dropped)} ({_range(json)} in its "
            f"JSON, {_range(log)} in its log), where uniform attention scores {chance:.3f}; the causal share is "
            f"{_range(causal[OWN])}, where uniform attention scores {uniform:.3f}.",
            "non-causal within-topic share after DroPE",
            dropped,
            "measured",
        ),
        _claim(
            "locality",
            f"with RoPE the causal within-topic share is {_range(causal[None])}, above the lag-matched null by "
            f"{_range(lag)}, above uniform attention by {_range([x - uniform for x in causal[None]])}.",
            "within-topic share with RoPE, causal",
            causal[None],
            "measured",
        ),
    ]
