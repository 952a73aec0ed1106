"""Speed of the data path on synthetic events with the multiplicities of real ones, for `iceaggr bench`."""

from __future__ import annotations

import time

import numpy as np
import torch

from iceaggr.data.cache import EventCache
from iceaggr.data.grouping import group_doms
from iceaggr.data.pulses import Pulses
from iceaggr.data.schema import N_SENSORS


def synthetic_pulses(n_events: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Pulses:
    """Random pulses with the multiplicities of real events, for benchmarks: mean 164 pulses on about 60 DOMs.

    Pulses per event are the published quantiles of the real data, at evenly spaced probabilities; sensors are
    random.
    """
    rng = np.random.default_rng(seed)
    levels = np.array([0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999])
    quantiles = [15, 24, 30, 36, 40, 48, 63, 89, 144, 219, 1130, 3320, 19553, 70707]
    at_E = (rng.permutation(n_events) + 0.5) / n_events
    # Between two quantiles a power law, as the tail of the real distribution is.
    counts_E = np.exp(np.interp(-np.log1p(-at_E), -np.log1p(-levels), np.log(quantiles))).astype(np.int64)
    offsets_E1 = np.concatenate([[0], counts_E.cumsum()])
    n_pulses = int(offsets_E1[-1])
    event_P = np.repeat(np.arange(n_events), counts_E)
    # DOMs the pulses are drawn from, so that the number hit has the published quantiles (median 49, mean
    # 60.6).
    pool_E = np.interp(counts_E, [15, 63, 89, 144, 219, 1130, 19553, 70707], [40, 115, 130, 150, 158, 244, 872, 2256])
    base_E = rng.integers(0, N_SENSORS, n_events)
    member_P = (rng.random(n_pulses) * pool_E[event_P]).astype(np.int64)
    sensor_P = ((base_E[event_P] + 37 * member_P) % N_SENSORS).astype(np.int32)
    time_P = (rng.random(n_pulses) * 12_000 + 6_000).astype(np.int64)
    time_P = np.sort(event_P * 2**18 + time_P) - event_P * 2**18
    charge_P = (np.clip(np.rint(rng.lognormal(0, 0.6, n_pulses) * 40), 1, 65_000) / 40).astype(np.float32)
    return Pulses(
        event_id_E=torch.arange(n_events),
        offsets_E1=torch.from_numpy(offsets_E1),
        sensor_P=torch.from_numpy(sensor_P),
        time_P=torch.from_numpy(time_P.astype(np.int32)),
        charge_P=torch.from_numpy(charge_P),
        auxiliary_P=torch.from_numpy(rng.random(n_pulses) < 0.64),
        azimuth_E=torch.from_numpy(rng.random(n_events) * 2 * np.pi),
        zenith_E=torch.from_numpy(np.arccos(rng.uniform(-1, 1, n_events))),
    ).to(device)


def bench_grouping(device: torch.device | str, *, n_events: int = 4096, repeats: int = 20) -> dict[str, float | str]:
    """Events and pulses per second of `group_doms` on synthetic events, n_doms known; CPU time as well as
    wall time.
    """
    device = torch.device(device)
    pulses = synthetic_pulses(n_events, device=device)
    n_doms = group_doms(pulses).n_doms
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        group_doms(pulses, n_doms=n_doms)
    sync()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        group_doms(pulses, n_doms=n_doms)
    sync()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "events": n_events,
        "pulses_per_event": pulses.n_pulses / n_events,
        "doms_per_event": n_doms / n_events,
        "events_per_s": repeats * n_events / wall,
        "events_per_cpu_s": repeats * n_events / cpu,
        "pulses_per_s": repeats * pulses.n_pulses / wall,
    }


def bench_cache(cache: EventCache | None = None, *, batch: int = 4096, seconds: float = 2.0) -> dict[str, float]:
    """Random events per second of `gather` and `gather_packed` by one process; synthetic events by
    default.
    """
    cache = cache or EventCache.in_memory(synthetic_pulses(100_000))
    rng = np.random.default_rng(0)
    sync = torch.cuda.synchronize if cache.device.type == "cuda" else lambda: None
    result = {
        "events": cache.n_events,
        "pulses_per_event": cache.n_pulses / cache.n_events,
        "bytes_per_pulse": cache.n_bytes / cache.n_pulses,
    }
    for name, gather in (("gather", cache.gather), ("gather_packed", cache.gather_packed)):
        done, wall, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            gather(rng.integers(0, cache.n_events, batch))
            done += batch
        sync()
        result[f"{name}_events_per_s"] = done / (time.perf_counter() - wall)
        result[f"{name}_events_per_cpu_s"] = done / (time.process_time() - cpu)
    return result
