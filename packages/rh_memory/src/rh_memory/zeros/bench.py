"""How fast zeros are computed: verified, written to disk and checksummed, as `rh-memory zeros` does it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lab_shared.memory import peak_memory

from rh_memory.zeros.generate import main


def bench_zeros(
    device: torch.device | str = "cpu", counts: Sequence[int] = (100_000, 2_001_052), repeats: int = 3
) -> list[dict[str, Any]]:
    """One row per count: {"count", "device", "seconds" (median of `repeats`), "zeros_per_s", "peak_rss_mb",
    "peak_cuda_mb"}.

    A small run before the clock starts loads libraries; peak_rss_mb includes what importing torch takes. Counts above
    10 million run once.
    """
    device = torch.device(device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        main(5_000, Path(folder) / "warm.npy", device, resume=False)
        for count in counts:
            seconds = []
            for _ in range(repeats if count <= 10_000_000 else 1):
                begin = time.perf_counter()
                manifest = main(count, Path(folder) / "zeros.npy", device, resume=False)
                seconds.append(time.perf_counter() - begin)
            median = sorted(seconds)[len(seconds) // 2]
            rows.append(
                {
                    "count": count,
                    "device": manifest["device"],
                    "seconds": median,
                    "zeros_per_s": count / median,
                    "peak_rss_mb": peak_memory() / 1e6,
                    "peak_cuda_mb": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0,
                }
            )
    return rows
