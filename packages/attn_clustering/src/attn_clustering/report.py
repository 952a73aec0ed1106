"""`attn-clustering report DIR`: one HTML page about a matrix, drawn from the files its runs left.

Writes DIR/report.html, and for every figure DIR/figures/NAME.png with the numbers it shows as NAME.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page, Width
from lab_shared.plotting import to_png

from attn_clustering import figures, report_data
from attn_clustering.analysis import compare
from attn_clustering.conclusion import conclude
from attn_clustering.head_picker import HeadMaps, picker
from attn_clustering.report_data import MatrixFiles, read_matrix
from attn_clustering.report_original import beside_the_original

MAX_PICKED = 8
"""Runs in the head picker: each adds up to 200 kB to the page."""


def write(folder: str | Path) -> Path:
    """Write the report of a matrix folder; returns the path of the page.

    Raises UserError when the folder is no matrix or nothing in it has been analysed, StorageError when the report
    cannot be written.
    """
    report = _Report(read_matrix(Path(folder)))
    report.result()
    report.loss()
    report.probes()
    report.heads()
    report.drope()
    report.circuits()
    report.ablation()
    beside_the_original(report.page, report.files, report.data)
    report.set_up()
    return report.page.write(Path(folder) / "report.html")


class _Report:
    """The files and the page as it grows: one method per section, called in reading order."""

    def __init__(self, files: MatrixFiles) -> None:
        self.files = files
        self.data = files.results[0]["run"]["data"]
        self.page = Page(
            f"attn-clustering · {files.experiment.name}",
            f"Does the order of training data leave structure in attention heads? Measured on a {self.data}",
        )
        self.folder = files.folder / "figures"
        make_folder(self.folder)
        # One panel per attention variant: a single one takes half the page.
        self.wide: Width = "full" if len({r["run"]["attention"] for r in files.drawn}) > 1 else "half"
        self.seeds = sorted({r["run"]["seed"] for r in files.results})

    def result(self) -> None:
        files, conclusion = self.files, conclude(self.files)
        found = conclusion.primary
        self.page.section("Result")
        self.page.text(
            "Training on topic-ordered data leaves more topic structure after DroPE: "
            f"**{conclusion.named}** ({conclusion.why}; {self.data}).\n\n"
            "Endpoint: topic probe after DroPE, mean over the middle half of the blocks, as a fraction of the way from "
            "what a token alone tells (0) to what the exact Bayes filter knows (1), in MHA models. Seeds pair weights "
            "and data; p is an exact sign-flip test, intervals are BCa over seeds."
        )
        for sentence in conclusion.sentences():
            self.page.text(sentence)
        if missing := len(files.drawn) - len(files.with_arrays):
            self.page.text(
                f"Arrays of {missing} of {len(files.drawn)} analysed runs are not in this folder: figures of heads, "
                "circuits and topic changes leave these runs out."
            )
        name = found.metric if found else "endpoint"
        rows = report_data.seed_rows(files, name)
        if rows:
            caption = f"{compare.METRICS[name]}; lines join runs of one seed. {self.data}, {len(self.seeds)} seed(s)."
            levels = report_data.ENDPOINT_LEVELS if name == "endpoint" else None
            self._figure("seeds", figures.seed_scatter(rows, name, levels), rows, caption, "full")
        self._comparisons([*([found] if found else []), *compare.table(files.results, files.recal)])

    def _comparisons(self, found: Sequence[compare.Comparison]) -> None:
        header = ["metric", "orderings", "attention", "phase", "n", "difference", "95% interval", "p", "Holm", ""]
        captions = {
            "primary": "Primary contrast",
            "secondary": "Secondary family, corrected by Holm",
            "exploratory": "Exploratory, not corrected",
        }
        for role, text in captions.items():
            cells = [
                [
                    compare.METRICS[c.metric], f"{c.treated} − {c.control}", c.attention, figures.PHASE[c.phase],
                    len(c.seeds), f"{c.difference:+.4f}",
                    "–" if c.low is None else f"{c.low:+.4f} to {c.high:+.4f}", f"{c.p:.4f}",
                    "–" if c.p_holm is None else f"{c.p_holm:.4f}", c.stars,
                ]
                for c in found
                if c.role == role
            ]  # fmt: skip
            if cells:
                caption = (
                    f"{text}, {self.data}. No stars below {compare.MIN_SEEDS} seeds: the test cannot reach .05 there."
                )
                self.page.table(header, cells, caption, align="llllrrrrrl")
        rows = [
            {"role": c.role, "metric": c.metric, "treated": c.treated, "control": c.control, "attention": c.attention,
             "phase": c.phase, "seeds": len(c.seeds), "difference": c.difference, "low": c.low, "high": c.high,
             "p": c.p, "holm": c.p_holm}
            for c in found
        ]  # fmt: skip
        atomic_write(self.folder / "comparisons.csv", report_data.csv_text(rows))

    def loss(self) -> None:
        self.page.section("Loss")
        rows, levels = report_data.loss_rows(self.files), self.files.levels
        lines: dict[str, float] = {}
        if levels is not None:
            names = {"ln_vocab": "ln V", "unigram_filter": "unigram topic filter", "bayes_floor": "Bayes floor"}
            for name, text in names.items():
                value = levels[name]["value"]
                same = next((t for t, v in lines.items() if abs(v - value) < 0.05), None)  # labels would overlap
                if same is not None:
                    lines[f"{same}, {text}"] = lines.pop(same)
                else:
                    lines[text] = value
        caption = f"Validation loss, mean and range over seeds, {self.data}; dotted: reference levels."
        if rows:
            self._figure("loss", figures.loss_curves(rows, lines), rows, caption, self.wide)
        if levels is not None:
            table = [
                [name.replace("_", " "), f"{value['value']:.4f}", f"{value['se']:.4f}"]
                for name, value in levels.items()
                if isinstance(value, dict) and "se" in value
            ]
            self.page.table(["level", "value", "standard error"], table, f"Reference levels, {self.data}.")
        self._against_the_floor()

    def _against_the_floor(self) -> None:
        rows = report_data.floor_rows(self.files)
        if rows:
            cells = [
                [row["run"], f"{row['loss']:.4f}", f"{row['above']:+.4f}", f"{100 * row['closed']:.1f}%"]
                for row in rows
            ]
            caption = f"Validation loss at the end; closed: of the way from unigram filter to floor, {self.data}."
            self.page.table(["run", "loss", "above the floor", "closed"], cells, caption)

    def probes(self) -> None:
        self.page.section("Topic probes")
        rows, drawn = report_data.probe_rows(self.files), self.files.drawn
        token = fmean(r["probe"]["token"] for r in drawn)
        bayes = None if drawn[0]["probe"]["bayes"] is None else fmean(r["probe"]["bayes"] for r in drawn)
        permuted = fmean(x for r in drawn for x in r["probe"]["permuted"])
        self.page.text(
            f"Linear probes on held-out sequences, split by sequence. A token alone {token:.3f}"
            + (f", Bayes filter {bayes:.3f}" if bayes is not None else "")
            + f", labels of other sequences {permuted:.3f} ({self.data})."
        )
        caption = f"Accuracy by place, mean and range over seeds, {self.data}."
        self._figure("probes", figures.probe_curves(rows, token, bayes), rows, caption, self.wide)
        rows = report_data.boundary_rows(self.files)
        if rows:
            caption = f"How fast a new topic is noticed: middle blocks' probes beside the Bayes filter, {self.data}."
            self._figure("boundary", figures.boundary_response(rows), rows, caption, self.wide)

    def heads(self) -> None:
        self.page.section("Attention heads")
        first = self.files.first_seed()
        self.page.text(
            "Attention is causal: the weight above the diagonal is exactly 0 in every run. Self and the previous token "
            "are left out of within-topic shares. The lag-matched null is the head's own mean attention at every "
            "position and lag, so that a head which merely looks nearby scores 0."
        )
        rows = report_data.head_rows(self.files, self.files.with_arrays)
        atomic_write(self.folder / "heads.csv", report_data.csv_text(rows))
        if not first:
            return
        seed = f"seed {first[0]['run']['seed']}"
        picked = [
            HeadMaps(r["run"]["name"], *(self.files.arrays[r["run"]["name"]][key] for key in
                     ("example_pattern", "excess_lag", "example_topics")))
            for r in first[:MAX_PICKED] if "example_pattern" in self.files.arrays[r["run"]["name"]]
        ]  # fmt: skip
        if picked:
            self.page.html(picker(picked, "within-topic excess"))
        shown = [row for row in rows if row["run"] in {r["run"]["name"] for r in first}]
        figure = figures.head_maps(shown, "excess_lag", "within-topic excess")
        self._figure("excess", figure, shown, f"Clustering by head, {seed}, {self.data}.", "full")
        rows = report_data.entropy_rows(self.files, first)
        figure = figures.entropy_by_position(rows)
        self._figure("entropy", figure, rows, f"Entropy of every head (dark: early layers), {self.data}.", "full")
        if all("recurrence" in row for row in shown):
            figure = figures.recurrence_scatter(shown)
            caption = (
                f"Each point a head, {seed}: clustering in running text against the extra attention that a segment "
                f"gets when its topic comes back (A-B-A-C probing sequences), {self.data}."
            )
            self._figure("recurrence", figure, shown, caption, "full")

    def drope(self) -> None:
        self.page.section("DroPE")
        rows = report_data.before_after_rows(self.files)
        if rows:
            caption = f"Before and after the positions are removed ({self.files.recal}), {self.data}."
            self._figure("drope", figures.before_after(rows), rows, caption, "full")
        runs = [s for s in self.files.summaries if "recovered" in s]
        cells = [
            [s["name"], s["steps"], f"{s['val_loss_at_start']:.4f}", f"{s['val_loss']:.4f}",
             f"{s['val_loss_above_parent']:+.4f}", "yes" if s["recovered"] else "not recovered"]
            for s in runs
        ]  # fmt: skip
        if cells:
            header = ["run", "steps", "loss at start", "loss", "against RoPE", "recovered"]
            self.page.table(header, cells, f"Recalibrations, validation loss in nats, {self.data}.")
        moved = [r for r in self.files.drawn if "transfer" in r["probe"]]
        if moved:
            places = range(len(moved[0]["probe"]["transfer"]))
            cells = [[r["run"]["name"], *(f"{x:.3f}" for x in r["probe"]["transfer"])] for r in moved]
            caption = f"Probes of the RoPE model tried on its recalibrated model, accuracy by place, {self.data}."
            self.page.table(["run", *map(str, places)], cells, caption)

    def circuits(self) -> None:
        first = self.files.first_seed()
        if not first:
            return
        self.page.section("QK and OV circuits")
        self.page.text(
            "Folded with the norms' gains; with RoPE on, the rotation is replaced by its mean over lags. Alignment is "
            "the part of a circuit's squared norm inside the directions of the topic probe at its input (write: "
            "output)."
        )
        rows = report_data.spectrum_rows(self.files, first)
        seed = first[0]["run"]["seed"]
        caption = f"Singular values over the largest, seed {seed}, mean over heads, {self.data}."
        self._figure("spectra", figures.spectra(rows), rows, caption, "full")
        keys = (
            "qk_query_topic",
            "qk_key_topic",
            "ov_read_topic",
            "ov_write_topic",
            "qk_effective_rank",
            "ov_effective_rank",
        )
        cells = []
        for r in first:
            arrays = self.files.arrays[r["run"]["name"]]
            cells.append(
                [r["run"]["name"], *(f"{arrays[k].mean():.3f}" for k in keys), f"{arrays['alignment_chance']:.3f}"]
            )
        header = ["run", "query", "key", "OV read", "OV write", "QK rank", "OV rank", "chance"]
        self.page.table(
            header, cells, f"Alignment with topic directions and effective ranks, mean over heads, {self.data}."
        )

    def ablation(self) -> None:
        self.page.section("Ablation")
        cells = []
        for r in self.files.drawn:
            a = r["ablation"]
            for name in ("top", "random"):
                if a[name]:
                    loss, probe = (a[name][k] - a["whole"][k] for k in ("loss", "probe"))
                    which = ", ".join(f"{i}.{h}" for i, h in a["heads"]) if name == "top" else "random, same layers"
                    cells.append([r["run"]["name"], which, f"{loss:+.4f}", f"{probe:+.4f}"])
        caption = f"Heads (layer.head) replaced by their mean output: loss (nats) and last probe's change, {self.data}."
        self.page.table(["run", "heads", "loss", "probe"], cells, caption, align="llrr")

    def set_up(self) -> None:
        self.page.section("Set-up")
        experiment = self.files.experiment
        rows = [
            ("attention", ", ".join(experiment.attentions)), ("orderings", ", ".join(experiment.orderings)),
            ("seeds", ", ".join(map(str, self.seeds))), ("recalibration compared", self.files.recal or "–"),
            *_flat({"model": vars(experiment.model), "optim": vars(experiment.optim)}),
        ]  # fmt: skip
        if experiment.data.language is not None:
            rows += _flat({"language": vars(experiment.data.language)})
        rows += _flat({"analysis": self.files.results[0]["inputs"]["settings"]})
        self.page.table(["setting", "value"], rows, align="ll")

    def _figure(
        self, name: str, figure: Any, rows: Sequence[Mapping[str, Any]], caption: str, width: Width = "half"
    ) -> None:
        atomic_write(self.folder / f"{name}.png", to_png(figure))
        atomic_write(self.folder / f"{name}.csv", report_data.csv_text(rows))
        self.page.figure(figure, caption, alt=caption, width=width)


def _flat(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(f"{name}.{key}", str(value)) for name, values in groups.items() for key, value in values.items()]
