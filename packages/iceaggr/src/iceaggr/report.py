"""`iceaggr report RUN`: one HTML page about a run, drawn from the arrays the run saved and from nothing else.

Needs RUN/config.json. Whatever else is missing (see `iceaggr.run_files`) takes its figures with it, and the
page says so. Writes RUN/report.html, for every figure RUN/figures/NAME.png and the numbers it shows as NAME.csv, and
RUN/resolution.csv.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page, Width
from lab_shared.plotting import to_png
from lab_shared.report_files import csv_text, flat_rows, keep_figure

from iceaggr import calibrate, display, figures, resolution, summaries
from iceaggr.geometry import icecube86
from iceaggr.report_text import command_line, containment_table, group_table, predictor_means, predictor_table, words
from iceaggr.run_files import RunFiles, display_events, read_run, series, series_columns
from iceaggr.summaries import Array, Columns

_TYPES = {0: "cascade", 1: "track"}
_BIN_LEVELS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1)
_MAX_DISPLAYS = 6  # browsers keep only a handful of WebGL canvases alive on one page


def write_report(run_path: Path) -> Path:
    """Write RUN/report.html and RUN/figures/; returns the path of the page.

    Raises UserError when `run_path` is not a run folder or a file of it cannot be read, StorageError when the
    report cannot be written.
    """
    run = read_run(Path(run_path))
    report = _Report(run)
    report.result()
    report.training()
    report.errors()
    report.resolution()
    report.confidence()
    report.calibration()
    report.sky()
    report.events()
    report.inside()
    report.tables()
    report.setup()
    return report.page.write(run.folder / "report.html")


class _Report:
    """The run's files and the page as it grows: one method per section, called in reading order."""

    def __init__(self, run: RunFiles) -> None:
        self.run = run
        self.page = Page(
            f"iceaggr · {run.folder.resolve().name}", f"Neutrino directions from detector pulses, {run.label}"
        )
        self.figures = run.folder / "figures"
        make_folder(self.figures)
        found = run.predictions or {}
        columns = {"model": "error_deg", "line fit": "linefit_error_deg"}
        self.errors_of: dict[str, Array] = {name: found[key] for name, key in columns.items() if key in found}

    def result(self) -> None:
        self.page.section("Result")
        evaluation, label = self.run.evaluation, self.run.label
        if evaluation is None:
            self._absent("the table of predictors", "evaluation.json", "run `iceaggr evaluate`")
            return
        predictors, n = evaluation["predictors"], evaluation["n_events"]
        means = "**, **".join(predictor_means(predictors))
        self.page.text(f"Mean opening angle on {n:,} held-out events of **{label}**: **{means}**.")
        heads, rows = predictor_table(predictors, label)
        level = predictors.get("model", {}).get("level", 0.95)
        caption = f"Angle between predicted and true direction; in brackets its {level:.0%} bootstrap interval."
        self.page.table(heads, rows, caption, highlight={i for i, row in enumerate(rows) if row[0] == "model"})

    def training(self) -> None:
        self.page.section("Training")
        if not self.run.metrics:
            self._absent("training curves", "metrics.jsonl", "it grows while a model trains")
            return
        if self.run.bad_lines:
            self.page.text(f"Left out: {self.run.bad_lines} unreadable line(s) of `metrics.jsonl`.")
        levels = {name: float(error.mean()) for name, error in self.errors_of.items() if name != "model"}
        self._curve("loss", "loss", "Training objective.", "half")
        caption = "Mean opening angle; broken lines: predictors without training."
        self._curve("angle_deg", "mean opening angle (°)", caption, "half", references=levels | {"random": 90.0})
        self._curve("lr", "learning rate", "Learning rate.", "third")
        self._curve("grad_norm", "gradient norm", "Gradient norm before clipping.", "third")
        self._curve("events_per_s", "events / s", "Training throughput.", "third")

    def errors(self) -> None:
        self.page.section("Errors")
        if not self.errors_of:
            self._absent("everything drawn per event", "predictions.npz", "run `iceaggr evaluate`")
            return
        columns = summaries.error_distribution(self.errors_of)
        medians = {name: float(np.median(error)) for name, error in self.errors_of.items()}
        said = ", ".join(f"{name} {value:.1f}°" for name, value in medians.items())
        caption = f"Opening angle per event, {self.run.label}. Bold ticks on the axis are medians: {said}."
        self._figure("error_density", figures.error_density(columns, medians), columns, caption)
        caption = "Fraction of events reconstructed better than an angle. Dotted: an isotropic guess."
        self._figure("error_cumulative", figures.cumulative(columns), columns, caption)
        if "line fit" not in self.errors_of:
            self.page.text("Not shown: the line fit, because `predictions.npz` has no `linefit_error_deg`.")

    def resolution(self) -> None:
        events = self.run.predictions
        if events is None:
            return
        self.page.section("Resolution")
        self.page.text("Lines are medians; bands hold the middle 68% of the events (16th to 84th percentile).")
        self._resolution("n_pulses", events["n_pulses"], "pulses in the event", log=True)
        cos_zenith = np.cos(events["zenith"])
        self._resolution("zenith", cos_zenith, "true cos zenith (1: from above)", np.linspace(-1, 1, 13))
        if "energy" in events:
            self._resolution("energy", events["energy"], "neutrino energy (GeV)", log=True)
        if "type" in events:
            self._types(events["type"], events["error_deg"])
        if absent := [f"by {name}" for name in ("energy", "type") if name not in events]:
            self.page.text(f"Not shown: resolution {' and '.join(absent)}, which is not known for these events.")
        self._resolution_by_group(events)

    def confidence(self) -> None:
        if self.run.predictions is None:
            return
        self.page.section("Confidence")
        kappa = self.run.predictions.get("kappa")
        if kappa is None or np.ptp(kappa) == 0:
            why = "`predictions.npz` has no `kappa`" if kappa is None else "`kappa` is the same for every event"
            self.page.text(f"Not shown: error against confidence, because {why}.")
            return
        columns = summaries.sharpness(kappa, self.errors_of)
        tenth = columns["model"][np.searchsorted(columns["fraction"], 0.1)]
        caption = (
            "Mean error of the events with the largest κ (length of the model's output vector) against the "
            f"fraction kept; the most confident tenth has {tenth:.1f}°. All lines average the same events "
            "except the ideal one: those on which the model is in truth best, which no confidence can beat."
        )
        self._figure("sharpness", figures.sharpness(columns), columns, caption)
        self._resolution("kappa", kappa, "confidence κ", log=bool((kappa > 0).all()))

    def calibration(self) -> None:
        """Is kappa worth its word? Fitted on half of the held-out events, shown on the other half."""
        if self.run.predictions is None:
            return
        self.page.section("Calibration")
        try:
            fitted = calibrate.fit_arrays(self.run.predictions)
        except UserError as error:
            self.page.text(f"Not shown: {error}.")
            return
        result = calibrate.describe(fitted, label=self.run.label)
        self.page.text(
            "kappa is divided by one temperature, and regions take the nominal level that really held, by confidence; "
            "both fitted on half of the held-out events and shown on the other half. `iceaggr calibrate` writes the "
            "same into the run folder, for `predict` and `skymap`.\n\n"
            + "\n".join("    " + line for line in calibrate.table(result).splitlines())
        )
        columns = calibrate.curves(fitted)
        caption = f"Events inside the smallest region of each probability, {self.run.label}."
        self._figure("calibration_coverage", figures.coverage(columns["coverage"]), columns["coverage"], caption)
        caption = "Probability integral transform: the probability of all directions likelier than the true one."
        self._figure("calibration_pit", figures.pit_histogram(columns["pit"]), columns["pit"], caption)
        caption = "Pull √(−2 log(1 − u)); a calibrated model follows the two-dimensional Rayleigh law."
        self._figure("calibration_pull", figures.pulls(columns["pull"]), columns["pull"], caption)
        caption = "Mean opening angle against the one that κ promises, ten equally filled bins of κ; 95% intervals."
        self._figure("calibration_promised", figures.promised(columns["promised"]), columns["promised"], caption)

    def sky(self) -> None:
        events = self.run.predictions
        if events is None:
            return
        self.page.section("Sky")
        self.page.text(
            "Residuals by true direction in cells of equal solid angle. Zenith runs from above (top) to "
            "below, azimuth along the equator; cells with fewer than "
            f"{summaries.MIN_EVENTS} events stay empty."
        )
        columns = summaries.sky(events["azimuth"], events["zenith"], events["error_deg"], events["pred_zenith"])
        caption = f"Mean opening angle, {self.run.label}."
        self._figure("sky_error", figures.sky_map(columns, "mean error", "mean opening angle (°)"), columns, caption)
        figure = figures.sky_map(columns, "zenith bias", "mean zenith residual (°)", signed=True)
        caption = "Mean zenith residual, predicted minus true. Red: reconstructed too much from below."
        self._figure("sky_bias", figure, columns, caption)
        columns = summaries.zenith_response(events["zenith"], events["pred_zenith"])
        caption = "Predicted against true cos zenith, each strip normalised; a blind guess has 0.5 everywhere."
        self._figure("zenith_response", figures.zenith_response(columns), columns, caption)
        columns = summaries.zenith_bias(events["zenith"], events["pred_zenith"])
        caption = "Bias of the z component of the model's unit vector, with the standard error of the mean."
        self._figure("zenith_bias", figures.zenith_bias(columns), columns, caption)

    def events(self) -> None:
        self.page.section("Events")
        if self.run.display is None:
            self._absent("event displays", "display.npz", "run `iceaggr evaluate`")
            return
        array_xyz = self.run.display.get("array_xyz")
        live = find_spec("plotly") is not None
        hint = " Drag to turn, scroll to zoom, hover." if live else ""
        self.page.text(f"Held-out events, {self.run.label}. {display.CAPTION}{hint}")
        for event in display_events(self.run.display)[:_MAX_DISPLAYS]:
            still = to_png(display.event_still(event, array_xyz, self.run.label))
            atomic_write(self.figures / f"event_{event.event_id}.png", still)
            caption = f"{event.title.capitalize()}."
            if live:
                figure = display.event_figure(event, array_xyz, title=False)
                self.page.plotly(figure, caption, width="half", still=still)
            else:
                self.page.picture(still, caption, width="half")

    def inside(self) -> None:
        self.page.section("Inside the model")
        if (self.run.folder / "analysis.html").is_file():
            self.page.html('<p>What it uses and where it looks: <a href="analysis.html">analysis.html</a>.</p>')
            return
        self._absent("what it uses and where it looks", "analysis.html", "run `iceaggr analyze`, then `iceaggr report`")

    def tables(self) -> None:
        groups = (self.run.evaluation or {}).get("by")
        if not groups:
            return
        self.page.section("Tables")
        for name, rows in groups.items():
            self.page.table(*group_table(rows), f"Opening angle by {words(name)}, {self.run.label}.")

    def setup(self) -> None:
        self.page.section("Set-up")
        self.page.table(["configuration", "value"], flat_rows(self.run.config), align="ll")
        manifest = self.run.manifest
        if manifest is None:
            self._absent("the environment and the command", "manifest.json", "it is written when a run starts")
            return
        self.page.table(["environment", "value"], flat_rows(manifest), align="ll")
        if manifest.get("argv"):
            self.page.section("Reproduce")
            self.page.text("    " + command_line(manifest["argv"], manifest.get("processes", 1)))

    def _curve(
        self, key: str, ylabel: str, caption: str, width: Width, references: Mapping[str, float] | None = None
    ) -> None:
        found = {split: series(self.run.metrics, split, key) for split in ("train", "val")}
        found = {split: (steps, values) for split, (steps, values) in found.items() if len(steps)}
        if not found:
            self.page.text(f"Not shown: {ylabel}, because no line of `metrics.jsonl` has `{key}`.")
            return
        figure = figures.curve(found, ylabel, width=4.6 if width == "half" else 3.1, references=references)
        self._figure(f"training_{key}", figure, series_columns(found, key), caption, width)

    def _types(self, kind: Array, error_deg: Array) -> None:
        errors_of = {name: error_deg[kind == code] for code, name in _TYPES.items()}
        errors_of = {name: error for name, error in errors_of.items() if len(error) >= summaries.MIN_EVENTS}
        if not errors_of:
            self.page.text(f"Not shown: error by type; no type has {summaries.MIN_EVENTS} events.")
            return
        columns = summaries.error_distribution(errors_of)
        legend = {name: f"{name}, median {np.median(error):.1f}°" for name, error in errors_of.items()}
        caption = f"Fraction of events the model reconstructs better than an angle, {self.run.label}."
        self._figure("error_by_type", figures.cumulative(columns, legend), columns, caption)

    def _resolution_by_group(self, events: Mapping[str, Array]) -> None:
        """Medians with intervals, by quantity and type; every number in RUN/resolution.csv."""
        array_xyz = icecube86().xyz if self.run.display is None else self.run.display.get("array_xyz", icecube86().xyz)
        table = resolution.resolution_table(events, array_xyz)
        if not table:
            return
        atomic_write(self.run.folder / "resolution.csv", csv_text(table))
        self.page.text("Medians of the model by type of event; bars are 95% intervals (order statistics).")
        for quantity, xlabel in resolution.LABELS.items():
            columns = resolution.select(table, quantity)
            if len(columns["x"]):
                figure = figures.resolution_by_group(columns, xlabel, log=quantity in resolution.LOG)
                caption = f"Median opening angle against {xlabel}, {self.run.label}."
                self._figure(f"resolution_by_type_{quantity}", figure, columns, caption)
        columns = resolution.select(table, "contained")
        if len(columns["x"]):
            caption = f"Opening angle (°) by containment of the interaction, 95% intervals, {self.run.label}."
            self.page.table(*containment_table(columns), caption, align="llrrr")

    def _resolution(self, name: str, x: Array, xlabel: str, edges: Array | None = None, *, log: bool = False) -> None:
        edges = summaries.quantile_edges(x, _BIN_LEVELS) if edges is None else edges
        columns = summaries.resolution(x, self.errors_of, edges)
        if len(columns["x"]) == 0:
            self.page.text(f"Not shown: opening angle against {xlabel}; no bin has {summaries.MIN_EVENTS} events.")
            return
        caption = f"Opening angle against {xlabel}, {self.run.label}."
        self._figure(f"resolution_{name}", figures.resolution(columns, xlabel, log=log), columns, caption)

    def _figure(self, name: str, figure: Any, columns: Columns, caption: str, width: Width = "half") -> None:
        keep_figure(self.page, self.figures, name, figure, columns, caption, width)

    def _absent(self, what: str, file: str, remedy: str) -> None:
        self.page.text(f"Not shown: {what}, because the run has no `{file}` ({remedy}).")
