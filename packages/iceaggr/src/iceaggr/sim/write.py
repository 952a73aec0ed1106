"""Folders of simulated events in exactly the layout of the Kaggle data, with the truth beside it.

OUT/train/batch_1.parquet ...     sensor_id, time, charge, auxiliary, event_id
OUT/train_meta.parquet            batch_id, event_id, first and last pulse index, azimuth, zenith
OUT/sensor_geometry.csv
OUT/truth.parquet                 one row per event: energy, type, vertex, ...
OUT/pulse_truth/batch_1.parquet   is_signal, row by row with the pulses
OUT/simulation.json               how it was made; written last, so it marks a complete folder
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.files import make_folder
from lab_shared.report_files import read_object

from iceaggr import __version__
from iceaggr.geometry import Geometry, icecube86, write_geometry_csv
from iceaggr.sim.config import SimConfig
from iceaggr.sim.rng import check_seed
from iceaggr.sim.stream import iter_events

if TYPE_CHECKING:
    import polars as pl

EVENTS_PER_FILE = 200_000
"""As in the Kaggle files."""
_ID_STEP = 16
"""Mean distance of event ids, as in the Kaggle files."""
_PARTS = ".parts"


def simulate_folder(
    out: str | Path,
    n_events: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    geometry: Geometry | None = None,
    config: SimConfig | None = None,
    events_per_file: int = EVENTS_PER_FILE,
    files: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `n_events` simulated events to `out` and return it. A finished folder or file is not made again.

    File b depends only on (seed, b, device type, config, geometry): an interrupted run goes on with the first
    missing file. While one file is simulated the one before is written, so memory is that of two files, about
    2 GB at 200,000 events each. `progress(done, total)` is called per block.

    files: only the files of these numbers, from 1, for one process of several; the folder is finished by a last call
    without. Before several run at a time one call (with `files=[]`) must have made the folder.

    Raises:
        UserError: n_events or events_per_file is not positive, the seed is not 0 to 2^31 - 1, or there are
            more events than a seed has ids for.
        FileExistsError: `out` holds other data, or a simulation with other settings.
    """
    out = Path(out)
    device = torch.device(device)
    geometry, config = geometry or icecube86(), config or SimConfig()
    if n_events < 1 or events_per_file < 1:
        raise UserError(f"n_events {n_events} and events_per_file {events_per_file} must be positive")
    check_seed(seed)
    n_files = -(-n_events // events_per_file)
    if n_files * events_per_file * _ID_STEP >= 1 << 31:
        raise UserError(
            f"{n_events} events: a seed has ids for {(1 << 31) // _ID_STEP}; simulate the rest with another"
        )
    settings = _settings(n_events, events_per_file, seed, device, geometry, config)
    if _complete(out, settings):
        return out
    parts = _prepare(out, settings)

    with ThreadPoolExecutor(1, "write") as writer:
        writing: Future[None] | None = None
        for batch in range(1, n_files + 1) if files is None else files:
            first = (batch - 1) * events_per_file
            size = min(events_per_file, n_events - first)
            if not (parts / f"truth_{batch}.parquet").exists():
                blocks = []
                done = first
                for pulses, truth in iter_events(
                    size, seed=seed, stream=batch, device=device, config=config, geometry=geometry
                ):
                    blocks.append(_to_numpy({**vars(pulses), **vars(truth), "counts_E": pulses.counts_E}))
                    done += pulses.n_events
                    if progress:
                        progress(done, n_events)
                if writing:
                    writing.result()
                writing = writer.submit(_write_file, out, parts, batch, blocks, first * _ID_STEP, seed)
                del blocks
            elif progress:
                progress(first + size, n_events)
        if writing:
            writing.result()
    if files is None:
        _finish(out, parts, n_files, geometry, settings)
    return out


def _settings(
    n_events: int,
    events_per_file: int,
    seed: int,
    device: torch.device,
    geometry: Geometry,
    config: SimConfig,
) -> dict[str, Any]:
    """What fixes the bytes of a folder."""
    return {
        "note": "simulated data: made by iceaggr's simulator, not recorded by IceCube",
        "n_events": n_events,
        "events_per_file": events_per_file,
        "seed": seed,
        "device_type": device.type,
        "geometry_sha256": sha256(geometry.xyz.tobytes()).hexdigest(),
        "config": json.loads(json.dumps(asdict(config))),
    }


def _complete(out: Path, settings: dict[str, Any]) -> bool:
    """True for a finished folder with these settings; raises FileExistsError for one with others."""
    record = read_object(out / "simulation.json")
    if record is None:
        return False
    _same_settings(record, settings, out)
    shutil.rmtree(out / _PARTS, ignore_errors=True)  # where a kill left some of them
    return True


def _prepare(out: Path, settings: dict[str, Any]) -> Path:
    """The folder for parts of an unfinished simulation: new, or of an interrupted run with these settings."""
    parts = out / _PARTS
    record = parts / "settings.json"
    begun = read_object(record)
    if begun is not None:
        _same_settings(begun, settings, out)
    elif out.is_dir() and (others := sorted(path.name for path in out.iterdir() if path.name != _PARTS)):
        raise FileExistsError(f"{out} already holds {others[0]}, which no simulation left there; choose another folder")
    make_folder(parts)
    if begun is None:
        _write_text(record, json.dumps(settings, indent=1))  # first: it says whose the other folders are
    for name in ("train", "pulse_truth"):
        (out / name).mkdir(exist_ok=True)
    return parts


def _same_settings(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    other = [key for key, value in wanted.items() if found.get(key) != value]
    if other:
        names = ", ".join(other)
        raise FileExistsError(f"{out}: a simulation with other settings ({names}); choose another folder")


def _to_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: x.cpu().numpy() for name, x in tensors.items()}


def _write_file(
    out: Path, parts: Path, batch: int, blocks: list[dict[str, np.ndarray]], first_id: int, seed: int
) -> None:
    """Pulses, their truth, and last the part of the event table that marks the file as done."""
    import polars as pl

    def joined(name: str) -> np.ndarray:
        return np.concatenate([block[name] for block in blocks])

    counts = joined("counts_E")
    n = len(counts)
    # Strictly increasing with random gaps: one id in each step. Every seed has its own 2^31 ids, so that a
    # model trained on one simulation can be scored on another.
    event_id = (
        (seed << 31)
        + first_id
        + _ID_STEP * np.arange(n)
        + np.random.default_rng([seed, batch]).integers(0, _ID_STEP, n)
    )
    last = counts.cumsum() - 1
    pulses = pl.DataFrame(
        {
            "sensor_id": joined("sensor_P").astype(np.int16),
            "time": joined("time_P").astype(np.int64),
            "charge": joined("charge_P").astype(np.float64),
            "auxiliary": joined("auxiliary_P"),
            "event_id": np.repeat(event_id, counts),
        }
    )
    _write_parquet(pulses, out / "train" / f"batch_{batch}.parquet")
    del pulses
    _write_parquet(pl.DataFrame({"is_signal": joined("signal_P")}), out / "pulse_truth" / f"batch_{batch}.parquet")
    vertex = joined("vertex_E3")
    events = pl.DataFrame(
        {
            "batch_id": np.full(n, batch, dtype=np.int64),
            "event_id": event_id,
            "first_pulse_index": last + 1 - counts,
            "last_pulse_index": last,
            "azimuth": joined("azimuth_E"),
            "zenith": joined("zenith_E"),
            "energy": joined("energy_E"),
            "type": np.where(joined("is_track_E"), "track", "cascade"),
            "x": vertex[:, 0],
            "y": vertex[:, 1],
            "z": vertex[:, 2],
            "t0": joined("time_E"),
            "muon_energy": joined("muon_energy_E"),
            "muon_length": joined("muon_length_E"),
            "inelasticity": joined("inelasticity_E"),
            **_numbered("burst_place", joined("burst_place_EB")),
            **_numbered("burst_energy", joined("burst_energy_EB")),
            "chance_energy": joined("chance_energy_E"),
            "chance_start": joined("chance_start_E"),
            **_numbered("chance_point", joined("chance_point_E3")),
            **_numbered("chance_direction", joined("chance_direction_E3")),
            "chance_time": joined("chance_time_E"),
            **_numbered("chance_burst_place", joined("chance_burst_place_EB")),
            **_numbered("chance_burst_energy", joined("chance_burst_energy_EB")),
            "visible": joined("visible_E"),
            "n_pulses": counts,
            "n_signal": joined("n_signal_E"),
        }
    )
    _write_parquet(events, parts / f"truth_{batch}.parquet")


def _numbered(name: str, values_EX: np.ndarray) -> dict[str, np.ndarray]:
    """Columns NAME_1, NAME_2, ..."""
    return {f"{name}_{i}": values_EX[:, i - 1] for i in range(1, values_EX.shape[1] + 1)}


def _finish(out: Path, parts: Path, n_files: int, geometry: Geometry, settings: dict[str, Any]) -> None:
    """Join the event tables; the record comes last, then the parts go."""
    import polars as pl

    events = pl.concat([pl.read_parquet(parts / f"truth_{batch}.parquet") for batch in range(1, n_files + 1)])
    indices = ["first_pulse_index", "last_pulse_index"]
    _write_parquet(events.select("batch_id", "event_id", *indices, "azimuth", "zenith"), out / "train_meta.parquet")
    _write_parquet(events.drop(indices), out / "truth.parquet")
    write_geometry_csv(out / "sensor_geometry.csv", geometry)
    versions = {name: version(name) for name in ("torch", "numpy", "polars")} | {"iceaggr": __version__}
    record = settings | {"versions": versions | {"python": platform.python_version()}}
    _write_text(out / "simulation.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(parts)


def _write_parquet(table: pl.DataFrame, path: Path) -> None:
    """Snappy, one row group, atomically."""
    temporary = path.with_suffix(".tmp")
    table.write_parquet(temporary, compression="snappy", row_group_size=max(table.height, 1))
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
