"""Speed, memory and rounding errors of KL attention on this machine, for random beliefs (generated data).

Forward and backward with respect to mu, log sigma and phi, frames included. On CUDA the functions are compiled and
the step is captured as a CUDA graph, so that the figure is the device's time ("ms"); "host ms" is the same step
launched from Python. On CPU nothing is compiled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lab_shared.attention import Mask, attend
from lab_shared.bench import environment, measure
from lab_shared.command import write_record
from torch import Tensor

from gauge_attn.attention import kl_attention, kl_attention_irreps, prepare
from gauge_attn.compiled import compiled
from gauge_attn.irreps import Irreps
from gauge_attn.kernel import Precision, fused, lower
from gauge_attn.reference import dense_kl_attention
from gauge_attn.so3 import frames, frames_for

L, HEADS, KAPPA = 2, 4, 0.43
SPECS = {
    64: "10x0e+8x1e+6x2e",
    108: "10x0e+10x1e+8x2e+4x3e",
    128: "12x0e+12x1e+9x2e+5x3e",
}
REGIMES = (
    ("seed-like", 0.081, 0.05, 2, 0.43),
    ("seed-like", 0.081, 0.05, 2, 0.0086),
    ("seed-like", 0.081, 0.05, 0, 0.0086),
    ("spread", 0.5, 0.3, 0, 0.0086),
    ("spread", 0.5, 0.3, 2, 0.43),
    ("wide", 1.0, 1.0, 1, 0.43),
)
"""(name, standard deviation of mu, of log sigma, l, kappa)"""

_DENSE_DIAGONAL, _DENSE_FULL = "dense reference, diagonal approximation", "dense reference, full covariance"

SECTIONS = ("speed", "memory", "layouts", "precision")

Row = dict[str, Any]


def main(
    device: torch.device | str, out: Path | None = None, quick: bool = False, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run the sections (or `only` these of SECTIONS): {"environment", "label", "requirements", "rows", "text"}.

    Each row is shown on stderr when done, and all but the text is written to `out` after every row.
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    lengths = ([1024, 512, 4096] if gpu else [128, 256, 512]) if not quick else [32, 64]
    long = [1024, 2048, 4096, 8192, 16384] if gpu else [1024, 2048, 4096]
    sections: dict[str, Callable[[], Iterable[Row]]] = {
        "speed": lambda: speed(lengths, device, n_batch=8 if gpu else 1, dense_limit=1024 if gpu else 512),
        "memory": lambda: memory(long if not quick else [128, 256], device),
        "layouts": lambda: specs(device, n_batch=8 if gpu else 1, n_tokens=(1024 if gpu else 256) if not quick else 64),
        "precision": lambda: precision_table(device, n_tokens=256 if not quick else 64),
    }
    rows: list[Row] = []
    record = {"environment": environment(device), "label": "generated data", "requirements": [], "rows": rows}
    for name in SECTIONS if only is None else only:
        for row in sections[name]():
            print("  ".join(f"{key} {_cell(value)}" for key, value in row.items()), file=sys.stderr, flush=True)
            rows.append(row)
            record["requirements"] = requirements(rows, gpu)
            write_record(out, record)
    return record | {"text": "\n".join([table(rows), "", *(said(r) for r in requirements(rows, gpu))])}


def requirements(rows: Sequence[Row], gpu: bool) -> list[Row]:
    """Required beside measured, for what has been measured: {"what", "measured", "required", "met"}."""
    timed = {(r["name"], r["n"]): r for r in rows if r["section"] == "speed"}
    n, limit = (1024, 500.0) if gpu else (512, 50.0)
    found: list[Row] = []
    for name in (_DENSE_DIAGONAL, _DENSE_FULL):
        longest = max((at for other, at in timed if other == name and at <= n), default=0)
        if longest >= n // 2:
            ratio = timed[name, longest]["times features"]
            what = f"times faster than the {name}, N = {longest}"
            found.append({"what": what, "measured": ratio, "required": f">= {limit:g}", "met": ratio >= limit})
    plain = timed.get(("plain attention of width 24", n))
    if gpu and plain is not None:
        ratio = 1 / plain["times features"]
        what = f"times the duration of plain attention of the same padded width, N = {n}"
        found.append({"what": what, "measured": ratio, "required": "<= 1.5", "met": ratio <= 1.5})
    growth = [r["growth"] for r in rows if "growth" in r]
    if growth:
        what = "largest growth of memory from N to 2 N"
        found.append({"what": what, "measured": max(growth), "required": "<= 2.3", "met": max(growth) <= 2.3})
    return found


def said(requirement: Row) -> str:
    met = "met" if requirement["met"] else "NOT met"
    return f"{requirement['what']}: {requirement['measured']:.3g}, required {requirement['required']}: {met}"


def speed(lengths: Sequence[int], device: torch.device, *, n_batch: int, dense_limit: int) -> Iterator[Row]:
    """Exact features, plain attention of the same padded width and the dense reference, by N: l = 2, 4 heads."""
    width = 24 if device.type == "cuda" else 21
    for n in lengths:
        beliefs = _beliefs(n_batch, n, device)
        plain = tuple(torch.randn(n_batch, HEADS, n, width, device=device, requires_grad=True) for _ in range(3))
        cases: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], bool]] = [
            ("features, mean", _mean_of_features, beliefs, False),
            ("features, mean and covariance", _moments_of_features, beliefs, False),
            (f"plain attention of width {width}", _plain_attention, plain, False),
        ]
        if n <= dense_limit:
            cases.append((_DENSE_DIAGONAL, _dense_diagonal, beliefs, True))
        if device.type == "cpu" and n <= 256:  # minutes beyond
            cases.append((_DENSE_FULL, _dense_full, beliefs, True))
        base: float | None = None
        for name, function, leaves, few in cases:
            row = _timed("speed", name, function, leaves, n=n, few=few)
            base = row["ms"] if base is None else base
            yield row | {"times features": row["ms"] / base}


def memory(lengths: Sequence[int], device: torch.device) -> Iterator[Row]:
    """Peak memory of forward and backward by N (one batch element); on CPU only time, as it counts no memory."""
    before = None
    for n in lengths:
        leaves = _beliefs(1, n, device)
        row = _timed("memory", "features, mean and covariance", _moments_of_features, leaves, n=n, few=True)
        if before is not None and "peak MB" in row:
            row["growth"] = row["peak MB"] / before
        before = row.get("peak MB")
        yield row


def specs(device: torch.device, *, n_batch: int, n_tokens: int) -> Iterator[Row]:
    """Whole layouts of K = 64, 108 and 128 components."""
    for k, spec in SPECS.items():
        irreps = Irreps(spec)
        generator = torch.Generator().manual_seed(0)
        leaves = tuple(
            (scale * torch.randn(n_batch, n_tokens, width, generator=generator)).to(device).requires_grad_()
            for scale, width in ((0.5, k), (0.2, k), (0.5, 3))
        )

        def step(mu: Tensor, log_sigma: Tensor, phi: Tensor, irreps: Irreps = irreps) -> Tensor:
            done = kl_attention_irreps(irreps, mu, log_sigma.exp(), frames_for(irreps, phi), KAPPA)
            assert done.variance is not None
            return done.mean.sum() + done.variance.sum()

        yield _timed("layouts", f"K={k} {spec}", step, leaves, n=n_tokens)


@torch.no_grad()
def precision_table(device: torch.device | str, *, n_tokens: int = 256) -> list[Row]:
    """Errors of each number format against float64: mean total variation 1/2 sum_j |beta' - beta| per query, and the
    largest error of the mean, in units of the means' standard deviation."""
    rows = []
    for name, mu_std, log_sigma_std, l, kappa in REGIMES:
        generator = torch.Generator().manual_seed(0)
        mu = mu_std * torch.randn(1, HEADS, n_tokens, 2 * l + 1, generator=generator, dtype=torch.float64)
        sigma = (log_sigma_std * torch.randn(mu.shape, generator=generator, dtype=torch.float64)).exp()
        omega = frames(0.4827 * torch.randn(1, n_tokens, 3, generator=generator, dtype=torch.float64), l)
        exact = dense_kl_attention(mu, sigma, omega, kappa)
        m, s, f = (x.float().to(device) for x in (mu, sigma, omega))
        row: Row = {"section": "precision", "name": f"{name}, l={l}, kappa={kappa:g}", "n": n_tokens}
        formats: tuple[Precision, ...] = ("fp32", "fp16", "bf16x3")
        for precision in formats:
            beta = _weights(m, s, f, kappa, precision)
            mean = kl_attention(m, s, f, kappa, precision=precision).mean.double().cpu()
            row[f"{precision} TV"] = float((beta - exact.beta).abs().sum(-1).mean() / 2)
            row[f"{precision} mean"] = float((mean - exact.mean).abs().max() / mu_std)
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one block per section."""
    lines: list[str] = []
    for section in dict.fromkeys(row["section"] for row in rows):
        chosen = [{k: v for k, v in row.items() if k != "section"} for row in rows if row["section"] == section]
        columns = list(dict.fromkeys(name for row in chosen for name in row))
        cells = [columns, *([_cell(row.get(name)) for name in columns] for row in chosen)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines += ["", f"{section} (generated data)"]
        for row in cells:
            lines.append(
                "  ".join(
                    c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
                )
            )
    return "\n".join(lines[1:])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.3g}"


def _beliefs(n_batch: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((0.5, (n_batch, HEADS, n, 2 * L + 1)), (0.2, (n_batch, HEADS, n, 2 * L + 1)), (0.5, (n_batch, n, 3)))
    mu, log_sigma, phi = ((s * torch.randn(*shape, generator=generator)).to(device) for s, shape in shapes)
    return mu.requires_grad_(), log_sigma.requires_grad_(), phi.requires_grad_()


def _mean_of_features(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    return kl_attention(mu, log_sigma.exp(), frames(phi, L), KAPPA, mean_only=True).mean.sum()


def _moments_of_features(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    done = kl_attention(mu, log_sigma.exp(), frames(phi, L), KAPPA)
    assert done.covariance is not None
    return done.mean.sum() + done.covariance.sum()


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Mask.causal(), backend="sdpa").sum()


def _dense_diagonal(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    return dense_kl_attention(
        mu, log_sigma.exp(), frames(phi, L), KAPPA, covariance="diag_approx", mean_only=True
    ).mean.sum()


def _dense_full(mu: Tensor, log_sigma: Tensor, phi: Tensor) -> Tensor:
    return dense_kl_attention(mu, log_sigma.exp(), frames(phi, L), KAPPA, mean_only=True).mean.sum()


def _timed(
    section: str,
    name: str,
    function: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    *,
    n: int,
    few: bool = False,
) -> Row:
    """Median ms of forward and backward, and the peak of memory above the leaves; on CUDA also the seconds that the
    first call took, most of them in the compiler."""
    device = leaves[0].device
    row: Row = {"section": section, "name": name, "n": n}
    if device.type != "cuda":
        timing = measure(lambda: torch.autograd.grad(function(*leaves), leaves), repeats=3 if few else 7, warmup=1)
        return row | {"ms": 1e3 * timing["median_s"]}
    function(*leaves)  # makes the constant tables, which a compiled function only reads
    fast = compiled(function)

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


def _weights(mu: Tensor, sigma: Tensor, omega: Tensor, kappa: float, precision: Precision) -> Tensor:
    """beta (1, H, N, N) in float64, read out of the kernel with columns of the identity as values."""
    p = prepare(mu, sigma, omega, kappa)
    query, key, _ = lower(p.query, p.key, p.query, p.kappa_H1, precision)
    n, width = query.size(2), query.size(-1)
    identity = torch.eye(n, dtype=query.dtype, device=query.device)
    columns = []
    for begin in range(0, n, width):
        value = torch.nn.functional.pad(identity[:, begin : begin + width], (0, max(0, begin + width - n)))
        value = value.expand(*query.shape[:2], n, width).contiguous()
        columns.append(fused(query, key, value, True, False)[0])
    beta = torch.cat(columns, -1)[..., :n].double().cpu()
    return beta / beta.sum(-1, keepdim=True)
