"""What the report draws, as rows: read from the files that runs and their analyses left, and from nothing else."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import load_arrays
from lab_shared.config import read_config
from lab_shared.errors import UserError
from lab_shared.run import read_metrics

from attn_clustering.analysis.compare import by_seed, complete, metric, read_results
from attn_clustering.analysis.probes import DISTANCE_EDGES
from attn_clustering.data.levels import FLOORS, kept_levels
from attn_clustering.experiments import Experiment
from attn_clustering.runs import read_summary

Row = dict[str, Any]


@dataclass(frozen=True)
class MatrixFiles:
    """A matrix folder."""

    folder: Path
    experiment: Experiment
    results: list[dict[str, Any]]
    """Of all analysed runs."""
    arrays: dict[str, dict[str, np.ndarray]]
    """Of the runs that are drawn, by name; a run whose arrays were not kept is not in it."""
    summaries: list[dict[str, Any]]
    """Of all finished runs, analysed or not."""
    levels: dict[str, Any] | None
    """Reference levels of the first seed's language, as `attn-clustering levels` prints them, and under FLOORS the
    Bayes floor of every seed's; None for text."""

    @property
    def recal(self) -> str | None:
        """Name of the DroPE recalibration that comparisons are about: the experiment's first."""
        return self.experiment.recals[0].name if self.experiment.recals else None

    @property
    def drawn(self) -> list[dict[str, Any]]:
        """Analysed runs but those of further recalibrations, in the order of phases."""
        order = ["rope", "drope", "extra", "nope"]
        some = [r for r in self.results if r["run"]["recal"] in (None, self.recal)]
        return sorted(some, key=lambda r: (r["run"]["attention"] != "mha", order.index(r["run"]["phase"])))

    @property
    def with_arrays(self) -> list[dict[str, Any]]:
        """The drawn runs whose arrays are there: what figures of heads, circuits and topic changes can show."""
        return [r for r in self.drawn if r["run"]["name"] in self.arrays]

    def first_seed(self) -> list[dict[str, Any]]:
        """The drawn runs, with and without positions, of the first seed whose arrays are all there; maybe none."""
        runs: dict[int, list[dict[str, Any]]] = {}
        for r in self.drawn:
            if r["run"]["phase"] in ("rope", "drope"):
                runs.setdefault(r["run"]["seed"], []).append(r)
        whole = (runs[seed] for seed in sorted(runs) if all(r["run"]["name"] in self.arrays for r in runs[seed]))
        return next(whole, [])


def read_matrix(folder: Path) -> MatrixFiles:
    """Read a matrix folder; its reference levels are computed if FOLDER/levels.json is not there.

    Raises UserError when it is no matrix or no run of it has been analysed.
    """
    file = folder / "experiment.json"
    if not file.is_file():
        raise UserError(f"{folder} is no matrix (no experiment.json): give the folder of `attn-clustering matrix`")
    experiment, results = read_config(Experiment, file), read_results(folder)
    if not results:
        raise UserError(f"no run in {folder} has been analysed: run `attn-clustering analyze` on one, or the matrix")
    summaries = [
        read_summary(path.parent) | {"folder": path.parent.name} for path in sorted(folder.glob("*/DONE.json"))
    ]
    language, seeds = experiment.data.language, [experiment.first_seed, *(r["run"]["seed"] for r in results)]
    kept = None if language is None else kept_levels(folder / "levels.json", language, seeds)
    files = MatrixFiles(folder, experiment, results, {}, summaries, kept)
    for result in files.drawn:
        name = result["run"]["name"]
        stored = folder / name / "analysis" / "arrays.npz"
        if stored.is_file():
            files.arrays[name] = load_arrays(stored)
    return files


def loss_rows(files: MatrixFiles) -> list[Row]:
    """Validation loss of first phases, from metrics.jsonl."""
    return [
        {**_condition(result), "step": record["step"], "loss": record["loss"]}
        for result in files.results
        if result["run"]["recal"] is None
        for record in read_metrics(files.folder / result["run"]["name"], "val")
        if record["loss"] is not None
    ]


def floor_rows(files: MatrixFiles) -> list[Row]:
    """Final losses of first phases against the reference levels: nats above the Bayes floor, and the part of the way
    from the unigram topic filter (0) to the floor (1) that was closed. Empty without levels."""
    if files.levels is None:
        return []
    unigram, rows = files.levels["unigram_filter"]["value"], []
    for r in files.results:
        if r["run"]["recal"] is None:
            loss, floor = r["training"]["val_loss"], files.levels[FLOORS][str(r["run"]["seed"])]
            closed = (unigram - loss) / (unigram - floor)
            rows.append(
                {"run": r["run"]["name"], **_condition(r), "loss": loss, "above": loss - floor, "closed": closed}
            )
    return rows


def above_floor(files: MatrixFiles) -> float | None:
    """Mean distance of the shuffled RoPE models' loss from the Bayes floor, nats; None without them or levels."""
    wanted = ("rope", "shuffled", files.experiment.attentions[0])
    above = [r["above"] for r in floor_rows(files) if (r["phase"], r["ordering"], r["attention"]) == wanted]
    return float(np.mean(above)) if above else None


def condition_rows(files: MatrixFiles) -> list[Row]:
    """Every drawn condition of the first attention variant once: numbers of its complete seeds, in their order.

    "probe" and "endpoint" as in `compare.METRICS`, "loss" the validation loss, "above" that less the Bayes floor;
    "endpoint" and "above" are empty for data without a Bayes filter.
    """
    rows: dict[tuple[str, str], Row] = {}
    for r in complete(files.drawn):
        run = r["run"]
        if run["attention"] != files.experiment.attentions[0]:
            continue
        names: Row = {"ordering": run["ordering"], "phase": run["phase"], "seeds": 0}
        row = rows.setdefault(
            (run["phase"], run["ordering"]), names | {key: [] for key in ("probe", "endpoint", "loss", "above")}
        )
        row["seeds"] += 1
        loss = r["training"]["val_loss"]
        above = None if files.levels is None else loss - files.levels[FLOORS][str(run["seed"])]
        values = {"probe": metric(r, "probe"), "endpoint": metric(r, "endpoint"), "loss": loss, "above": above}
        for key, value in values.items():
            row[key] += [] if value is None else [value]
    return sorted(rows.values(), key=lambda row: files.experiment.orderings.index(row["ordering"]))


def probe_rows(files: MatrixFiles) -> list[Row]:
    return [
        {**_condition(r), "place": i, "accuracy": a, "low": low, "high": high, "permuted": permuted}
        for r in files.drawn
        for i, (a, low, high, permuted) in enumerate(
            zip(*(r["probe"][key] for key in ("accuracy", "low", "high", "permuted")), strict=True)
        )
    ]


def boundary_rows(files: MatrixFiles) -> list[Row]:
    """Accuracy by distance from the last topic change: mean of the middle blocks, then token and Bayes filter."""
    rows, last = [], {}
    for r in files.with_arrays:
        values = files.arrays[r["run"]["name"]]["boundary_accuracy"]
        places, middle = r["run"]["layers"] + 1, r["probe"]["middle_places"]
        columns = {r["run"]["ordering"]: values[:, middle].mean(1)}
        baselines = {"token": values[:, places]}
        if values.shape[1] > places + 1:
            baselines["Bayes filter"] = values[:, places + 1]
        last[r["run"]["attention"]] = (r, baselines)
        rows += _boundary(r, columns)
    for r, baselines in last.values():
        rows += _boundary(r, baselines)
    return rows


def _boundary(result: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> list[Row]:
    return [
        {**_condition(result), "ordering": name, "distance": distance, "accuracy": float(value)}
        for name, values in columns.items()
        for distance, value in zip(DISTANCE_EDGES, values, strict=True)
        if np.isfinite(value)
    ]


BEFORE_AFTER = {
    "val_loss": "validation loss (nats)",
    "probe": "probe accuracy, middle blocks",
    "excess_lag": "within-topic excess, mean of heads",
}


def before_after_rows(files: MatrixFiles) -> list[Row]:
    key = ("attention", "ordering", "seed")
    runs = {(r["run"]["phase"], *(r["run"][k] for k in key)): r for r in files.drawn}
    rows = []
    for (phase, *who), after in runs.items():
        before = runs.get(("rope", *who))
        if phase == "drope" and before is not None:
            for name, text in BEFORE_AFTER.items():
                values = {"before": metric(before, name), "after": metric(after, name)}
                rows.append({"metric": text, **dict(zip(key, who, strict=True)), **values})
    return sorted(rows, key=lambda row: list(BEFORE_AFTER.values()).index(row["metric"]))


ENDPOINT_LEVELS = {"a token alone": 0.0, "Bayes filter": 1.0}
"""What 0 and 1 of the endpoint are."""


def seed_rows(files: MatrixFiles, name: str) -> list[Row]:
    """One metric by attention variant, phase, seed and ordering."""
    return [
        {"attention": attention, "phase": phase, "ordering": ordering, "seed": seed, "value": value}
        for attention in files.experiment.attentions
        for phase in ("rope", "drope")
        for ordering in files.experiment.orderings
        for seed, value in by_seed(files.results, name, attention, ordering, phase, files.recal).items()
    ]


PER_HEAD = (
    "entropy", "entropy_ratio", "self_mass", "lag1_mass", "far_mass", "within", "excess_uniform", "excess_lag",
    "specialisation", "recurrence", "previous_token", "duplicate_token", "induction", "legacy_within_causal",
    "legacy_within_noncausal", "legacy_entropy_noncausal", "legacy_specialization_noncausal", "qk_effective_rank",
    "ov_effective_rank", "qk_query_topic", "qk_key_topic", "ov_read_topic", "ov_write_topic",
)  # fmt: skip


def head_rows(files: MatrixFiles, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every per-head number."""
    rows = []
    for r in results:
        arrays = files.arrays[r["run"]["name"]]
        for layer, head in np.ndindex(arrays["excess_lag"].shape):
            numbers = {name: float(arrays[name][layer, head]) for name in PER_HEAD if name in arrays}
            rows.append({"run": r["run"]["name"], **_condition(r), "layer": layer, "head": head, **numbers})
    return rows


def entropy_rows(files: MatrixFiles, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for r in results:
        values, t = entropy_curve(files.arrays[r["run"]["name"]])
        for layer, head in np.ndindex(values.shape[:2]):
            rows += [
                {"run": r["run"]["name"], "layer": layer, "head": head, "t": int(n), "entropy": float(value)}
                for n, value in zip(t, values[layer, head], strict=True)
            ]
    return rows


def entropy_curve(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Entropies (L, H, n) at n numbers of visible tokens (n,), equally far apart in the logarithm.

    A collected run has no others.
    """
    values = arrays["entropy_by_position"]
    if "entropy_tokens" in arrays:
        return values, arrays["entropy_tokens"]
    t = np.unique(np.geomspace(1, values.shape[-1], 24).round().astype(int))
    return values[..., t - 1], t


def spectrum_rows(files: MatrixFiles, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for r in results:
        for circuit in ("QK", "OV"):
            values = files.arrays[r["run"]["name"]][f"{circuit.lower()}_singular_values"]
            relative = (values / values[..., :1]).mean(1)
            for layer, index in np.ndindex(relative.shape):
                value = float(relative[layer, index])
                rows.append({"circuit": circuit, **_condition(r), "layer": layer, "index": index + 1, "value": value})
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV with a header; numbers to 6 digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return out.getvalue()


def _condition(result: Mapping[str, Any]) -> Row:
    return {key: result["run"][key] for key in ("attention", "ordering", "phase", "seed")}
