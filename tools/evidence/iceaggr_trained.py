"""What `iceaggr analyze`, `calibrate` and `report` find in two models trained on a GPU, beside the seed's notes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evidence import iceaggr_oracle
from evidence.record import Claim, columns, interval, markdown, read

if TYPE_CHECKING:
    import numpy as np

RESULTS = "packages/iceaggr/results"
RUNS = {
    "v2": f"{RESULTS}/analysis-v2-2M-h200-seed0",
    "v2 with aggregates": f"{RESULTS}/analysis-aggregates-2M-h200-seed0",
}
V2, BEST = RUNS
YARDSTICKS = {
    "random": "random direction",
    "linefit_hlc": "line fit, HLC pulses",
    "linefit": "line fit, HLC within 1.5 us (best)",
}
"""What an evaluation scores beside the model."""
_GROUPS = {
    "all": ("type", None),
    "track": ("type", "track"),
    "cascade": ("type", "cascade"),
    "interaction inside the array": ("contained", 1),
    "outside": ("contained", 0),
}
_FIRST_NOTED: dict[str, tuple[str, str]] = {
    "column norm of t1; largest of the others": ("6.26; a fifth of it", ""),
    "share of the column norms: time / charge / aux / xyz / n": ("40 / 26 / 25 / 6 / 2 %", ""),
    "norm of pulse slot 1; of the others": ("6.42; 1.4", ""),
    "residual scales of the first layer, x and x0": ("1.11, 0.37", "1.70, 0.96"),
    "residual scales of the last layer, x and x0": ("0.52, 0.13", "0.48, 0.26"),
    "strongest rank correlation of a head with t1": ("-0.45", "-0.61"),
    "strongest with z": ("+0.22", "+0.86"),
    "strongest with q1": ("uncorrelated", "uncorrelated"),
    "strongest with the number of pulses": ("", "+0.24"),
    "CLS on itself, first layer; last": ("0.08; 0.006", "0.001 to 0.01; 0.005 to 0.08"),
    "largest weight of CLS on itself": ("", "0.58"),
    "attention by share of DOMs, last layer: 1 / 2-3 / 4-10 / more pulses": ("", "0.64 / 1.2 to 1.8 / 2.4 / 1.2"),
    "largest norm of a DOM": ("", "1,062 (block 3)"),
    "effective rank of the head": ("57 of 128", "201 of 256"),
    "dead units of the head; activation rate": ("", "0 of 1,024; 87.7 %"),
    "norms of the head's rows x / y / z": ("", "1.69 / 1.71 / 1.98"),
    "z-bias": ("+0.54", "+0.12"),
    "P10 / P25 / median / P75 / P90, degrees": ("", "2.0 / 7.8 / 49.8 / 94.7 / 127.9"),
}
"""The original's notes on its small model (v2, K = 16) and its 5M: real events, most of them trained on."""


def notes() -> str:
    """Every question of the original's notes: its figures beside those of both models."""
    ours = {name: _answers(analysis(name)) for name in RUNS}
    body = [[question, *noted, *(ours[name][question] for name in RUNS)] for question, noted in _FIRST_NOTED.items()]
    header = ["", "as first noted, small", "as first noted, 5M", *(f"{name}, {label()}" for name in RUNS)]
    return markdown(header, body, "lrrrr")


def _answers(found: Mapping[str, Any]) -> dict[str, str]:
    """The same questions of one analysis."""
    scalars, tables = found["scalars"], found["tables"]
    norms, special = scalars["feature_norms"], scalars["head_specialisation"]
    by_feature = tables["feature_norms"]["by feature"]
    norm_of = dict(zip(by_feature["feature"], by_feature["norm"], strict=True))
    slots = tables["feature_norms"]["by pulse slot"]["norm"]
    scales = tables["residual_scales"]["by layer"]
    self_weight, head = scalars["cls_self_attention"], scalars["direction_head"]
    last = len(scales["layer"]) - 1
    kinds = ("time", "charge", "aux", "xyz", "n")
    largest = max((name for name in norm_of if name != "t1"), key=norm_of.__getitem__)
    others = norms.get("share of aggregates")
    mass = [scalars["attention_by_multiplicity"][f"last layer, {n} pulses"] for n in ("1", "2-3", "4-10", ">10")]
    errors = scalars["errors"]
    values = (
        f"{norm_of['t1']:.2f}; {norm_of[largest]:.2f} ({largest})",
        " / ".join(f"{100 * norms[f'share of {kind}']:.0f}" for kind in kinds)
        + " %" + ("" if others is None else f", aggregates {100 * others:.0f} %"),
        f"{slots[0]:.2f}; {min(slots[1:]):.2f} to {max(slots[1:]):.2f}",
        *(f"{scales['scale_x'][i]:.2f}, {scales['scale_x0'][i]:.2f}" for i in (0, last)),
        *(special.get(f"strongest rho with {name}", "") for name in ("t1", "z", "q1", "n_pulses")),
        f"{self_weight['layer 0, mean over heads']:.3f}; {self_weight[f'layer {last}, mean over heads']:.3f}",
        self_weight["largest"],
        " / ".join(f"{ratio:.2f}" for ratio in mass),
        scalars["norms"]["largest DOM norm"],
        f"{head['effective rank of fc1']:.0f} of {head['largest possible rank of fc1']:.0f}",
        f"{head['dead units']:.0f} of {head['units']:.0f}; {100 * head['mean activation rate']:.1f} %",
        " / ".join(f"{head[f'norm of row {axis}']:.2f}" for axis in "xyz"),
        scalars["z_bias"]["z bias"],
        " / ".join(f"{errors[f'{name} (°)']:.1f}" for name in ("P10", "P25", "median", "P75", "P90")),
    )  # fmt: skip
    return dict(zip(_FIRST_NOTED, values, strict=True))


def resolution() -> str:
    """Mean and median error of both models by type of event and by containment, with what needs no model.

    Line fits are of each model's held-out events, the oracle is of others.
    """
    tables = {name: columns(f"{folder}/resolution.csv") for name, folder in RUNS.items()}
    body = []
    for text, (quantity, value) in _GROUPS.items():
        cells = []
        for name in RUNS:
            row = _overall(name) if text == "all" else _row(tables[name], quantity, value)
            cells += _cells(row)
        body.append([text, *cells])
    for key, text in YARDSTICKS.items():
        body.append([f"{text}, all", *(cell for name in RUNS for cell in _cells(_overall(name, key)))])
    for group in ("all", "track", "cascade"):
        row = read(iceaggr_oracle.ORACLE)[group]
        cells = _cells({"events": row["n"], "mean": row["mean_deg"], "median": row["median_deg"]})
        body.append([f"oracle, other events, {group}", *cells * len(RUNS)])
    header = [
        f"opening angle, degrees ({label()})",
        *(f"{name}: {x}" for name in RUNS for x in ("events", "mean", "median")),
    ]
    return markdown(header, body, "lrrrrrr")


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['events']:,.0f}", interval(row["mean"], 1), interval(row["median"], 1)]


def _overall(name: str, predictor: str = "model") -> dict[str, Any]:
    found = read(f"{RUNS[name]}/evaluation.json")["predictors"][predictor]
    return {"events": found["n"], "mean": found["mean_deg"], "median": found["median_deg"]}


def _row(table: Mapping[str, np.ndarray], quantity: str, value: Any) -> dict[str, Any]:
    """A bin of resolution.csv: that of a type, by its group, or of "contained" 0 or 1, of all events."""
    of = (table["quantity"] == quantity) & (table["group"] == (value if isinstance(value, str) else "all"))
    if not isinstance(value, str):
        of &= table["low"] == value
    (i,) = of.nonzero()[0]
    found = {
        key: {"value": table[key][i], "low": table[f"{key}_low"][i], "high": table[f"{key}_high"][i]}
        for key in ("mean", "median")
    }
    return {"events": table["events"][i], **found}


def calibration() -> str:
    """Is kappa worth its word: raw, with a temperature, with nominal levels, of both models."""
    body = []
    for name in RUNS:
        record = read(f"{RUNS[name]}/calibration.json")
        for step, text in (("raw", "raw"), ("calibrated", f"/ {record['temperature']:.2f}"), ("levels", "and levels")):
            judged = record[step]
            covered = {row["level"]: row["share"] for row in judged["coverage"]}
            body.append([
                name, text, f"{judged['nll']:.3f}", f"{judged['ece']:.4f}", f"{judged['ks']:.4f}",
                *(f"{100 * covered[level]:.1f}" for level in (0.5, 0.9)), f"{judged['pull_median']:.3f}",
            ])  # fmt: skip
        body.append([
            "", "if calibrated", "", f"{judged['ece_if_calibrated']:.4f}", f"< {judged['ks_critical']:.4f}", "50", "90",
            f"{judged['pull_median_rayleigh']:.3f}",
        ])  # fmt: skip
    header = [
        f"confidence ({label()})",
        "kappa",
        "-log p, nats",
        "ECE",
        "KS",
        "in the 50% region",
        "in the 90% region",
    ]
    return markdown([*header, "median pull"], body, "llrrrrrr")


def analysis(name: str) -> Any:
    """What `iceaggr analyze` left of a model."""
    return read(f"{RUNS[name]}/analysis.json")


def label() -> str:
    """Of the events both were judged on."""
    return str(analysis(V2)["label"])


def importance(name: str) -> dict[str, tuple[float, float, float]]:
    """Group of features -> increase of the mean error when it is shuffled, with its interval, degrees."""
    table = analysis(name)["tables"]["feature_permutation"]["in degrees"]
    rows = zip(table["increase"], table["low"], table["high"], strict=True)
    return dict(zip(table["shuffled"], rows, strict=True))


def claims() -> list[Claim]:
    """What the two analyses show, each with the numbers that the documents' sentences have."""
    return [claim for name in RUNS for claim in (_important(name), _biased(name), _covered(name), _scored(name))]


def _claim(name: str, about: str, sentence: str, metric: str, values: list[float], files: tuple[str, ...]) -> Claim:
    short = "v2" if name == V2 else "aggregates"
    raw = [f"{RUNS[name]}/{file}" for file in files]
    return Claim(f"iceaggr/analysis-{short}-{about}", sentence, metric, values, "measured", raw, seeds=[0])


def _scored(name: str) -> Claim:
    model = _overall(name)
    return _claim(
        name,
        "error",
        f"{name[:1].upper()}{name[1:]} after 2,000,000 events on one H200: {model['mean']['value']:.1f} degrees on "
        f"{model['events']:,} held-out events simulated on a CPU ({label()}, one seed).",
        "mean opening angle, degrees",
        [model["mean"]["value"]],
        ("evaluation.json",),
    )


def _important(name: str) -> Claim:
    found = importance(name)
    top = sorted((group for group in found if group.startswith("all ")), key=lambda group: -found[group][0])
    said = ", ".join(f"{g.removeprefix('all ')} {found[g][0]:+.1f} [{found[g][1]:.1f}, {found[g][2]:.1f}]" for g in top)
    return _claim(
        name,
        "importance",
        f"Shuffled features of {name} raise the mean error by these degrees: {said} ({label()}).",
        "increase of the mean opening angle, degrees",
        [found[group][0] for group in top],
        ("analysis.json",),
    )


def _biased(name: str) -> Claim:
    whole = analysis(name)["scalars"]["z_bias"]["z bias"]
    by_zenith = analysis(name)["tables"]["z_bias"]["z by true zenith"]
    first, last = by_zenith["z bias"][0], by_zenith["z bias"][-1]
    return _claim(
        name,
        "bias",
        f"The z-bias of {name} is {whole}; {first:+.2f} at {by_zenith['bin'][0]} "
        f"and {last:+.2f} at {by_zenith['bin'][-1]} of true zenith ({label()}).",
        "mean of predicted minus true z",
        [first, last],
        ("analysis.json",),
    )


def _covered(name: str) -> Claim:
    record = read(f"{RUNS[name]}/calibration.json")
    inside = {
        step: [100 * row["share"] for row in record[step]["coverage"] if row["level"] in (0.5, 0.9)]
        for step in ("raw", "levels")
    }
    raw, mended = (" / ".join(f"{share:.1f}" for share in inside[step]) for step in ("raw", "levels"))
    return _claim(
        name,
        "coverage",
        f"Regions of 50 and 90 % of {name} hold {raw} % of the events by its own kappa and {mended} % once calibrated "
        f"({label()}).",
        "share of events inside, percent",
        [*inside["raw"], *inside["levels"]],
        ("calibration.json",),
    )


TABLES = {
    "iceaggr.analysis-notes": notes,
    "iceaggr.analysis-resolution": resolution,
    "iceaggr.analysis-calibration": calibration,
}
