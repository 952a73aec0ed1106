"""The ablation studies of iceaggr: their rows beside line fit and oracle, paired comparisons, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from evidence import iceaggr_oracle
from evidence.drawing import Drawing
from evidence.record import ROOT, Claim, markdown, read, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "packages/iceaggr/results"
SEED_TABLE = "ablate-seed-table"
FIRST_STATED = {
    "v1": 62.0,
    "v2-linear-K16": 57.0,
    "v2-mlp-K16": 57.6,
    "v2-linear-K41": 57.8,
    "v2-none-K41": 57.5,
    "5M": 56.3,
    "5M-less-data": 57.5,
}
"""The original's table, degrees: real events, of which it had trained on those it scored."""
LONGER = f"{RESULTS}/small-h200-seed0"
"""The model of the row v2-linear-K16, trained for longer."""
SEEDS_HOLM = "Holm over seeds"
ASKED_EVENTS, ASKED_EPOCHS, ASKED_HELD_OUT, ASKED_SEEDS = 10_000_000, 10, 200_000, 3


def studies() -> list[str]:
    """Folders of ablation records."""
    return sorted(path.parent.name for path in (ROOT / RESULTS).glob("ablate-*/results.json"))


def rows(study: str) -> str:
    """Line fit, variants and oracle of a study; where it is the original's table, with the original's figures."""
    record = read(path_of(study))
    old = study == SEED_TABLE
    left = _leaving(study)
    oracle = read(iceaggr_oracle.ORACLE)["all"]
    body = [
        [row["name"], "", f"{row['mean_deg']:.2f}", range_text(row, "events"), "", "", "", "", ""]
        for row in record["baselines"]
    ]
    body += [
        [
            row["name"], f"{FIRST_STATED[row['name']]}" if row["name"] in FIRST_STATED else "",
            f"{row['mean_deg']:.2f}", range_text(row, "events"), range_text(row, "seeds"), f"{row['median_deg']:.2f}",
            left.get(row["name"], "trains nothing"), f"{row['parameters']:,}", f"{row['events']:,}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    mean = oracle["mean_deg"]
    body.append(
        [
            f"oracle, {oracle['n']:,} other events",
            "",
            f"{mean['value']:.2f}",
            f"{mean['low']:.2f} to {mean['high']:.2f}",
        ]
        + ["", f"{oracle['median_deg']['value']:.2f}", "", "", ""]
    )
    header = [f"opening angle, degrees ({record['label']})", "as first stated", "mean", "over events", "over seeds"]
    header += ["median", "left the plateau after, thousand events, by seed", "parameters", "training events"]
    shown = [i for i in range(len(header)) if old or i != 1]
    return markdown(_only(header, shown), [_only(line, shown) for line in body], "l" + "r" * (len(shown) - 1))


def comparisons(study: str) -> str:
    """The paired comparisons of a study."""
    record, p_of = read(path_of(study)), corrected(study)
    body = [
        [
            row["question"], f"{row['difference']:+.2f}", range_text(row, "events"), range_text(row, "seeds"),
            f"{row['p']:.4f}", f"{row['p_holm']:.4f}", p_text(p_of[row["treated"], row["control"]]), row["finding"],
        ]
        for row in record["contrasts"]
    ]  # fmt: skip
    header = [f"difference, degrees ({record['label']})", "mean", "over events", "over seeds", "p", "Holm", SEEDS_HOLM]
    return markdown([*header, "error is"], body, "lrrrrrrl")


def corrected(study: str) -> dict[tuple[str, str], float | None]:
    """(treated, control) -> Holm's p of the t-test over seeds, which no verdict of the study needs."""
    from iceaggr.ablation_stats import holm_over_seeds

    record = read(path_of(study))
    pairs = [(row["treated"], row["control"]) for row in record["contrasts"]]
    return dict(zip(pairs, holm_over_seeds(record), strict=True))


def p_text(p: float | None) -> str:
    return "" if p is None else f"{p:.4f}"


def findings() -> str:
    """The original's five findings at this budget."""
    p_of = {f"{a} minus {b} ": p_text(p) for (a, b), p in corrected(SEED_TABLE).items()}
    body = [
        [
            v["claim"],
            f"**{v['status']}**",
            v["measured"],
            "; ".join(p_of[pair] for pair in sorted(p_of, key=v["measured"].find) if pair in v["measured"]),
        ]
        for v in read(path_of(SEED_TABLE))["verdicts"]
    ]
    return markdown(["finding as first stated", "at this budget", "measured", SEEDS_HOLM], body, "lllr")


def claims() -> list[Claim]:
    """Every comparison, and the original's findings."""
    found = [claim for study in studies() for claim in _comparisons(study)]
    if SEED_TABLE in studies():
        found += [*_budget(), *_findings()]
    return found


def path_of(study: str) -> str:
    return f"{RESULTS}/{study}/results.json"


def seed_means(study: str, variant: str) -> list[float]:
    """Mean opening angles of a variant, degrees, by seed."""
    return next(row["seed_means"] for row in read(path_of(study))["rows"] if row["name"] == variant)


def curves_of(study: str) -> str:
    return f"{RESULTS}/{study}/curves.json"


def study_claim(
    study: str, name: str, sentence: str, metric: str, values: list[float], status: str, **more: Any
) -> Claim:
    """A claim of a study."""
    seeds = read(path_of(study))["budget"]["seeds"]
    raw = more.pop("raw", [path_of(study)])
    return Claim(
        f"iceaggr/{study}-{name}", sentence, metric, values, status, raw, config=path_of(study), seeds=seeds, **more
    )


def _comparisons(study: str) -> list[Claim]:
    """The paired comparisons of an ablation study; a verdict needs both intervals and Holm's p."""
    record = read(path_of(study))
    return [
        study_claim(
            study,
            f"{i:02d}",
            f"{row['question']}: {row['difference']:+.2f} degrees ({range_text(row, 'seeds')} over seeds; "
            f"{record['label']}), {row['finding']}.",
            "paired difference of mean opening angles, degrees",
            [row["difference"]],
            row["finding"],
            interval=(row["seeds_low"], row["seeds_high"]),
            test=f"paired sign-flip over events, Holm p = {row['p_holm']:.4f}; Student's t over seeds, uncorrected",
        )
        for i, row in enumerate(record["contrasts"])
    ]


def _budget() -> list[Claim]:
    """What was asked of the table's budget, and how short it is."""
    record, curves = read(path_of(SEED_TABLE)), read(curves_of(SEED_TABLE))
    budget, label = record["budget"], record["label"]
    seen, asked = budget["events"] * budget["epochs"], ASKED_EVENTS * ASKED_EPOCHS
    times = "once" if budget["epochs"] == 1 else f"{budget['epochs']:g} times"
    enough = budget["held_out"] >= ASKED_HELD_OUT and len(budget["seeds"]) >= ASKED_SEEDS
    longer, reached = (read(f"{LONGER}/{name}.json") for name in ("config", "evaluation"))
    reached = reached["predictors"]["model"]["mean_deg"]["value"]
    less, name = next((run, run["variant"]) for run in curves if run["variant"] == "5M-less-data")
    by_name = {row["name"]: row for row in [*record["rows"], *record["baselines"]]}
    return [
        study_claim(
            SEED_TABLE,
            "events",
            f"Each training of the seed's table saw {budget['events']:,} events {times}, the largest equal budget that "
            f"the GPU time allowed, where {ASKED_EVENTS:,} events {ASKED_EPOCHS} times were asked for ({label}).",
            "events times epochs",
            [seen],
            verdict(seen, asked),
            required=f"the seed's table with {ASKED_EVENTS:,} events {ASKED_EPOCHS} times, where the GPU time allows",
        ),
        study_claim(
            SEED_TABLE,
            "held-out",
            f"The seed's table has {len(budget['seeds'])} seeds and {budget['held_out']:,} held-out events ({label}).",
            "held-out events",
            [budget["held_out"]],
            "met" if enough else "NOT met",
            required=f"{ASKED_SEEDS} seeds and at least {ASKED_HELD_OUT:,} held-out events, disjoint by id",
        ),
        study_claim(
            SEED_TABLE,
            "short",
            f"The small v2 ends at {by_name['v2-linear-K16']['mean_deg']:.1f} degrees there, at {reached:.1f} degrees "
            f"after {longer['data']['train_events']:,} events {longer['epochs']:g} times (one seed; {label}).",
            "mean opening angle, degrees",
            [by_name["v2-linear-K16"]["mean_deg"], reached],
            "measured",
            raw=[path_of(SEED_TABLE), f"{LONGER}/evaluation.json"],
        ),
        study_claim(
            SEED_TABLE,
            "less-data",
            f"With a thirteenth of the events the 5M model takes {less['step'][-1]} steps and ends at "
            f"{by_name[name]['mean_deg']:.1f} degrees, where a random direction has "
            f"{by_name['random direction']['mean_deg']:.1f} degrees ({label}).",
            "mean opening angle, degrees",
            by_name[name]["seed_means"],
            "measured",
            raw=[path_of(SEED_TABLE), curves_of(SEED_TABLE)],
        ),
    ]


def _findings() -> list[Claim]:
    return [
        study_claim(
            SEED_TABLE,
            f"finding-{i}",
            f"{row['claim'].split('. ', 1)[1]}: {row['status']} at this budget; {row['measured']}.",
            "paired differences of mean opening angles, degrees",
            [],
            row["status"],
            test="intervals over events and over seeds against 0 and a margin of sameness",
        )
        for i, row in enumerate(read(path_of(SEED_TABLE))["verdicts"], 1)
    ]


def _leaving(study: str) -> dict[str, str]:
    """Variant -> when its seeds left the plateau."""
    from iceaggr.ablation_curves import by_variant, leaving_text

    return {name: leaving_text(runs) for name, runs in by_variant(read(curves_of(study))).items()}


def range_text(row: Mapping[str, Any], over: str) -> str:
    low, high = row[f"{over}_low"], row[f"{over}_high"]
    return "" if low is None else f"{low:.2f} to {high:.2f}"


def _only(cells: list[str], shown: list[int]) -> list[str]:
    return [cells[i] for i in shown]


def _forest(study: str) -> Figure:
    from iceaggr.ablation_report import forest

    return forest(read(path_of(study)))


def _angles(study: str) -> Figure:
    from iceaggr.ablation_curves import curves_figure

    return curves_figure(read(curves_of(study)), read(path_of(study))["label"])


TABLES: dict[str, Callable[[], str]] = {
    **{f"iceaggr.{study}": lambda study=study: rows(study) for study in studies()},  # type: ignore[misc]
    **{f"iceaggr.{study}-comparisons": lambda study=study: comparisons(study) for study in studies()},  # type: ignore[misc]
    **({"iceaggr.ablate-seed-table-findings": findings} if SEED_TABLE in studies() else {}),
}
DRAWINGS = [
    drawing
    for study in studies()
    for drawing in (
        Drawing(f"{RESULTS}/{study}/errors.png", [path_of(study)], lambda study=study: _forest(study)),  # type: ignore[misc]
        Drawing(
            f"{RESULTS}/{study}/curves.png",
            [curves_of(study), path_of(study)],
            lambda study=study: _angles(study),  # type: ignore[misc]
        ),
    )
]
