"""Speed, memory and rounding errors of KL attention on this machine, for random beliefs (generated data).

Forward and backward with respect to mu, log sigma and phi, frames included. On CUDA the functions are compiled and
the step is captured as a CUDA graph, so that the figure is the device's time ("ms"); "host ms" is the same step
launched from Python. On CPU nothing is compiled, and what is compared takes turns.

The work is a list of stages, those of the requirements first. The record is written after every row, and no stage
begins after --budget seconds, so that a call that is cut off has measured what matters and left a whole file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lab_shared.bench import environment
from lab_shared.command import write_record
from lab_shared.progress import say
from torch import Tensor

from gauge_attn.attention import kl_attention_irreps
from gauge_attn.bench_cases import (
    DENSE,
    DENSE_DIAGONAL,
    DENSE_FULL,
    EAGER,
    HEADS,
    KAPPA,
    Case,
    Row,
    alternating,
    beliefs,
    dense_diagonal,
    dense_full,
    dense_row,
    mean_of_features,
    moments_of_features,
    plain_attention,
    timed,
)
from gauge_attn.irreps import Irreps
from gauge_attn.rounding import precision_table
from gauge_attn.so3 import frames_for

SPECS = {
    64: "10x0e+8x1e+6x2e",
    108: "10x0e+10x1e+8x2e+4x3e",
    128: "12x0e+12x1e+9x2e+5x3e",
}
SECTIONS = ("speed", "dense", "memory", "layouts", "precision")
COMPILE_LIMIT_S = 240.0
_FEATURES = "features, mean"
_FULL_UPTO = 256
"""The longest dense reference with whole covariances on a CPU: minutes beyond."""


class Stage(NamedTuple):
    """A piece of work that is done or left out as a whole. run: gets the rows so far."""

    section: str
    name: str
    run: Callable[[Sequence[Row]], Iterable[Row]]


def main(
    device: torch.device | str,
    out: Path | None = None,
    quick: bool = False,
    only: Sequence[str] | None = None,
    budget_s: float | None = None,
    compile_limit_s: float = COMPILE_LIMIT_S,
) -> dict[str, Any]:
    """Run the stages (or those of `only` these SECTIONS) and return {"environment", "label", "requirements", "rows",
    "left out", "failed", "text"}.

    Each row is shown on stderr when done, and all but the text is written to `out` after every row. budget_s: seconds
    after which no further stage begins; "left out" names them. "failed": stage -> error of those that failed, after
    which the others go on. compile_limit_s: on CUDA, what the dense reference's compiler may take.
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    started = time.monotonic()
    rows: list[Row] = []
    left_out: list[str] = []
    failed: dict[str, str] = {}
    chosen = [s for s in stages(device, quick, compile_limit_s) if only is None or s.section in only]
    record = {
        "environment": environment(device),
        "label": "generated data",
        "requirements": [],
        "left out": left_out,
        "failed": failed,
        "rows": rows,
    }
    for stage in chosen:
        if budget_s is not None and time.monotonic() - started > budget_s:
            left_out.append(stage.name)
            continue
        try:
            for row in stage.run(rows):
                say("  ".join(f"{key} {_cell(value)}" for key, value in row.items()))
                rows.append(row)
                record["requirements"] = requirements(rows, gpu)
                write_record(out, record)
        except RuntimeError as error:  # of memory or of a kernel: the other stages do not depend on it
            failed[stage.name] = str(error).splitlines()[0]
    write_record(out, record)
    text = [table(rows), "", *(said(r) for r in requirements(rows, gpu))]
    text += [f"{name} FAILED: {why}" for name, why in failed.items()]
    if left_out:
        text.append(f"left out after {budget_s:g} s: {'; '.join(left_out)}")
    return record | {"text": "\n".join(text)}


def stages(device: torch.device, quick: bool, compile_limit_s: float = COMPILE_LIMIT_S) -> list[Stage]:
    """All stages in their order: on CUDA N = 1024 with the dense reference, memory, layouts, precision, then the other
    lengths and the reference with whole covariances. On a CPU the references take turns with what they are compared
    to, so that "speed" has them, and "dense" nothing."""
    gpu = device.type == "cuda"
    n_batch = 8 if gpu else 1

    def fast(n: int) -> Stage:
        def run(rows: Sequence[Row]) -> Iterable[Row]:
            return speed_on_cuda(n, device, n_batch) if gpu else speed_on_cpu(n, device)

        return Stage("speed", f"speed, N = {n}", run)

    def dense(name: str, n: int) -> Stage:
        def run(rows: Sequence[Row]) -> Iterable[Row]:
            return [_compared(dense_row(name, device, n_batch=n_batch, n=n, limit_s=compile_limit_s), rows)]

        return Stage("dense", f"{name}, N = {n}", run)

    first, *others = (64, 32) if quick else (1024, 512, 4096) if gpu else (512, 256, 128)
    long = (128, 256) if quick else (1024, 2048, 4096, 8192, 16384) if gpu else (1024, 2048, 4096)
    n_layouts = 64 if quick else 1024 if gpu else 256
    return [
        fast(first),
        *([dense(DENSE_DIAGONAL, first)] if gpu else []),
        Stage("memory", "memory", lambda rows: memory(long, device)),
        Stage("layouts", "layouts", lambda rows: specs(device, n_batch=n_batch, n_tokens=n_layouts)),
        Stage("precision", "precision", lambda rows: precision_table(device, n_tokens=64 if quick else 256)),
        *(fast(n) for n in others),
        *([dense(DENSE_DIAGONAL, others[0]), dense(DENSE_FULL, others[0])] if gpu else []),
    ]


def requirements(rows: Sequence[Row], gpu: bool) -> list[Row]:
    """Required beside measured, for what has been measured: {"what", "measured", "required", "met"}."""
    at_n = {(r["name"], r["n"]): r for r in rows if r["section"] == "speed"}
    n, limit = (1024, 500.0) if gpu else (512, 50.0)
    found: list[Row] = []
    for name in (*DENSE, *(name + EAGER for name in DENSE)):
        longest = max((at for other, at in at_n if other == name and at <= n), default=0)
        if longest >= n // 2 and "times features" in at_n[name, longest]:
            ratio = at_n[name, longest]["times features"]
            what = f"times faster than the {name}, N = {longest}"
            found.append({"what": what, "measured": ratio, "required": f">= {limit:g}", "met": ratio >= limit})
    plain = at_n.get(("plain attention of width 24", n))
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


def speed_on_cpu(n: int, device: torch.device) -> list[Row]:
    """Exact features, plain attention of the same width and the dense references in turn: l = 2, 4 heads."""
    leaves = beliefs(1, n, device)
    plain = tuple(torch.randn(1, HEADS, n, 21, device=device, requires_grad=True) for _ in range(3))
    cases = [
        Case(_FEATURES, mean_of_features, leaves),
        Case("features, mean and covariance", moments_of_features, leaves),
        Case("plain attention of width 21", plain_attention, plain),
        Case(DENSE_DIAGONAL, dense_diagonal, leaves),
    ]
    if n <= _FULL_UPTO:
        cases.append(Case(DENSE_FULL, dense_full, leaves))
    return alternating("speed", n, cases)


def speed_on_cuda(n: int, device: torch.device, n_batch: int) -> Iterator[Row]:
    """Exact features and plain attention of the same padded width: l = 2, 4 heads."""
    leaves = beliefs(n_batch, n, device)
    plain = tuple(torch.randn(n_batch, HEADS, n, 24, device=device, requires_grad=True) for _ in range(3))
    done: list[Row] = []
    for name, function, given in (
        (_FEATURES, mean_of_features, leaves),
        ("plain attention of width 24", plain_attention, plain),
        ("features, mean and covariance", moments_of_features, leaves),
    ):
        done.append(_compared(timed("speed", name, function, given, n=n), done))
        yield done[-1]


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """With its time over that of exact features at the same length, where that is known."""
    base = [r["ms"] for r in [*rows, row] if (r["section"], r["name"], r["n"]) == ("speed", _FEATURES, row["n"])]
    return row | {"times features": row["ms"] / base[0]} if base else row


def memory(lengths: Sequence[int], device: torch.device) -> Iterator[Row]:
    """Peak memory of forward and backward by N (one batch element); on CPU only time, as it counts no memory."""
    before = None
    for n in lengths:
        leaves = beliefs(1, n, device)
        row = timed("memory", "features, mean and covariance", moments_of_features, leaves, n=n, few=True)
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

        yield timed("layouts", f"K={k} {spec}", step, leaves, n=n_tokens)


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
    if isinstance(value, list):
        return "-".join(_cell(x) for x in value)
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.3g}"
