"""`rh-memory report RUN`: one offline page about a run, drawn from the files the run saved and from nothing else.

Needs RUN/config.json. evaluation.json (scores), physics.npz (the zeros and the lines a model has learned) and
diagnostics.json (what a memory does) each add their sections; what is missing is named with the command that makes it.
Every figure is also written as RUN/figures/NAME.png and NAME.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.config import read_config
from lab_shared.errors import UserError
from lab_shared.files import make_folder
from lab_shared.page import Page, Width
from lab_shared.report_files import flat_rows, keep_figure, read_object
from lab_shared.run import read_metrics

from rh_memory import figures, physics
from rh_memory.config import TrainConfig
from rh_memory.physics import Columns
from rh_memory.scores import contexts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EVALUATED = (
    "label", "part", "windows", "nll_last", "nll_all", "nll_last_test", "crps_last", "below_zero_last", "pit_last",
    "coverage_last", "nll_by_context", "on_plateau", "baselines", "nll_last_minus",
)  # fmt: skip
_PHYSICS = ("label", "height", "saturation_length", "number_variance_near_20", "peak_over_background")
_DIAGNOSED = ("run", "label", "memory", "seed", "windows", "base", "rollout")
_REFERENCES = ("iid marginal", "AR(64), height", "prime phases")


def write(run_folder: Path) -> Path:
    """Write RUN/report.html and RUN/figures/; returns the path of the page.

    Raises UserError when the folder is no run of this program or a file of it is damaged, StorageError when writing
    fails.
    """
    run = Path(run_folder)
    config = read_object(run / "config.json")
    if config is None:
        raise UserError(f"{run} has no config.json, so it is no run; give the folder that `rh-memory train` wrote")
    read_config(TrainConfig, run / "config.json")
    evaluation = read_object(run / "evaluation.json", _EVALUATED)
    label = evaluation["label"] if evaluation else "data of unknown origin: not evaluated yet"
    report = _Report(run, Page(f"rh-memory · {run.resolve().name}", f"Spacings of zeta zeros; scored on {label}"))
    report.scores(evaluation)
    report.training(evaluation)
    report.calibration(evaluation)
    report.physics(read_object(run / "physics.json", _PHYSICS))
    report.diagnostics(read_object(run / "diagnostics.json", _DIAGNOSED))
    report.setup(config, read_object(run / "manifest.json"))
    return report.page.write(run / "report.html")


def interval(x: Mapping[str, Any], spec: str = ".4f") -> str:
    """value [low, high]"""
    text = format(x["value"], spec)
    return text if x.get("low") is None else f"{text} [{format(x['low'], spec)}, {format(x['high'], spec)}]"


def estimates(names: Sequence[str], rows: Sequence[Mapping[str, Any]], value: str = "value") -> Columns:
    """Columns name, value, low, high of estimates; an unknown bound is the value."""
    bounds = [[row["value"] if row[end] is None else row[end] for row in rows] for end in ("low", "high")]
    return {
        "name": np.array(names),
        value: np.array([row["value"] for row in rows]),
        "low": np.array(bounds[0]),
        "high": np.array(bounds[1]),
    }


class _Report:
    """The page as it grows: one method per section, called in reading order."""

    def __init__(self, run: Path, page: Page) -> None:
        self.run, self.page = run, page
        make_folder(run / "figures")

    def scores(self, evaluation: dict[str, Any] | None) -> None:
        self.page.section("Scores")
        if evaluation is None:
            self._absent("scores", "evaluation.json", f"rh-memory evaluate {self.run}")
            return
        self.page.text(
            "Negative log-likelihood of the next spacing given 256, in nats per unfolded spacing, lower is better, on "
            f"{evaluation['windows']:,} windows of {evaluation['part']} of **{evaluation['label']}**. An NLL has no "
            "zero point, so differences are shown and no percentages. In brackets: 95 % intervals over blocks of 256 "
            "spacings; differences are paired by target."
        )
        rows = [["model", "256 gaps", interval(evaluation["nll_last"]), "–"]]
        known = evaluation["baselines"]["rows"]
        for row in known:
            minus = interval(evaluation["nll_last_minus"][row["name"]], "+.4f")
            rows.append([row["name"], row["information"], interval(row["nll_last"]), minus])
        self.page.table(["predictor", "knows", "nll_last", "model minus it"], rows, highlight={0}, align="llrr")
        columns = estimates(
            ["model", *(row["name"] for row in known)],
            [evaluation["nll_last"], *(row["nll_last"] for row in known)],
            "nll_last",
        )
        order = np.argsort(-columns["nll_last"])
        columns = {name: x[order] for name, x in columns.items()}
        self._figure("scores", figures.ladder(columns), columns, f"nll_last of every predictor, {evaluation['label']}.")
        if gue := evaluation["baselines"].get("gue"):
            said = "; ".join(f"{name} {interval(x)}" for name, x in gue["nll_last"].items())
            self.page.text(f"For comparison, on {gue['data']}: {said}. Zeros without primes would allow no more.")
        other = [
            (f"nll_all, {contexts_of(evaluation['nll_by_context'])}", interval(evaluation["nll_all"])),
            ("nll_last on the test part, on which nothing was chosen", interval(evaluation["nll_last_test"])),
            ("crps_last", interval(evaluation["crps_last"])),
            ("predicted probability of a negative spacing", f"{evaluation['below_zero_last']['value']:.2e}"),
        ]
        self.page.table(["score", "value"], other)
        if evaluation["on_plateau"]:
            self.page.text("**The model is on the plateau of the i.i.d. marginal: it uses nothing of the context.**")

    def training(self, evaluation: dict[str, Any] | None) -> None:
        if not (self.run / "metrics.jsonl").is_file():
            return
        self.page.section("Training")
        found: dict[str, Columns] = {}
        for split, keys in {"train": ("loss", "nll"), "val": ("nll_last", "nll_all", "nll", "loss")}.items():
            records = read_metrics(self.run, split)
            key = next((key for key in keys if any(record.get(key) is not None for record in records)), None)
            if key is not None:
                pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
                step, value = np.array(pairs, dtype=np.float64).T
                found[f"{split} {key}"] = {"step": step, "value": value}
        if not found:
            self.page.text("Not shown: training curves, because `metrics.jsonl` has no losses yet.")
            return
        columns: Columns = {
            "series": np.repeat(list(found), [len(c["step"]) for c in found.values()]),
            "step": np.concatenate([c["step"] for c in found.values()]),
            "value": np.concatenate([c["value"] for c in found.values()]),
        }
        references = {}
        if evaluation:
            rows = {row["name"]: row["nll_last"]["value"] for row in evaluation["baselines"]["rows"]}
            references = {"i.i.d. marginal": rows["iid marginal"]}
        self._figure(
            "training", figures.curve(found, "nats per spacing", references), columns, "Training and validation."
        )

    def calibration(self, evaluation: dict[str, Any] | None) -> None:
        if evaluation is None:
            return
        self.page.section("Calibration and context")
        p = evaluation["pit_last"]
        columns: Columns = {
            "from": np.array(p["edges"][:-1]),
            "to": np.array(p["edges"][1:]),
            **{name: np.array(p[name], dtype=np.float64) for name in ("density", "low", "high")},
        }
        caption = (
            f"PIT of the last targets: mean {p['mean']['value']:.4f} (0.5 expected), standard deviation {p['std']:.4f} "
            "(0.2887 expected; less means too wide predictions)."
        )
        self._figure("pit", figures.pit(columns), columns, caption)
        rows = evaluation["coverage_last"]
        observed = estimates([], [row["observed"] for row in rows], "observed")
        columns = {"nominal": np.array([row["nominal"] for row in rows]), **observed}
        del columns["name"]
        self._figure(
            "coverage", figures.coverage(columns), columns, "Coverage of central intervals, observed less nominal."
        )
        cells = [[f"{row['nominal']:.0%}", interval(row["observed"])] for row in rows]
        self.page.table(["nominal", "observed"], cells, "Share of targets inside the central interval.")
        columns = {name: np.array(x, dtype=np.float64) for name, x in evaluation["nll_by_context"].items()}
        known = {row["name"]: row["nll_last"]["value"] for row in evaluation["baselines"]["rows"]}
        references = {name: known[name] for name in _REFERENCES if name in known}
        self._figure(
            "context", figures.context(columns, references), columns, "NLL against the number of known spacings."
        )

    def physics(self, result: dict[str, Any] | None) -> None:
        self.page.section("Physics")
        if result is None or not (self.run / "physics.npz").is_file():
            self._absent(
                "statistics of the zeros and the primes the model has learned", "physics.npz", "rh-memory physics"
            )
            return
        from rh_memory.physics_run import text

        self.page.text("\n".join(f"- {line}" for line in text(result).splitlines()))
        drawn = physics.read(self.run / "physics.npz")
        sized = {"xlabel": "spacing s", "ylabel": "density"}
        theory = {"sine process": "sine process (exact)", "surmise": "Wigner surmise"}
        c = drawn["spacings"]
        self._figure(
            "spacings", figures.measured(c, "s", "density", theory, sized), c, "Spacings beside random matrices."
        )
        c = drawn["number_variance"]
        sized = {"xlabel": "interval L (mean gaps)", "ylabel": "number variance"}
        fig = figures.measured(c, "L", "variance", {"GUE": "GUE", "primes": "with primes"}, sized)
        caption = f"Number variance; it saturates from L = {result['saturation_length']:.1f} on, GUE's keeps growing."
        self._figure("number_variance", fig, c, caption)
        c = drawn["pair_correlation_near"]
        fig = figures.measured(
            c, "r", "pairs", {"GUE": "1 − sinc²"}, {"xlabel": "distance r", "ylabel": "pair correlation"}
        )
        self._figure("pair_correlation_near", fig, c, "Pair correlation of unfolded zeros.")
        c = drawn["pair_correlation_far"]
        far = dict[str, Any](xlabel="distance in height", ylabel="pair correlation", xlim=(8, 34), ylim=(0.92, 1.06))
        fig = figures.measured(c, "distance", "pairs", {"primes": "Bogomolny and Keating"}, far)
        self._figure(
            "pair_correlation_far", fig, c, "Far pairs: dips at the heights of the lowest zeros, 14.13, 21.02, 25.01."
        )
        c = drawn["form_factor"]
        self._figure(
            "form_factor", figures.form_factor(c), c, "Spectral form factor: lines at log q, q prime powers.", "full"
        )
        if c := drawn.get("lines", {}):
            caption = "Lines at log q in the spacings, in the model's predicted means, and in what is left."
            self._figure("lines", figures.lines(c), c, caption, "full")
        if c := drawn.get("frequency_use", {}):
            caption = "What each frequency of the explicit-formula attention is worth to the model."
            self._figure("frequency_use", figures.frequency_use(c), c, caption, "full")

    def diagnostics(self, result: dict[str, Any] | None) -> None:
        self.page.section("Diagnostics")
        if result is None:
            self._absent("what the memory does", "diagnostics.json", f"rh-memory diagnose {self.run}")
            return
        from rh_memory.diagnostics.text import summary_text

        self.page.text(f"On {result['windows']:,} fixed windows; costs in nats, positive where the change hurts.")
        for name, title in (("removed", "removing"), ("resampled", "resampling")):
            if rows := result.get(name):
                columns = estimates([str(row["slot"]) for row in rows], rows)
                fig = figures.bars(columns, f"cost of {title} a slot (nats)")
                self._figure(f"slots_{name}", fig, columns, f"Cost of {title} each slot, {result['label']}.")
        if permuted := result.get("permutation"):
            columns = estimates(list(permuted), list(permuted.values()))
            fig = figures.bars(columns, "cost of permuting (nats)")
            self._figure("permutation", fig, columns, "Cost of permuting each part of the slots' identity, and all.")
        self.page.text("\n".join("    " + line for line in summary_text(result).splitlines()))

    def setup(self, config: dict[str, Any], manifest: dict[str, Any] | None) -> None:
        self.page.section("Set-up")
        self.page.table(["configuration", "value"], flat_rows(config), align="ll")
        if manifest is not None:
            self.page.table(["environment", "value"], flat_rows(manifest), align="ll")

    def _figure(self, name: str, figure: Figure, columns: Columns, caption: str, width: Width = "half") -> None:
        keep_figure(self.page, self.run / "figures", name, figure, columns, caption, width)

    def _absent(self, what: str, file: str, command: str) -> None:
        self.page.text(f"Not shown: {what}, because the run has no `{file}` yet (`{command}`).")
