"""A grid's records as a table with intervals over seeds, and with its verdicts as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gauge_attn.comparisons import Run, by_cell, of_l, summary


def grid_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and one row per cell: loss and perplexity, KL, gradient norm; by l row_std, what noise would give,
    entropy, and the cost of a head: the rise of the loss (nats) when its attention is made uniform."""
    ls = sorted({h["l"] for r in runs for h in r["summary"]["heads"]})
    header = ["cell", "seeds", "loss (nats)", "perplexity", "KL mean", "KL std", "max |grad|"]
    header += [f"{name} ℓ{l}" for name in ("row_std", "noise", "H/log n", "cost") for l in ls]
    rows = []
    for (_, cell), members in by_cell(runs).items():
        row = [cell, str(len(members))]
        row += [
            _cell([r["summary"][name] for r in members], digits) for name, digits in (("loss", 4), ("perplexity", 2))
        ]
        for name in ("kl_mean", "kl_std"):
            row.append(_cell([r["summary"]["diversity"][name] for r in members if r["summary"]["diversity"]], 5))
        row.append(_cell([r["summary"]["grad_norm_max"] for r in members], 2))
        row += [_cell([of_l(r, l) for r in members], 4) for l in ls]
        row += [_cell([r["summary"]["noise"].get(str(l)) for r in members], 4) for l in ls]
        row += [_cell([of_l(r, l, "entropy_ratio") for r in members], 3) for l in ls]
        row += [_cell([of_l(r, l, "uniform") for r in members], 4) for l in ls]
        rows.append(row)
    return header, rows


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    s = summary(known)
    half = "" if s.low is None else f" ± {s.mean - s.low:.{digits}f}"
    return f"{s.mean:.{digits}f}{half}"


def grid_text(result: dict[str, Any]) -> str:
    """The verdicts and the table of a grid, to read in a terminal."""
    header, rows = grid_rows(result["runs"])
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [header, *rows]]
    found = [f"[{v['status']}] {v['claim']}\n    {v['measured']}" for v in result["verdicts"]]
    return "\n".join([*table, "", *found])
