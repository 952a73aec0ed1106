"""Neutrino directions: errors on held-out simulated events, speeds, realism of the simulation, ablations."""

from __future__ import annotations

from typing import Any

from evidence import (
    iceaggr_ablations,
    iceaggr_caveats,
    iceaggr_choices,
    iceaggr_oracle,
    iceaggr_small_batches,
    iceaggr_trained,
    iceaggr_v3,
    speeds,
)
from evidence.record import Claim, interval, markdown, observed, read, verdict

RESULTS = "packages/iceaggr/results"
RUNS = {
    "quick-cpu-seed0": "`quick`, two CPU cores",
    "small-h200-seed0": "`small`, one H200",
}
PREDICTORS = {**iceaggr_trained.YARDSTICKS, "model": "**model**"}
LABEL = "simulated data"
_BELOW = "degrees below the best line fit"
GPU_SPEEDS = f"{RESULTS}/bench/iceaggr-cuda.json"
CPU_SPEEDS = {
    "2 cores of a 16-core host": f"{RESULTS}/bench/iceaggr-cpu.json",
    "2 shared cores of a virtual machine": f"{RESULTS}/bench/iceaggr-cpu-vm.json",
}
_STAGES = {
    "simulate": "simulate (accepted events)",
    "group": "group pulses into DOMs",
    "cache": "random events from the store, one process",
}


def evaluation(run: str) -> Any:
    return read(f"{RESULTS}/{run}/evaluation.json")


def reconstruction() -> str:
    """Every predictor of every run, with intervals over events."""
    body = []
    for run, text in RUNS.items():
        result, data = evaluation(run), read(f"{RESULTS}/{run}/config.json")["data"]
        title = f"[{text}](results/{run}), {data['train_events']:,} training and {result['n_events']:,} held-out events"
        for name, predictor in PREDICTORS.items():
            cells = [interval(result["predictors"][name][key], 2) for key in ("mean_deg", "median_deg")]
            if name == "model":
                cells = [f"**{cell}**" for cell in cells]
            body.append([title, predictor, *cells])
            title = ""
    oracle = read(iceaggr_oracle.ORACLE)["all"]
    cells = [interval(oracle[key], 2) for key in ("mean_deg", "median_deg")]
    body.append([f"{oracle['n']:,} other events", "oracle, the largest likelihood", *cells])
    return markdown(["run", "predictor", "mean", "median"], body, "llrr")


def headline() -> str:
    """Mean errors of the two runs side by side."""
    shown = {name: text for name, text in PREDICTORS.items() if name != "linefit_hlc"}
    results = {
        f"{text}, {read(f'{RESULTS}/{run}/config.json')['data']['train_events']:,} events": evaluation(run)[
            "predictors"
        ]
        for run, text in RUNS.items()
    }
    body = [
        [text, *(f"**{cell}**" if name == "model" else cell for cell in cells)]
        for name, text in shown.items()
        for cells in [[interval(found[name]["mean_deg"], 2) for found in results.values()]]
    ]
    oracle = read(iceaggr_oracle.ORACLE)["all"]
    body.append([f"oracle, {oracle['n']:,} other events", *[interval(oracle["mean_deg"], 2)] * len(results)])
    return markdown(["mean opening angle, degrees", *results], body, "lrr")


def realism() -> str:
    """Figures of simulated events beside the published ones."""
    record = read(f"{RESULTS}/realism/inspect.json")
    relative = ("n_pulses", "span", "doms", "charge")
    body = []
    for row in record["comparison"]:
        name, real, here, tolerance = row["quantity"], row["real"], row["here"], row["tolerance"]
        within = f"{tolerance:.0%}" if name.startswith(relative) and tolerance else f"{tolerance}"
        ratio = f"{here / real:.3f}" if real else ""
        asked = "" if tolerance is None else f"within {within}"
        met = "" if row["ok"] is None else "yes" if row["ok"] else "**no**"
        body.append([name, _short(real), _short(here), ratio, asked, met])
    return markdown(["quantity", "real", "simulated", "ratio", "required", "met"], body, "lrrrll")


def _short(x: float) -> str:
    """Whole numbers from 1,000 on, four digits below."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def gpu_speed() -> str:
    return speeds.table({"one H200": GPU_SPEEDS}, _STAGES)


def cpu_speed() -> str:
    return speeds.table(CPU_SPEEDS, _STAGES)


def required() -> str:
    """The claims about whole runs beside what is asked of them."""
    chosen = [c for c in claims() if c.required is not None and "/speed-" not in c.name]
    body = [[c.required or "", c.sentence, "yes" if c.verdict == "met" else "**no**"] for c in chosen]
    return markdown(["required", "measured", "met"], body)


def hierarchical() -> str:
    """Where a training step of T1 and T2 goes, and the memory of the largest events."""
    row = next(row for row in read(GPU_SPEEDS)["rows"] if row["stage"] == "train t1t2")
    split = row["split"]
    body = [
        ["a whole training step", f"{1e3 * split['step_s']:.1f} ms", "", ""],
        ["T1, forward and backward, timed by itself", f"{1e3 * split['t1_s']:.1f} ms", "", ""],
        ["T2, forward and backward, timed by itself", f"{1e3 * split['t2_s']:.1f} ms", "", ""],
        ["their sum", f"{1e3 * (split['t1_s'] + split['t2_s']):.1f} ms", "", ""],
        _limited("share of a step spent waiting for data", split["data_share"], 0.1, "{:.1%}"),
        ["packing efficiency (pulses per computed row)", f"{split['packing_efficiency']:.1%}", "", ""],
    ]
    limits = {"inference": 0.5, "training step": 1.5}
    body += [
        _limited(f"memory, {what}", found["peak_gb"], limits[what.rpartition(", ")[2]], "{:.2f} GB")
        for what, found in row["extreme"].items()
    ]
    return markdown([f"T1 and T2, one H200 ({LABEL})", "measured", "required", ""], body, "lrrl")


def _limited(what: str, measured: float, limit: float, form: str) -> list[str]:
    met = verdict(measured, limit, at_most=True)
    return [what, form.format(measured), f"<= {form.format(limit)}", met if met == "met" else f"**{met}**"]


def claims() -> list[Claim]:
    """Errors of the runs, what is required of them, speeds, realism, and every comparison of the ablations."""
    found = []
    for run, text in RUNS.items():
        raw = [f"{RESULTS}/{run}/evaluation.json"]
        predictors = evaluation(run)["predictors"]
        mean, best = predictors["model"]["mean_deg"], predictors["linefit"]["mean_deg"]
        below = best["value"] - mean["value"]
        shared: dict[str, Any] = {"raw": raw, "config": f"{RESULTS}/{run}/config.json", "seeds": [0]}
        name = f"iceaggr/{run}"
        found.append(
            Claim(
                f"{name}-error",
                f"{text.replace('`', '')}: the mean opening angle is {mean['value']:.1f} degrees on held-out events, "
                f"where the best line fit has {best['value']:.1f} degrees ({LABEL}, one seed).",
                "mean opening angle, degrees",
                [mean["value"]],
                "measured",
                interval=(mean["low"], mean["high"]),
                test="bootstrap over events, 95 %; the spread between seeds is not in it",
                **shared,
            )
        )
        found.append(
            Claim(
                f"{name}-below-the-line-fit",
                f"{text.replace('`', '')}: {below:.1f} {_BELOW} ({LABEL}, one seed).",
                "mean opening angle of the best line fit less the model's, degrees",
                [below],
                verdict(below, 10),
                required="the model at least 10 degrees below the best line fit",
                **shared,
            )
        )
    small = f"{RESULTS}/small-h200-seed0/config.json"
    events = read(small)["data"]["train_events"]
    found.append(
        Claim(
            "iceaggr/small-events",
            f"On one H200 the small model was trained on {events:,} events ({LABEL}).",
            "training events",
            [events],
            verdict(events, 2_000_000),
            [small],
            config=small,
            required="on a GPU the same command trains `small` on at least 2,000,000 events",
        )
    )
    cache = read(CPU_SPEEDS["2 cores of a 16-core host"])
    size = next(row["last"]["bytes_per_pulse"] for row in cache["rows"] if row["stage"] == "cache")
    found.append(
        Claim(
            "iceaggr/store-size",
            f"The event store takes {size:.1f} bytes a pulse with everything ({LABEL}).",
            "bytes per pulse",
            [size],
            verdict(size, 8, at_most=True),
            [CPU_SPEEDS["2 cores of a 16-core host"]],
            required="the event store within 8 bytes a pulse",
        )
    )
    record = read(f"{RESULTS}/realism/inspect.json")
    judged = [row["ok"] for row in record["comparison"] if row["ok"] is not None]
    found.append(
        Claim(
            "iceaggr/realism",
            f"{record['n_events']:,} simulated events with {record['n_pulses']:,} pulses: {sum(judged)} of "
            f"{len(judged)} judged figures lie within their tolerance of the published ones.",
            "judged figures within tolerance",
            [sum(judged)],
            verdict(sum(judged), len(judged)),
            [f"{RESULTS}/realism/inspect.json"],
            required="every judged figure of the simulation within its tolerance",
        )
    )
    found += observed("iceaggr", f"{RESULTS}/observed.json")
    found += speeds.claims("iceaggr", GPU_SPEEDS, "on one H200", LABEL)
    for where, path in CPU_SPEEDS.items():
        found += speeds.claims("iceaggr", path, f"on {where}", LABEL)
    parts = (
        iceaggr_ablations, iceaggr_caveats, iceaggr_choices, iceaggr_v3, iceaggr_small_batches, iceaggr_trained,
        iceaggr_oracle,
    )  # fmt: skip
    return [*found, *(claim for part in parts for claim in part.claims())]


TABLES = {
    "iceaggr.reconstruction": reconstruction,
    "iceaggr.headline": headline,
    "iceaggr.required": required,
    "iceaggr.gpu-speed": gpu_speed,
    "iceaggr.cpu-speed": cpu_speed,
    "iceaggr.hierarchical": hierarchical,
    "iceaggr.realism": realism,
    **iceaggr_oracle.TABLES,
    **iceaggr_ablations.TABLES,
    **iceaggr_choices.TABLES,
    **iceaggr_v3.TABLES,
    **iceaggr_small_batches.TABLES,
    **iceaggr_trained.TABLES,
}
