"""What the benchmark times, and how: forward and backward of KL attention with respect to mu, log sigma and phi.

Run as a program this module compiles and times one dense reference, so that a compiler that takes too long can be
stopped: `dense_row` starts it and kills it when its time is up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lab_shared.attention import Mask, attend
from lab_shared.bench import measure
from torch import Tensor

from gauge_attn.attention import kl_attention
from gauge_attn.compiled import compiled
from gauge_attn.reference import dense_kl_attention
from gauge_attn.so3 import frames

L, HEADS, KAPPA = 2, 4, 0.43
DENSE_DIAGONAL, DENSE_FULL = "dense reference, diagonal approximation", "dense reference, full covariance"
EAGER = ", not compiled"
"""Ends the name of a dense reference that the compiler was too slow for."""
ROUNDS = 5
"""Alternating repeats on a CPU."""

Row = dict[str, Any]
Function = Callable[..., Tensor]


class Case(NamedTuple):
    """One function and the tensors that its gradients are for."""

    name: str
    function: Function
    leaves: tuple[Tensor, ...]

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.function(*self.leaves), self.leaves)


def beliefs(n_batch: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((0.5, (n_batch, HEADS, n, 2 * L + 1)), (0.2, (n_batch, HEADS, n, 2 * L + 1)), (0.5, (n_batch, n, 3)))
    mu, log_sigma, phi = ((s * torch.randn(*shape, generator=generator)).to(device) for s, shape in shapes)
    return mu.requires_grad_(), log_sigma.requires_grad_(), phi.requires_grad_()


def mean_of_features(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    return kl_attention(mu, log_sigma.exp(), frames(phi, L), KAPPA, mean_only=True).mean.sum()


def moments_of_features(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    done = kl_attention(mu, log_sigma.exp(), frames(phi, L), KAPPA)
    assert done.covariance is not None
    return done.mean.sum() + done.covariance.sum()


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Mask.causal(), backend="sdpa").sum()


def dense_diagonal(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    return dense_kl_attention(
        mu, log_sigma.exp(), frames(phi, L), KAPPA, covariance="diag_approx", mean_only=True
    ).mean.sum()


def dense_full(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    return dense_kl_attention(mu, log_sigma.exp(), frames(phi, L), KAPPA, mean_only=True).mean.sum()


DENSE: dict[str, Function] = {DENSE_DIAGONAL: dense_diagonal, DENSE_FULL: dense_full}


def alternating(section: str, n: int, cases: Sequence[Case]) -> list[Row]:
    """Rows of cases that take turns on a CPU, so that whatever else the machine does meets all of them alike.

    "ms": median wall time; "quartiles ms"; "cpu ms": processor time, of all threads; "times features": the median over
    rounds of this case's time over the first one's, with its "lowest" and "highest". Fast cases are called eight times
    a round.
    """
    calls = []
    for case in cases:
        started = time.perf_counter()
        case.step()
        case.step()
        calls.append(8 if time.perf_counter() - started < 0.5 else 1)
    wall, busy = np.empty((ROUNDS, len(cases))), np.empty((ROUNDS, len(cases)))
    for turn in range(ROUNDS):
        for i, case in enumerate(cases):
            began, spent = time.perf_counter(), time.process_time()
            for _ in range(calls[i]):
                case.step()
            wall[turn, i] = 1e3 * (time.perf_counter() - began) / calls[i]
            busy[turn, i] = 1e3 * (time.process_time() - spent) / calls[i]
    rows = []
    for i, case in enumerate(cases):
        low, median, high = np.percentile(wall[:, i], [25, 50, 75]).tolist()
        ratio = wall[:, i] / wall[:, 0]
        row: Row = {
            "section": section,
            "name": case.name,
            "n": n,
            "ms": median,
            "quartiles ms": f"{low:.4g}-{high:.4g}",
        }
        row |= {"cpu ms": float(np.median(busy[:, i])), "times features": float(np.median(ratio))}
        rows.append(row | {"lowest": float(ratio.min()), "highest": float(ratio.max())})
    return rows


def timed(
    section: str,
    name: str,
    function: Function,
    leaves: tuple[Tensor, ...],
    *,
    n: int,
    few: bool = False,
    compile: bool = True,
) -> Row:
    """Median ms of forward and backward; on CUDA also the peak of memory above the leaves and the seconds that the
    first call took, most of them in the compiler, unless it is left out (`compile`). few: five repeats, not twenty."""
    device = leaves[0].device
    row: Row = {"section": section, "name": name, "n": n}
    if device.type != "cuda":
        timing = measure(lambda: torch.autograd.grad(function(*leaves), leaves), repeats=3 if few else 7, warmup=1)
        return row | {"ms": 1e3 * timing["median_s"]}
    function(*leaves)  # makes the constant tables, which a compiled function only reads
    fast = compiled(function) if compile else function

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fast(*leaves), leaves)

    with torch.cuda.device(device):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        row["compile s"] = time.perf_counter() - started
        host = measure(step, repeats=5 if few else 20, device=device)
        row["host ms"] = 1e3 * host["median_s"]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        row["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        timing = measure(graph.replay, repeats=5 if few else 20, device=device)
        del graph
        torch.cuda.empty_cache()
    return row | {"ms": 1e3 * timing["median_s"]}


def dense_row(name: str, device: torch.device, *, n_batch: int, n: int, limit_s: float) -> Row:
    """The compiled dense reference, timed in a process of its own; not compiled, and named so, if that takes longer
    than `limit_s` seconds or fails."""
    command = [sys.executable, "-m", "gauge_attn.bench_cases", name, str(device), str(n_batch), str(n)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            out, _ = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            why = f"compiling stopped after {limit_s:g} s"
        else:
            if child.returncode == 0:
                row: Row = json.loads(out.splitlines()[-1])
                return row
            why = f"compiling failed with exit code {child.returncode}"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # and the compiler's workers, which are of its group
    function, leaves = DENSE[name], beliefs(n_batch, n, device)
    return timed("speed", name + EAGER, function, leaves, n=n, few=True, compile=False) | {"note": why}


def _main(name: str, device: str, n_batch: str, n: str) -> None:
    where = torch.device(device)
    print(json.dumps(timed("speed", name, DENSE[name], beliefs(int(n_batch), int(n), where), n=int(n), few=True)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
