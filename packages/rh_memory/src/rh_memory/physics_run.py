"""The physics report's numbers for a file of zeros, and for a run's predictions of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.arrays import load_arrays
from lab_shared.errors import UserError

from rh_memory import physics, readout
from rh_memory.config import DataConfig, TrainConfig
from rh_memory.data.unfold import Spacings
from rh_memory.dataset import load_dataset, load_spacings
from rh_memory.diagnostics.golden import Golden
from rh_memory.evaluate import batch_size, inference, inside, load_run, scored_part, with_file
from rh_memory.physics import Columns

Found = tuple[dict[str, Columns], dict[str, Any]]


def without_run(data: Path | None, zeros: int | None) -> Found:
    """Figures and summary of the last `zeros` zeros of a file, or of the default table."""
    config = TrainConfig(data=replace(DataConfig(), file=None if data is None else str(data)))
    spacings, label = load_spacings(config, torch.device("cpu"))
    return _of_zeros(spacings, label, zeros)


def _of_zeros(spacings: Spacings, label: str, zeros: int | None) -> Found:
    last = slice(0 if zeros is None else max(0, len(spacings) - zeros), None)
    gamma = np.asarray(spacings.centre)[last] + np.asarray(spacings.offset)[last]
    span = float(gamma[-1] - gamma[0]) if len(gamma) else 0.0
    if span < physics.SEGMENT:
        raise UserError(
            f"{len(gamma):,} spacings of {label} span {span:,.0f} of height; a spectrum takes {physics.SEGMENT:,.0f}: "
            "use more zeros" + ("" if zeros is None else f" than --zeros {zeros}")
        )
    figures = physics.of_zeros(np.asarray(spacings.s)[last].astype(np.float64), gamma)
    said = label if zeros is None else f"the last {len(gamma):,} of {label}"
    return figures, {"label": said, **physics.summary_of(figures, float(np.median(gamma[-physics.LOCAL :])))}


def with_run(run: Path, data: Path | None, zeros: int | None, device: torch.device) -> Found:
    """The same on the zeros a run was scored on, with the lines in its predictions if those are enough to fit them.

    Raises UserError for a run that was not evaluated, or on other zeros, or whose data are not zeta zeros.
    """
    predictions = run / "predictions.npz"
    if not predictions.is_file():
        raise UserError(f"{run} has no predictions.npz: run `rh-memory evaluate {run}` first")
    config, model = load_run(run, device)
    config = with_file(config, data)
    if config.data.source != "zeta":
        raise UserError(f"{run} was trained on {config.data.source} spacings, which have no primes to look for")
    dataset = load_dataset(config, device)
    figures, result = _of_zeros(dataset.spacings, dataset.label, zeros)
    saved, part = load_arrays(predictions), scored_part(dataset)
    spacing_W, mean_W = saved["spacing"], saved["mean_last"]
    if not inside(spacing_W, getattr(dataset.split, part)).all():
        raise UserError(
            f"{predictions} is not about {dataset.label}: run `rh-memory evaluate {run}` first, with the same --data"
        )
    if len(spacing_W) <= (unknowns := readout.unknowns()):
        few = f"{len(spacing_W):,} predicted spacings for {unknowns} unknowns: evaluate on more zeros"
        result["left_out"] = {"lines of primes": few}
    else:
        figures["lines"] = lines = readout.lines(dataset.spacings, spacing_W, mean_W)
        height = float(np.median(np.asarray(dataset.spacings.centre)[spacing_W]))
        result |= {
            "learned": readout.learned(lines),
            "law": {name: readout.law(lines, height, name) for name in ("zeros", "model")},
        }
    width = dataset.width
    windows = 4096 if device.type == "cuda" else 256
    golden = Golden.spread(dataset.data, dataset.split.starts(part, 8, width), windows, batch_size(device), width)
    with inference(config, device):
        use = readout.frequency_use(model, golden)
    if use is not None:
        figures["frequency_use"] = use
    return figures, result


def text(result: dict[str, Any]) -> str:
    """A summary for the terminal."""
    variance, peak = result["number_variance_near_20"], result["peak_over_background"]
    lines = [
        f"{result['label']}, height about {result['height']:,.0f}",
        f"number variance at L = {variance['L']:.1f}: {variance['variance']:.4f} [{variance['low']:.4f}, "
        f"{variance['high']:.4f}]; with primes {variance['primes']:.4f}, GUE {variance['GUE']:.4f}; "
        f"saturates from L = {result['saturation_length']:.1f}",
        f"spectral lines over background: {peak['prime powers, median']:.1f} at log of prime powers, "
        f"{peak['other numbers, median']:.1f} at other integers (medians)",
    ]
    if "learned" in result:
        learned = result["learned"]
        share = "–" if learned["power_predicted"] is None else f"{learned['power_predicted']:.1%}"
        lines.append(
            f"the model predicts {share} of the power of {learned['lines_that_stand_out']} "
            f"lines of prime powers; more than half of those of {' '.join(learned['learned']) or 'none'}; "
            f"not of {' '.join(learned['not_learned']) or 'none'}"
        )
        for name, law in result["law"].items():
            if law["exponent"] is None:
                lines.append(f"law in the {name}: too few lines stand out ({law['lines']})")
                continue
            b, a = law["exponent"], law["prefactor"]
            lines.append(
                f"law in the {name}: amplitude ~ A p^-b with A = {a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}], "
                f"b = {b['value']:.3f} [{b['low']:.3f}, {b['high']:.3f}] from {law['lines']} primes "
                "(explicit formula, first order: 0.637 and 0.5)"
            )
    lines += [f"left out, {name}: {reason}" for name, reason in result.get("left_out", {}).items()]
    return "\n".join(lines)
