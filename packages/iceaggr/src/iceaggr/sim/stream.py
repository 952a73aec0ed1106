"""Any number of simulated events, block after block, and how fast they come."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from lab_shared.memory import peak_memory

from iceaggr.data.pulses import Pulses
from iceaggr.geometry import Geometry
from iceaggr.sim.config import SimConfig
from iceaggr.sim.events import Truth, simulate_block

BLOCK_SIZE = {"cpu": 1024, "cuda": 16384}
"""Proposals per block; part of what fixes the bytes of a device type."""
_CUDA_STREAMS = 3
_ACCEPTANCE = 0.45
"""About this share of proposals triggers; a first guess of how many blocks to start."""


def iter_events(
    n_events: int,
    *,
    seed: int,
    stream: int = 0,
    device: torch.device | str = "cpu",
    config: SimConfig | None = None,
    geometry: Geometry | None = None,
) -> Iterator[tuple[Pulses, Truth]]:
    """Blocks of `n_events` simulated events in all, numbered from 0 in event_id_E; the last is cut to fit.

    The events depend on (seed, stream, device type, config, geometry) and not on the number of threads: on a
    CPU one thread per core (torch.get_num_threads()) simulates whole blocks, on a GPU a few threads with a CUDA
    stream each, so that one block's waits for the host are another's computing. At most that many blocks are held.

    Raises:
        ValueError: n_events is not positive, or there is no block size for the device type.
    """
    if n_events < 1:
        raise ValueError(f"n_events is {n_events}; ask for at least one")
    done = 0
    for pulses, truth in iter_blocks(
        n_events, seed=seed, stream=stream, device=device, config=config, geometry=geometry
    ):
        take = min(pulses.n_events, n_events - done)
        yield _cut(pulses, truth, take, done)
        done += take
        if done == n_events:
            return


def iter_blocks(
    n_events: int = 1 << 62,
    *,
    seed: int,
    stream: int = 0,
    first: int = 0,
    step: int = 1,
    size: int | None = None,
    device: torch.device | str = "cpu",
    config: SimConfig | None = None,
    geometry: Geometry | None = None,
) -> Iterator[tuple[Pulses, Truth]]:
    """Whole blocks number first, first + step, ... until they hold `n_events`; made as `iter_events` says.

    size: proposals per block; default what suits the device type.
    Raises ValueError if there is no block size for the device type.
    """
    device = torch.device(device)
    if device.type not in BLOCK_SIZE:
        raise ValueError(f"device {device} is not supported; use one of {', '.join(BLOCK_SIZE)}")
    proposals = size or BLOCK_SIZE[device.type]

    def simulate(i: int) -> tuple[Pulses, Truth]:
        block = first + step * i
        return simulate_block(
            proposals, seed=seed, stream=stream, block=block, config=config, geometry=geometry, device=device
        )

    if device.type == "cpu":
        return _in_threads(simulate, n_events, proposals, torch.get_num_threads())
    return _in_threads(_on_own_stream(simulate, device), n_events, proposals, _CUDA_STREAMS)


def bench_simulator(device: torch.device | str = "cpu", seconds: float = 10.0) -> dict[str, float | str]:
    """Accepted events and proposals per second of `iter_events` after one block, and the peak memory.

    On a CPU `cpu_seconds_per_event` is process time, which other programs on the machine disturb less.
    """
    device = torch.device(device)
    simulate_block(BLOCK_SIZE[device.type], seed=1, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    events = pulses_seen = blocks = 0
    began, cpu_began = time.perf_counter(), time.process_time()
    for pulses, _ in iter_events(1 << 40, seed=2, device=device):
        events, pulses_seen, blocks = events + pulses.n_events, pulses_seen + pulses.n_pulses, blocks + 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if time.perf_counter() - began >= seconds:
            break
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": wall,
        "events": events,
        "events_per_s": events / wall,
        "proposals_per_s": blocks * BLOCK_SIZE[device.type] / wall,
        "pulses_per_s": pulses_seen / wall,
        "cpu_seconds_per_event": cpu / events,
        "peak_memory_gb": peak_memory(device) / 1e9,
    }


def _count() -> Iterator[int]:
    block = 0
    while True:
        yield block
        block += 1


def _on_own_stream(
    simulate: Callable[[int], tuple[Pulses, Truth]], device: torch.device
) -> Callable[[int], tuple[Pulses, Truth]]:
    """The same on a CUDA stream of the calling thread; the result is finished when it is returned."""
    own = threading.local()
    consumer = torch.cuda.current_stream(device)

    def run(block: int) -> tuple[Pulses, Truth]:
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(own.stream):
            result = simulate(block)
            own.stream.synchronize()
        for part in result:
            for x in vars(part).values():
                x.record_stream(consumer)  # its memory is not for this stream to reuse before the consumer is done
        return result

    return run


def _in_threads(
    simulate: Callable[[int], tuple[Pulses, Truth]], n_events: int, size: int, workers: int
) -> Iterator[tuple[Pulses, Truth]]:
    """Blocks in order from single-threaded workers: whole blocks scale better than split operations."""
    threads = torch.get_num_threads()
    waiting: deque[Future[tuple[Pulses, Truth]]] = deque()
    numbers, done, acceptance = _count(), 0, _ACCEPTANCE
    with ThreadPoolExecutor(workers, "simulate", torch.set_num_threads, (1,)) as pool:
        try:
            while done < n_events:
                wanted = math.ceil((n_events - done) / (acceptance * size))
                while len(waiting) < min(workers, wanted):
                    waiting.append(pool.submit(simulate, next(numbers)))
                pulses, truth = waiting.popleft().result()
                torch.set_num_threads(threads)  # the workers' setting is the default of threads born later
                done += pulses.n_events
                acceptance = max(pulses.n_events / size, 0.01)
                yield pulses, truth
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _cut(pulses: Pulses, truth: Truth, n: int, first_id: int) -> tuple[Pulses, Truth]:
    """The first n events, numbered from first_id."""
    pulses = replace(pulses, event_id_E=pulses.event_id_E + first_id)
    if n == pulses.n_events:
        return pulses, truth
    end = int(pulses.offsets_E1[n])
    cut = {name: x[:end] if name.endswith("_P") else x[:n] for name, x in vars(pulses).items()}
    cut["offsets_E1"] = pulses.offsets_E1[: n + 1]
    return Pulses(**cut), Truth(**{k: x[:end] if k.endswith("_P") else x[:n] for k, x in vars(truth).items()})
