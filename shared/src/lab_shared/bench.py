"""Timing and the description of the machine, the same for every package's benchmark."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def measure(
    fn: Callable[[], object], *, repeats: int = 10, warmup: int = 3, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Time `fn()` `repeats` times after `warmup` unmeasured calls.

    CUDA: events around each call, so queued work counts and the host's waiting does not, unless the host is
    what the device waits for. CPU: perf_counter. Returns {"median_s", "iqr_s", "repeats"}: seconds per call,
    and the distance between the quartiles. Raises ValueError for repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one timed call is needed")
    for _ in range(warmup):
        fn()
    if torch.device(device).type == "cuda":
        seconds = _cuda_seconds(fn, repeats, torch.device(device))
    else:
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - begin)
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median_s": float(median), "iqr_s": float(high - low), "repeats": repeats}


def _cuda_seconds(fn: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        pairs = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fn()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def environment(device: torch.device | str = "cpu", repository: Path | None = None) -> dict[str, Any]:
    """What a figure depends on: versions, device, threads, commit. `repository` defaults to the working
    folder."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "git": _git_commit(repository or Path.cwd()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _git_commit(folder: Path) -> str | None:
    """The commit's hash, with "+dirty" if files differ from it; None outside a repository."""
    try:
        commit, changes = (
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+dirty" if changes else commit
