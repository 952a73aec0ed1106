"""COSTS.md: what large runs would cost in GPU-hours, disk and money, computed from the measured speeds in the records.

python tools/costs.py            prints the page
python tools/costs.py --write    writes COSTS.md
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_shared.command import positive_float
from lab_shared.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
PRICE = 4.0
"""US dollars for an hour of one H200: an assumption, not a quotation."""
KAGGLE_EVENTS, KAGGLE_BYTES, PULSES_PER_EVENT = 131_953_924, 113.5e9, 164.4
"""The competition's training files as published: events, bytes with their meta table, mean pulses of an event."""
EPOCHS = 4
"""Passes over all of Kaggle's events in the estimate."""
SEEDS = 100
COMPILED = {"attn_clustering": "attn-clustering-cuda", "gauge_attn": "gauge-attn-models-cuda"}
"""Packages whose records of speed say when a training's first step had been compiled and done, and those records."""


@dataclass(frozen=True)
class Cost:
    """One line of the page. hours: of one GPU. disk: bytes that stay. source: what was measured, and where."""

    work: str
    hours: float
    disk: float | None
    source: str


def record(package: str, name: str) -> dict[str, dict[str, Any]]:
    """The rows of packages/PACKAGE/results/bench/NAME.json by their stage, name or count."""
    found = json.loads((ROOT / "packages" / package / "results" / "bench" / f"{name}.json").read_text())
    rows = found if isinstance(found, list) else found["rows"]
    return {str(row.get("stage") or row.get("name") or row["count"]): row for row in rows}


def neutrinos() -> list[Cost]:
    """All of Kaggle's events: simulated in their number, stored, trained on; and the seeds of the small model."""
    rows = record("iceaggr", "iceaggr-cuda")
    store = KAGGLE_EVENTS * PULSES_PER_EVENT * rows["cache"]["last"]["bytes_per_pulse"]

    def of(stage: str, work: str, events: float, disk: float | None = None) -> Cost:
        rate = rows[stage]["events_per_s"]
        return Cost(work, events / rate / 3600, disk, f"`{stage}` {rate:,.0f} events/s")

    from iceaggr.config import PRESETS

    small = PRESETS["small"][1]
    assert small.data.train_events is not None
    seen = SEEDS * small.epochs * small.data.train_events
    return [
        of("simulate", f"simulate {KAGGLE_EVENTS:,} events", KAGGLE_EVENTS, KAGGLE_BYTES),
        of("train 5M", f"train 5M on them, {EPOCHS} epochs", EPOCHS * KAGGLE_EVENTS, store),
        of("infer 5M", "predict them", KAGGLE_EVENTS),
        of(
            "train small",
            f"{SEEDS} seeds of `small`, {small.epochs:g} epochs of {small.data.train_events:,} simulated events",
            seen,
        ),
    ]


def zeros() -> list[Cost]:
    """Zeros of zeta up to where phases are exact, and a projection beyond."""
    from rh_memory.zeros.theta import MAX_HEIGHT, height_of_count, smooth_count

    rows = record("rh_memory", "zeros-cuda")
    largest = max(rows.values(), key=lambda row: row["count"])
    rate = largest["zeros_per_s"]
    reach = math.floor(smooth_count(MAX_HEIGHT) / 1e6) * 10**6
    billion = 10**9
    # Every value of Z is a sum of sqrt(t / 2 pi) terms; with all the work in it, the speed falls as 1 / sqrt(t).
    slower = math.sqrt(height_of_count(billion) / height_of_count(largest["count"]))
    measured = f"{largest['count']:,} zeros at {rate:,.0f}/s"
    return [
        Cost(f"{reach:,} zeros, as far as phases are exact", reach / rate / 3600, 16 * reach, measured),
        Cost(
            f"{billion:,} zeros (a projection: the code refuses more than {reach:,})",
            billion / rate * slower / 3600,
            16 * billion,
            f"the same, {slower:.1f} times slower at that height",
        ),
    ]


def seeds() -> list[Cost]:
    """The headline experiments of the other packages."""
    from attn_clustering.experiments import EXPERIMENTS
    from attn_clustering.matrix import jobs
    from rh_memory.config import PRESETS

    rows = record("attn_clustering", "attn-clustering-cuda")
    experiment = EXPERIMENTS["faithful-v1"][1]
    per_seed = bytes_per_seed = 0.0
    listed = jobs(experiment, seeds=2)
    second = [job for job in listed if job.kwargs["config"]["seed"] == experiment.first_seed + 1]  # without the sweep
    for job in second:
        config = job.kwargs["config"]
        row = rows[f"train faithful-v1 {config['attention']}"]
        tokens = config["optim"]["steps"] * config["optim"]["batch"] * row["batch"][1]
        per_seed += tokens / row["tokens_per_s"]
        bytes_per_seed += 4 * row["parameters"]
    explicit, preset = record("rh_memory", "rh-memory-cuda")["train explicit"], PRESETS["explicit"][1]
    windows = preset.steps * preset.batch_size
    return [
        Cost(
            f"{SEEDS} seeds of `faithful-v1`, {len(second)} runs each (training alone, not the analysis)",
            SEEDS * per_seed / 3600,
            SEEDS * bytes_per_seed,
            "`train faithful-v1` mha and gqa, "
            + " and ".join(f"{rows[f'train faithful-v1 {a}']['tokens_per_s']:,.0f}" for a in ("mha", "gqa"))
            + " tokens/s",
        ),
        Cost(
            f"{SEEDS} seeds of `explicit`, {preset.steps:,} steps of {preset.batch_size} windows",
            SEEDS * windows / explicit["windows_per_s"] / 3600,
            SEEDS * 4 * explicit["parameters"],
            f"`train explicit` {explicit['windows_per_s']:,.0f} windows/s",
        ),
    ]


def gauge() -> list[Cost]:
    """The seeds of gauge_attn's generated language, where its models' speed on a GPU is on record."""
    file = ROOT / "packages" / "gauge_attn" / "results" / "bench" / "gauge-attn-models-cuda.json"
    if not file.exists():
        return []
    from gauge_attn.config import PRESETS

    row, config = record("gauge_attn", "gauge-attn-models-cuda")["practical-small"], PRESETS["practical-small"][1]
    tokens = config.steps * config.data.batch * config.data.window
    return [
        Cost(
            f"{SEEDS} seeds of `practical-small`, {config.steps:,} steps",
            SEEDS * tokens / row["tokens_per_s"] / 3600,
            SEEDS * 4 * row["parameters"],
            f"`bench --models` {row['tokens_per_s']:,.0f} tokens/s",
        )
    ]


SECTIONS = {
    "iceaggr: neutrino directions": (neutrinos, "packages/iceaggr/results/bench/iceaggr-cuda.json"),
    "rh_memory: zeros of zeta": (zeros, "packages/rh_memory/results/bench/zeros-cuda.json"),
    "attn_clustering and rh_memory: seeds": (
        seeds,
        "packages/attn_clustering/results/bench/attn-clustering-cuda.json and "
        "packages/rh_memory/results/bench/rh-memory-cuda.json",
    ),
    "gauge_attn: seeds": (gauge, "packages/gauge_attn/results/bench/gauge-attn-models-cuda.json"),
}


def page(price: float) -> str:
    """The whole of COSTS.md for a price (US dollars) of a GPU-hour."""
    flag = "" if price == PRICE else f" --price {price:g}"
    lines = [
        "# What large runs cost",
        "",
        f"Made by `python tools/costs.py --write{flag}` from measured speeds; nothing here was run at this size. One "
        f"GPU is one NVIDIA H200 at {price:.2f} US dollars an hour, an assumption (`--price` takes yours). On N GPUs "
        "the hours divide by at most N and the money stays. Disk is what must be kept: pulses in the event store, "
        "zeros as two float64, weights in float32. Events and languages are simulated or generated except "
        "where Kaggle's are named.",
    ]
    for title, (costs, source) in SECTIONS.items():
        if not (found := costs()):
            continue
        lines += ["", f"## {title}", "", f"Measured in {source}.", ""]
        lines += ["| work | GPU-hours | disk | US dollars | from |", "|---|---:|---:|---:|---|"]
        for cost in found:
            disk = "" if cost.disk is None else _bytes(cost.disk)
            lines.append(f"| {cost.work} | {_two(cost.hours)} | {disk} | {_two(cost.hours * price)} | {cost.source} |")
    first = " and ".join(f"{first_steps(package, name)} in {package}" for package, name in COMPILED.items())
    lines += [
        "",
        f"Kaggle's {KAGGLE_EVENTS:,} events take {_bytes(KAGGLE_BYTES)} as published files, which is also what a "
        "simulation of as many is counted at; `iceaggr plan` adds memory and the time of building the store on your "
        "machine. Left out are evaluation, analysis and reports, and compiling: in the records a training's first step "
        f"came after {first}, once for each shape in a process; the records of the other two do not say.",
    ]
    return "\n".join(lines) + "\n"


def first_steps(package: str, name: str) -> str:
    """When the first step of a training was done, over the rows of a record that say so: "5 to 14 s"."""
    seconds = [row["first_step_s"] for row in record(package, name).values() if "first_step_s" in row]
    return f"{min(seconds):.0f} to {max(seconds):.0f} s"


def _two(value: float) -> str:
    """Two significant digits, or whole numbers above."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(n: float) -> str:
    unit, size = next((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if n >= s)
    return f"{_two(n / size)} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--price", type=positive_float, default=PRICE, metavar="USD", help=f"of a GPU-hour; default {PRICE:g}"
    )
    parser.add_argument("--write", action="store_true", help="write COSTS.md instead of printing")
    args = parser.parse_args()
    text = page(args.price)
    if args.write:
        atomic_write(ROOT / "COSTS.md", text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
