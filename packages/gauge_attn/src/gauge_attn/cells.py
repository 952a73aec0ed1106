"""What the grids consist of: named configurations and their seeds. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lab_shared.errors import UserError

from gauge_attn.config import SEED_SPEC, TrainConfig, as_original, faithful, seed_run

Cells = dict[str, TrainConfig]

STEPS = 300
"""Training steps of every run, unless said otherwise."""
KAPPA_MODES = ("shared", "dim", "sqrt_dim", "standardised", "learnable")
LAYOUTS = {
    "108-scalars": "108x0e",
    "108": "10x0e+10x1e+8x2e+4x3e",
    "19-nonet": "1x9e",
    "41-scalars": "41x0e",
    "41": "4x1e+3x2e+2x3e",
    "28-scalars": "28x0e",
    "28": "2x0e+2x1e+4x2e",
    "25-scalars": "25x0e",
    "25-pure-tensors": "5x2e",
    "19-scalars": "19x0e",
    "19-tensors": "1x0e+1x1e+3x2e",
    "19-vectors": "1x0e+6x1e",
    "19": SEED_SPEC,
}
"""Named by their components K, the slowest first."""
ALIGNMENTS: dict[str, tuple[float, str]] = {
    "none": (0.0, "mean"),
    "mean-0.01": (0.01, "mean"),
    "mean-1": (1.0, "mean"),
    "sum-1": (1.0, "sum"),
}
GRIDS = ("h8", "h4", "h6", "seed-repro", "matrix", "h1", "h3", "h5", "h7")
"""What `all` runs, each of h2 and specs being a part of matrix."""


def seeds_of(grid: str, cell: str) -> int:
    """Seeds of a cell: 5 for the headline (the seed's runs, and layouts of its K without alignment loss), else 3."""
    if grid == "smoke":
        return 1
    headline = cell.startswith("19") and cell.endswith(",none") and not cell.startswith("19-nonet")
    return 5 if grid == "seed-repro" or headline else 3


def _model(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, model=replace(config.model, **changes))


def _alignment(config: TrainConfig, name: str) -> TrainConfig:
    weight, reduction = ALIGNMENTS[name]
    return replace(config, optim=replace(config.optim, alignment=weight, alignment_reduction=reduction))  # type: ignore[arg-type]


def cells(name: str) -> Cells:
    """The configurations of a grid. Raises UserError for a name that is none.

    seed-repro: the seed's three temperatures with the alignment loss summed, as is and with the original's
    approximations, and for each what the same beliefs would do if they were noise (`noise_control`).
    matrix: layouts x temperature modes x alignment loss; h2 (does l matter once logits are standardised?) is its part
    of K = 19 without alignment loss, specs (layouts beside all-scalar ones of equal K) that of learnable temperatures.
    h1: row_std over d at a shared temperature. h3: weight of the alignment loss. h4: Taylor-4 frames. h5: gauge-fixed
    beliefs. h6: diagonal covariances. h7: frames frozen. h8: curved transport, in windows of 32.
    """
    dense = faithful(0.0086, route="dense", mean_std=0.081)
    short = _model(dense, kappa=0.43)
    short = replace(short, data=replace(short.data, window=32))
    grids: dict[str, Cells] = {
        "seed-repro": {
            "seed-c-original": as_original(seed_run(0.0086)),
            "seed-a": seed_run(0.43),
            "seed-b": seed_run(0.00043),
            "seed-c": seed_run(0.0086),
        },
        "matrix": _matrix(),
        "h1": {f"spec={label}": faithful(spec=LAYOUTS[label]) for label in ("41", "28", "19")},
        "h2": {cell: c for cell, c in _matrix().items() if cell.startswith("19") and cell.endswith(",none")},
        "h3": {
            f"kappa={kappa},alignment={weight}": _alignment(faithful(kappa, mean_std=0.02), weight)
            for kappa in (0.43, 0.0086)
            for weight in ALIGNMENTS
        },
        "h4": {"exact": dense, "taylor4": _model(dense, exponential="taylor4")},
        "h5": {"free": faithful(), "gauge-fixed": faithful(gauge_fixed=True)},
        "h6": {"full": dense, "diagonal": _model(dense, covariance="diag_approx")},
        "h7": {"learned": faithful(), "frozen": faithful(frames="frozen")},
        "h8": {"curved": _model(short, curvature=1.0), "flat": short},
        "specs": {cell: c for cell, c in _matrix().items() if cell.endswith(",learnable,none")},
        "smoke": {
            "free": faithful(spec="1x0e+1x1e"),
            "aligned": _alignment(faithful(spec="1x0e+1x1e"), "sum-1"),
            "frozen": faithful(spec="1x0e+1x1e", frames="frozen"),
        },
    }
    if name == "all":
        return {f"{grid}/{cell}": config for grid in GRIDS for cell, config in grids[grid].items()}
    if name not in grids:
        raise UserError(f"no grid {name!r}; there are {', '.join([*grids, 'all'])}")
    return grids[name]


def _matrix() -> Cells:
    """Cells named LAYOUT,MODE,ALIGNMENT. The pure tensors and their control, and the slow l = 9, go without alignment
    loss, the latter in three modes. Scalars have d = 1, so that `dim` and `sqrt_dim` would repeat `shared`."""
    cells = {}
    for label, spec in LAYOUTS.items():
        fewer = label.endswith("-scalars") or label == "19-nonet"
        modes = ("shared", "standardised", "learnable") if fewer else KAPPA_MODES
        alignments = ("none",) if label.startswith("25") or label == "19-nonet" else ("none", "mean-1", "sum-1")
        for mode in modes:
            for alignment in alignments:
                config = faithful(spec=spec, kappa_mode=mode)
                cells[f"{label},{mode},{alignment}"] = _alignment(config, alignment)
    return cells
