"""`iceaggr plan`: disk, memory and time of a training on N events, from measured speeds and nothing typed in.

The speeds are those of a record of `iceaggr bench --out`, by default the one of this package's H200, or of a finished
run (`--record RUN`), which is how several GPUs are measured: the bench uses one. Host memory is measured here and now,
on a store of a few million empty events.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lab_shared.config import from_json
from lab_shared.errors import UserError
from lab_shared.memory import peak_memory

from iceaggr.config import PRESETS, DataConfig, TrainConfig
from iceaggr.run_files import read_run, series

RECORD = Path(__file__).parents[2] / "results" / "bench" / "iceaggr-cuda.json"
KAGGLE_EVENTS, KAGGLE_BYTES = 131_953_924, 113.5e9
"""The competition's training files and their meta table, as published."""
PULSES_PER_EVENT = 164.4
"""Mean of the same events, as published."""


def plan(
    events: int, *, epochs: float = 4.0, preset: str = "5M", gpus: int | None = None, record: Path | None = None
) -> dict[str, Any]:
    """Disk (bytes), memory (bytes) and time (s) of training `preset` on so many events; a table under "text".

    record: bench JSON of one GPU, or the folder of a run on as many processes as there are to be GPUs. gpus: by default
    those of the run, or one. With a bench record more GPUs get the time of perfect scaling, marked as a bound. An epoch
    takes as long as the slower of the model and the reading of the events, each GPU's process reading its own share.

    Raises:
        UserError: no such preset or record, or the record lacks a speed that is needed.
    """
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    bench = _bench(RECORD if record is None or record.is_dir() else record)
    measured = record is not None and record.is_dir()
    if measured:
        assert record is not None
        rate, preset, said, gpus, device = _run_speed(record, gpus)
    else:
        gpus, device = gpus or 1, bench["environment"]["device"]
        rate = gpus * _row(bench, f"train {preset}")["events_per_s"]
        said = f"train {preset}" + (f", times {gpus}: an upper bound, not measured" if gpus > 1 else "")
    store = _row(bench, "cache")["last"]
    reading = gpus * store["gather_packed_events_per_s"]
    host = host_bytes_per_event()
    seconds = events / min(rate, reading)
    peak = next((r.get("peak_memory_gb") for r in bench["rows"] if r["stage"] == f"train {preset}"), None)
    build = next((r["events_per_s"] for r in bench["rows"] if r["stage"] == "build store"), None)
    result: dict[str, Any] = {
        "events": events,
        "epochs": epochs,
        "preset": preset,
        "gpus": gpus,
        "device": device,
        "speed": {"events_per_s": rate, "source": said, "scaling_measured": measured or gpus == 1},
        "disk": {
            "source_bytes": events * KAGGLE_BYTES / KAGGLE_EVENTS,
            "store_bytes": events * PULSES_PER_EVENT * store["bytes_per_pulse"],
        },
        "memory": {
            "host_bytes_per_process": host * events,
            "host_bytes_per_event": host,
            "gpu_peak_bytes": None if peak is None else peak * 1e9,
        },
        "time": {
            "build_store_s": None if build is None else events / build,
            "epoch_s": seconds,
            "training_s": epochs * seconds,
            "reading_events_per_s": reading,
        },
    }
    return result | {"text": _table(result)}


def host_bytes_per_event() -> float:
    """Memory of one training process that grows with the number of events, measured.

    Peak resident memory of splitting a store and beginning to train on it, at three million events of one pulse less
    that at one million, per event. The pulses themselves stay in the memory-mapped store and are not in it. In a
    process of its own, as this one may already have had a higher peak.
    """
    program = "from iceaggr.plan import _peaks; print(*_peaks(1_000_000, 3_000_000))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    small, large = map(int, child.stdout.split())
    return (large - small) / 2_000_000


def _peaks(*numbers: int) -> list[int]:
    """Peak memory of this process, bytes, after beginning to train on so many events; in ascending order."""
    peaks = []
    for n in numbers:
        _begin_training(n)
        peaks.append(peak_memory())
    return peaks


def _begin_training(n: int) -> None:
    """What train.py does to a store before its first step, on n events of one pulse."""
    from iceaggr.data.batches import TokenBatches
    from iceaggr.data.cache import EventCache
    from iceaggr.data.features import Tables
    from iceaggr.data.prepare import split
    from iceaggr.geometry import icecube86

    arrays: dict[str, np.ndarray] = {
        "word": np.zeros(n, np.uint32),
        "charge": np.zeros(n, np.uint16),
        "escape_index": np.zeros(0, np.int64),
        "escape_time": np.zeros(0, np.int64),
        "escape_charge": np.zeros(0, np.float32),
        "end": np.arange(1, n + 1),
        "event_id": np.arange(n),
        "n_doms": np.ones(n, np.uint16),
        "azimuth": np.zeros(n),
        "zenith": np.zeros(n),
    }
    cache = EventCache(arrays)
    train, _ = split(cache, DataConfig(val_events=20_000))
    tables = Tables.of(icecube86(), "cpu")
    batches = TokenBatches(cache, train, PRESETS["5M"][1].model, tables, token_budget=1 << 18, seed=0)
    _ = batches.steps_per_epoch, cache.direction_E3
    batches.close()


def _bench(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        _ = record["rows"], record["environment"]["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no record of `iceaggr bench --out JSON`: make one and give it as --record"
        ) from error
    return record


def _row(bench: dict[str, Any], stage: str) -> dict[str, Any]:
    for row in bench["rows"]:
        if row["stage"] == stage:
            return dict(row)
    known = ", ".join(row["stage"] for row in bench["rows"])
    raise UserError(f"the record has no stage {stage!r}, but {known}: give --preset or another --record")


class _RunSpeed(NamedTuple):
    events_per_s: float
    """Of all processes: the median of the run's log lines but the first fifth."""
    preset: str
    said: str
    processes: int
    device: str


def _run_speed(folder: Path, gpus: int | None) -> _RunSpeed:
    """What a run says of its speed. Raises UserError where it ran on another number of processes, or too briefly."""
    run = read_run(folder)
    manifest = run.manifest or {}
    processes = manifest.get("processes", 1)
    counted = f"{processes} process{'es' * (processes > 1)}"
    if gpus not in (None, processes):
        raise UserError(f"{folder} ran on {counted}: plan it without --gpus, or give a run on {gpus}")
    _, rates = series(run.metrics, "train", "events_per_s")
    if len(rates) < 5:
        raise UserError(f"{folder} has {len(rates)} log lines with a speed; train for longer, or --log-every less")
    model = from_json(TrainConfig, (folder / "config.json").read_text()).model
    preset = next((name for name, (_, config) in PRESETS.items() if config.model == model), folder.name)
    rate = float(np.median(rates[len(rates) // 5 :]))
    device = manifest.get("device", "unknown device")
    return _RunSpeed(rate, preset, f"run {folder.name} on {counted}", processes, device)


def _table(result: dict[str, Any]) -> str:
    disk, memory, time, speed = (result[name] for name in ("disk", "memory", "time", "speed"))
    unknown = "not in the record; run `iceaggr bench` again"

    def size(n: float | None) -> str:
        return unknown if n is None else f"{n / 1e9:,.1f} GB"

    def span(seconds: float | None) -> str:
        if seconds is None:
            return unknown
        return f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"

    bound = "" if speed["scaling_measured"] else " or more"
    limited = "reading" if time["reading_events_per_s"] < speed["events_per_s"] else "the model"
    rows = [
        ("speed", f"{speed['events_per_s']:,.0f} events/s ({speed['source']}; {result['device']})"),
        ("reading", f"{time['reading_events_per_s']:,.0f} events/s; an epoch is limited by {limited}"),
        ("disk, Kaggle's files", size(disk["source_bytes"])),
        ("disk, event store", size(disk["store_bytes"])),
        ("host memory", f"{size(memory['host_bytes_per_process'])} a process, and page cache for the store"),
        ("GPU memory", size(memory["gpu_peak_bytes"])),
        ("time, event store", span(time["build_store_s"])),
        ("time, one epoch", span(time["epoch_s"]) + bound),
        (f"time, {result['epochs']:g} epochs", span(time["training_s"]) + bound),
    ]
    title = f"{result['preset']} on {result['events']:,} events, {result['gpus']} GPU"
    return "\n".join([title, *(f"  {name:22}{value}" for name, value in rows)])
