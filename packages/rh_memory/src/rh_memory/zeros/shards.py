"""Zeros computed by several processes or machines, chunk by chunk; the same bytes as from one."""

from __future__ import annotations

import io
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.arrays import load_array
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.sweep import Job, run_jobs

from rh_memory.zeros.generate import ALGORITHM, Chunk, checked, chunk_borders, compute_chunk, main


def generate_sharded(
    count: int,
    out: Path,
    device: str | None = None,
    *,
    shards: int,
    zeros_per_chunk: int | None = None,
    workers: int | None = None,
    gpus_per_job: float = 1.0,
    **engine: Any,
) -> dict[str, Any]:
    """Deal the chunks of the first `count` zeros out to `shards` jobs, then join them in `out`; returns the manifest.

    Chunks wait in the folder .NAME.shards beside `out`, 16 bytes a zero; one that is there is not computed again, in
    this call or by another engine in a later one. workers: on a CPU by default as many as there are shards and cores.
    engine: `engine` and `address` of lab_shared.sweep.run_jobs. Raises UserError for more shards than chunks, and what
    `generate.main` raises.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = checked(out, count).resolve()
    chunks = [list(pair) for pair in pairwise(chunk_borders(count, device, zeros_per_chunk))]
    if shards > len(chunks):
        raise UserError(f"shards={shards}: {count:,} zeros are computed in {len(chunks)} chunks; lower --shards")
    if torch.device(device).type == "cpu":
        workers, gpus_per_job = workers or min(shards, os.cpu_count() or 1), 0
    folder = out.with_name(f".{out.name}.shards")
    ready = folder / "chunks"
    make_folder(ready)
    jobs = [
        Job(
            f"shard-{k + 1}-of-{shards}",
            compute_chunks,
            {"ready": str(ready), "chunks": chunks[k::shards], "device": device, "algorithm": ALGORITHM},
        )
        for k in range(shards)
    ]
    run_jobs(jobs, folder, workers=workers, gpus_per_job=gpus_per_job, **engine)
    # Not from where another call stood, whose chunks may be others: joining takes no time.
    manifest = main(count, out, device, False, zeros_per_chunk, chunk_of=lambda *at: read_chunk(ready, *at))
    shutil.rmtree(folder)
    return manifest


def compute_chunks(out: Path, ready: str, chunks: list[list[int]], device: str, algorithm: str) -> dict[str, Any]:
    """A job: compute these chunks [lower, upper) into the folder `ready`, whatever `out`, the job's own, is.

    algorithm: of the numbers, so that a job of another version is not taken for this one.
    """
    for lower, upper in chunks:
        array, record = _files(Path(ready), lower, upper)
        if record.exists():
            continue
        chunk = compute_chunk(lower, upper, device)
        buffer = io.BytesIO()
        np.save(buffer, torch.stack([chunk.centre, chunk.offset]).cpu().numpy())
        atomic_write(array, buffer.getvalue())
        atomic_write(record, json.dumps({"before": chunk.before, "statistics": chunk.statistics}))  # last: it is done
    return {"chunks": len(chunks)}


def read_chunk(ready: Path, lower: int, upper: int) -> Chunk:
    """A chunk that a job has left in the folder `ready`. Raises ArrayFileError for a damaged one."""
    array, record = _files(ready, lower, upper)
    centre, offset = torch.from_numpy(load_array(array))
    found = json.loads(record.read_text())
    return Chunk(found["before"], centre, offset, found["statistics"])


def _files(ready: Path, lower: int, upper: int) -> tuple[Path, Path]:
    return ready / f"{lower}-{upper}.npy", ready / f"{lower}-{upper}.json"
