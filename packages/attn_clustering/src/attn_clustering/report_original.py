"""The report's section "Beside the original", for the experiments that repeat it: faithful-v1 and sanity."""

from __future__ import annotations

from lab_shared.page import Page

from attn_clustering.analysis import original
from attn_clustering.report_data import MatrixFiles


def beside_the_original(page: Page, files: MatrixFiles, data: str) -> None:
    """Add the section to the page; nothing for other experiments. data: what was measured on, for captions."""
    if files.experiment.name == "sanity":
        page.section("Beside the original")
        _sanity(page, files, data)
    elif files.experiment.name == "faithful-v1":
        page.section("Beside the original")
        _faithful(page, files, data)


def _faithful(page: Page, files: MatrixFiles, data: str) -> None:
    page.text(
        "The original, a single seed, left two records that disagree in all eight rows: the table of its log, and "
        "the committed JSON; even the sign of what ordering does to the loss differs. The JSON is taken as the record. "
        "Its within-topic shares and entropies come from "
        "attention without the causal mask; ours beside them are computed the same wrong way (legacy), and chance "
        "is what uniform attention scores. Its data are another draw of the same language."
    )
    cells, bands = [], []
    for r in files.drawn:
        run, probe = r["run"], r["probe"]
        name = f"{run['attention']}-{run['ordering']}" + ("-drope" if run["phase"] == "drope" else "")
        if run["phase"] not in ("rope", "drope") or name not in original.JSON_RECORD:
            continue
        record, log = original.JSON_RECORD[name], original.LOG_TABLE[name]
        loss = r["training"]["val_loss"]
        within, entropy = (r["legacy"][f"legacy_{key}_noncausal"] for key in ("within", "entropy"))
        cells.append([run["name"], *_triple(loss, record.val_loss, log.val_loss),
                      *_triple(within, record.within, log.within), *_triple(entropy, record.entropy, log.entropy),
                      *_triple(probe["accuracy"][4], record.probe[4], log.probe[0])])  # fmt: skip
        for key, (value, inside) in original.band_values(run["phase"], loss, probe["accuracy"], within).items():
            band = original.BANDS[key]
            met = "inside" if inside else "OUTSIDE"
            bands.append([run["name"], band.text, f"{value:.4f}", f"{band.low:g} to {band.high:g}", met])
    header = ["run"] + [f"{x} {y}" for x in ("loss", "within", "entropy", "probe 4") for y in ("ours", "JSON", "log")]
    chance = files.results[0]["legacy_chance"]
    page.table(
        header, cells, f"Ours ({data}) beside the original's two records; recalibrated as the original was "
        f"({files.recal}). Legacy chance of within: {chance['within']:.4f}; largest possible entropy "
        f"{chance['entropy_bound_causal']:.3f} with the causal mask, {chance['entropy_bound_noncausal']:.3f} without."
    )  # fmt: skip
    page.table(["run", "quantity", "value", "band", ""], bands, f"Acceptance bands, {data}.", align="llrrl")


def _sanity(page: Page, files: MatrixFiles, data: str) -> None:
    counted = {s["parameters"] for s in files.summaries if "parameters" in s}
    page.text(
        f"{original.SANITY_NOTE} Counted here: {', '.join(f'{n:,}' for n in sorted(counted))}. What can be "
        f"compared are levels: stated, and of the exact filter ({data})."
    )
    cells = []
    for name, stated in original.SANITY_LEVELS.items():
        exact = files.levels[name]["value"] if files.levels else float("nan")
        cells.append([name.replace("_", " "), f"{stated:g}", f"{exact:.4f}"])
    page.table(["level", "stated", "here"], cells, f"Sanity levels, {data}.")


def _triple(ours: float, record: float, log: float) -> list[str]:
    return [f"{ours:.4f}", f"{record:g}", f"{log:g}"]
