"""Proper scores of predicted spacings, in nats per unfolded spacing (lower is better), with block-bootstrap intervals.

The metric names carry the definition:
- nll_last: -log p(s_257 | the 256 spacings before it), the last position of every window;
- nll_all: the same averaged over all positions of the window, so over contexts of 1 to 256 spacings; of a postfix
  memory over its readouts only (16, 32, ..., 256), which is another score: `contexts_of` says which;
- crps_last, pit_last, coverage_last, below_zero_last: at the same targets as nll_last.

Neighbouring targets are not independent, so every interval resamples whole blocks of 256 spacings. An NLL has no zero
point: differences mean something, ratios and percentages do not.

Shapes: W windows, T positions (contexts) of a window, N values, B blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lab_shared.progress import Counter
from lab_shared.stats import bca_interval
from numpy.typing import ArrayLike, NDArray

from rh_memory.data.windows import SpacingData

Floats = NDArray[np.float64]
BLOCK = 256
WIDTH = 257
"""Spacings of a scored window: 256 of context and one target."""
STRIDE = 8
"""Between the scored windows: 24,960 of them on the 781 x 256 spacings of val_tail."""
COVERAGE = (0.5, 0.8, 0.9, 0.95, 0.99)
PIT_BINS = 20


class Estimate(NamedTuple):
    value: float
    low: float | None
    high: float | None

    def json(self) -> dict[str, float | None]:
        return self._asdict()

    def text(self, digits: int = 4, signed: bool = False) -> str:
        spec = f"{'+' if signed else ''}.{digits}f"
        if self.low is None or self.high is None:
            return format(self.value, spec)
        return f"{format(self.value, spec)} [{format(self.low, spec)}, {format(self.high, spec)}]"


def block_estimate(
    values_N: ArrayLike, spacing_N: ArrayLike, *, block: int = BLOCK, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of the values and its bootstrap interval over blocks of consecutive spacings.

    spacing_N: the index of the spacing each value belongs to; values whose index has the same quotient by `block` are
    kept together. The mean is a ratio of block sums; its interval is the BCa interval of the linearised ratio, which is
    exact when blocks hold equally many values. Without at least two blocks there is no interval.

    Raises ValueError for unequal lengths, no values or values that are not finite.
    """
    x, index = np.asarray(values_N, dtype=np.float64), np.asarray(spacing_N)
    if x.shape != index.shape or x.ndim != 1 or x.size == 0:
        raise ValueError(f"values {x.shape} and spacings {index.shape}: need the same positive number of each")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values are not finite")
    _, member_N = np.unique(index // block, return_inverse=True)
    count_B = np.bincount(member_N)
    mean = float(x.mean())
    if count_B.size < 2:
        return Estimate(mean, None, None)
    excess_B = np.bincount(member_N, weights=x - mean) / count_B.mean()
    low, high = bca_interval(mean + excess_B, level=level, seed=seed)
    return Estimate(mean, low, high)


@dataclass(frozen=True)
class Scored:
    """What one predictor says about the scored windows; arrays are float64 on the CPU."""

    spacing_W: NDArray[np.int64]
    """Index of each window's target, the last spacing of the window."""
    nll_last_W: Floats
    crps_last_W: Floats
    pit_last_W: Floats
    below_zero_W: Floats
    """Probability the predictor gives to negative spacings."""
    mean_W: Floats
    """Predicted mean."""
    context_T: NDArray[np.int64]
    """Spacings known at each position."""
    nll_WT: NDArray[np.float32]

    @property
    def nll_all_W(self) -> Floats:
        return self.nll_WT.mean(axis=1, dtype=np.float64)


def score_model(
    model: Any, data: SpacingData, starts_W: torch.Tensor, *, batch: int, width: int = WIDTH, title: str = "scoring"
) -> Scored:
    """Scores of `model` on the windows that begin at `starts_W`, in eval mode.

    A postfix memory is scored at its own readouts, the last of which sees the whole context.
    """
    model.eval()
    if model.config.memory == "postfix":
        positions, context_T = "readouts", np.array(model.readout_contexts(width - 1))
    else:
        positions, context_T = "all", np.arange(1, width)
    index_T = torch.from_numpy(context_T).to(data.s.device)
    parts: dict[str, list[torch.Tensor]] = {}
    with torch.inference_mode(), Counter(title, len(starts_W), "windows") as counter:
        done = 0
        for starts_B in starts_W.to(data.s.device).split(batch):
            window = data.window(starts_B, width)
            mixture = model.predict(window, positions)
            y_BT = window.s_BW[:, index_T]
            last, y_B = mixture[:, -1], y_BT[:, -1]
            found = {
                "nll_WT": -mixture.log_prob(y_BT),
                "nll_last_W": -last.log_prob(y_B),
                "crps_last_W": last.crps(y_B),
                "pit_last_W": last.cdf(y_B),
                "below_zero_W": last.mass_below_zero(),
                "mean_W": last.mean(),
            }
            for name, value in found.items():
                parts.setdefault(name, []).append(value.float())
            done += len(starts_B)
            counter.show(done)
    arrays: dict[str, Any] = {name: torch.cat(part).cpu().numpy() for name, part in parts.items()}
    arrays = {name: x if name == "nll_WT" else x.astype(np.float64) for name, x in arrays.items()}
    return Scored(spacing_W=starts_W.cpu().numpy() + width - 1, context_T=context_T, **arrays)


def summarise(scored: Scored) -> dict[str, Any]:
    """Every score with its interval, ready for JSON."""
    at = scored.spacing_W

    def last(values: Floats) -> dict[str, float | None]:
        return block_estimate(values, at).json()

    summary: dict[str, Any] = {
        "windows": len(at),
        "nll_last": last(scored.nll_last_W),
        # Windows overlap: only blocks several windows long are nearly independent.
        "nll_all": block_estimate(scored.nll_all_W, at, block=4 * BLOCK).json(),
        "crps_last": last(scored.crps_last_W),
        "below_zero_last": last(scored.below_zero_W),
        "pit_last": pit_summary(scored.pit_last_W, at),
        "coverage_last": coverage_table(scored.pit_last_W, at),
        "nll_by_context": context_curve(scored),
    }
    return summary


def context_curve(scored: Scored) -> dict[str, list[Any]]:
    """Mean NLL after 1, 2, 3, ... known spacings at up to 33 contexts, with intervals."""
    n = len(scored.context_T)
    chosen = np.unique(np.round(np.geomspace(1, n, 33)).astype(np.int64) - 1) if n > 33 else np.arange(n)
    rows = []
    for t in chosen.tolist():
        first = scored.spacing_W - scored.context_T[-1] + scored.context_T[t]
        rows.append(block_estimate(scored.nll_WT[:, t], first))
    return {
        "context": scored.context_T[chosen].tolist(),
        "nll": [row.value for row in rows],
        "low": [row.low for row in rows],
        "high": [row.high for row in rows],
    }


def contexts_of(curve: Mapping[str, list[Any]]) -> str:
    """The contexts that nll_all is a mean over, in words, from the `nll_by_context` of `summarise`."""
    first, last = curve["context"][0], curve["context"][-1]
    if first == last:
        return f"context of {last}"
    return f"contexts of 1 to {last}" if first == 1 else f"contexts of {first}, {2 * first}, ..., {last}"


def pit_summary(pit_N: Floats, spacing_N: ArrayLike) -> dict[str, Any]:
    """Histogram (density), mean and standard deviation of the probability integral transform; uniform is perfect.

    Uniform values have mean 1/2 and standard deviation 1/sqrt(12) = .2887; a smaller one means too wide predictions.
    """
    counts, edges = np.histogram(pit_N, bins=PIT_BINS, range=(0, 1))
    inside = np.clip((pit_N * PIT_BINS).astype(np.int64), 0, PIT_BINS - 1)
    bands = [block_estimate(PIT_BINS * (inside == i), spacing_N) for i in range(PIT_BINS)]
    return {
        "mean": block_estimate(pit_N, spacing_N).json(),
        "std": float(np.std(pit_N)),
        "edges": edges.tolist(),
        "density": (counts / counts.sum() * PIT_BINS).tolist(),
        "low": [band.low for band in bands],
        "high": [band.high for band in bands],
    }


def coverage_table(pit_N: Floats, spacing_N: ArrayLike) -> list[dict[str, Any]]:
    """Share of targets inside the central interval of each nominal level."""
    rows = []
    for level in COVERAGE:
        inside = np.abs(pit_N - 0.5) <= level / 2
        rows.append({"nominal": level, "observed": block_estimate(inside, spacing_N).json()})
    return rows


def paired_difference(
    nll_a_W: Floats, spacing_a_W: ArrayLike, nll_b_W: Floats, spacing_b_W: ArrayLike, *, block: int = BLOCK
) -> Estimate:
    """Mean of a - b over the targets both have, with the interval of the paired differences.

    Raises ValueError when they share no target.
    """
    both, in_a, in_b = np.intersect1d(spacing_a_W, spacing_b_W, return_indices=True)
    if both.size == 0:
        raise ValueError("the two predictors were scored on different targets; score them on the same windows")
    return block_estimate(nll_a_W[in_a] - nll_b_W[in_b], both, block=block)
