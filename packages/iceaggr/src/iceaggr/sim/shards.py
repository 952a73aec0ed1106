"""A simulated folder made by several processes or machines; the same bytes as made by one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lab_shared.errors import UserError
from lab_shared.runs import pick_device
from lab_shared.sweep import Job, run_jobs

from iceaggr.geometry import icecube86, read_geometry_csv
from iceaggr.sim.write import EVENTS_PER_FILE, simulate_folder


def simulate_sharded(
    out: Path,
    n_events: int,
    *,
    shards: int,
    seed: int,
    device: str | None = None,
    geometry: Path | None = None,
    events_per_file: int = EVENTS_PER_FILE,
    workers: int | None = None,
    gpus_per_job: float = 1.0,
    **engine: Any,
) -> None:
    """Deal the folder's files out to `shards` jobs, then join their event tables.

    Files that are there are not made again, in this call or by another engine in a later one. workers: on a CPU by
    default as many as there are shards and cores. engine: `engine` and `address` of lab_shared.sweep.run_jobs.
    Raises UserError for more shards than files or a device that is not there, and what `simulate_folder` raises.
    """
    if engine.get("engine") != "ray" or (device or "cpu").partition(":")[0] != "cuda":  # a cluster has its own GPUs
        device = str(pick_device(device))
    n_files = -(-n_events // events_per_file)
    if shards > n_files:
        raise UserError(
            f"shards={shards}: {n_events:,} events make {n_files} files of {events_per_file:,}, and a file is not "
            "divided: lower --shards or --events-per-file"
        )
    if str(device).startswith("cpu"):
        workers, gpus_per_job = workers or min(shards, os.cpu_count() or 1), 0
    fixed: dict[str, Any] = {
        "folder": str(out.resolve()),
        "n_events": n_events,
        "seed": seed,
        "device": device,
        "geometry": None if geometry is None else str(geometry.resolve()),
        "events_per_file": events_per_file,
    }
    simulate_files(out, [], **fixed)
    if not (out / "simulation.json").exists():
        jobs = [
            Job(f"shard-{k}-of-{shards}", simulate_files, {**fixed, "files": list(range(k, n_files + 1, shards))})
            for k in range(1, shards + 1)
        ]
        run_jobs(jobs, out / ".parts" / "jobs", workers=workers, gpus_per_job=gpus_per_job, **engine)
        simulate_files(out, None, **fixed)


def simulate_files(
    out: Path,
    files: list[int] | None,
    *,
    folder: str,
    n_events: int,
    seed: int,
    device: str,
    geometry: str | None,
    events_per_file: int,
) -> dict[str, Any]:
    """A job: make these files of `folder`, whatever `out`, the job's own, is; None joins all of them."""
    array = icecube86() if geometry is None else read_geometry_csv(Path(geometry))
    simulate_folder(
        folder, n_events, seed=seed, device=device, geometry=array, events_per_file=events_per_file, files=files
    )
    return {"files": files}
