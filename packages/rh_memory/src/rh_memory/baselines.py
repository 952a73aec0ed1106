"""What is known without a trained network: every model is scored beside these, on the same windows, in nats.

i.i.d. marginal      histogram of the training spacings: the floor of a predictor that ignores the context;
surmise, exact gap   random-matrix gap densities (sine_process.py), no parameters;
sine process | k     exact conditional density of the next gap given k gaps, if zeros were GUE eigenvalues;
AR(50)               one linear fit for all heights;
AR(64) | height      weights quadratic in log height;
prime phases         64 spacings and tapered sums over zeros at log q, q <= 200; weights linear in log height.

Linear predictors become densities as Gaussians with the residual variance of the training rows. GUE figures are from
simulated matrices and say what the zeros would allow if the primes left no trace.
"""

from __future__ import annotations

import hashlib
import io
import json as json_module
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.arrays import ArrayFileError, load_arrays
from lab_shared.files import atomic_write, make_folder
from numpy.typing import NDArray

from rh_memory import linear, sine_process
from rh_memory.config import ZEROS, DataConfig, TrainConfig
from rh_memory.data.controls import gue_spacings
from rh_memory.data.unfold import Spacings
from rh_memory.data.windows import Split
from rh_memory.dataset import Dataset, load_dataset
from rh_memory.scores import STRIDE, WIDTH, block_estimate
from rh_memory.zeros.store import DEFAULT_FOLDER

Floats = NDArray[np.float64]
AR_ROWS, PRIME_ROWS = 600_000, 200_000
"""Training spacings nearest to the scored ones that weights which follow the height are fitted on."""
GUE_SPACINGS, GUE_SIZE, GUE_SEED = 61_440, 512, 0
_VERSION = 2
_BINS, _LONGEST = 400, 4.0
INFORMATION = {
    "iid marginal": "none",
    "Wigner surmise": "none",
    "sine-process gap": "none",
    "sine process, 1 gap": "1 gap",
    "sine process, 8 gaps": "8 gaps",
    "AR(50)": "50 gaps",
    "AR(64), height": "64 gaps, height",
    "prime phases": "256 gaps, height",
    "AR(64)": "64 gaps",
}
AR = linear.Features(lags=64)
PRIMES = linear.Features(lags=64, primes=200)


@dataclass(frozen=True)
class Baselines:
    """Scores of every baseline on the same targets."""

    spacing_W: NDArray[np.int64]
    nll: dict[str, Floats]
    facts: dict[str, Any]
    """Entropies of the parameter-free gap densities, and whatever else is a number of its own."""

    def json(self) -> dict[str, Any]:
        floor = self.nll["iid marginal"]
        rows = []
        for name, values in self.nll.items():
            rows.append(
                {
                    "name": name,
                    "information": INFORMATION[name],
                    "nll_last": block_estimate(values, self.spacing_W).json(),
                    "minus_iid_marginal": block_estimate(values - floor, self.spacing_W).json(),
                }
            )
        return {"windows": len(self.spacing_W), "rows": rows, **self.facts}


def marginal_log_density(train: Floats) -> tuple[Floats, Floats]:
    """(edges, log density per bin) of the training histogram, half a count added to every bin.

    Longer spacings than the last edge count as falling into the last bin.
    """
    counts, edges = np.histogram(np.minimum(train, _LONGEST), bins=_BINS, range=(0, _LONGEST))
    density = (counts + 0.5) / (counts.sum() + 0.5 * _BINS) * (_BINS / _LONGEST)
    return edges, np.log(density)


def marginal_nll(train: Floats, values: Floats) -> Floats:
    """-log density of `values` under the training histogram."""
    edges, log_density = marginal_log_density(train)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
    return -log_density[place]


def compute(spacings: Spacings, parts: Split, starts_W: torch.Tensor, *, has_heights: bool) -> Baselines:
    """All baselines on windows that begin at `starts_W` (ascending); without heights those that need none."""
    s = np.asarray(spacings.s, dtype=np.float64)
    target_W = starts_W.numpy() + WIDTH - 1
    y = s[target_W]
    train = np.concatenate([s[a:b] for a, b in parts.train])
    nll = {
        "iid marginal": marginal_nll(train, y),
        "Wigner surmise": -sine_process.surmise_log_density(y),
        "sine-process gap": -sine_process.gap_log_density(y),
    }
    for gaps in (1, 8):
        past = np.stack([s[target_W - k] for k in range(gaps, -1, -1)], axis=1)
        label = f"sine process, {gaps} gap{'s' if gaps > 1 else ''}"
        nll[label] = sine_process.conditional_nll(past)
    series = linear.Series.of(spacings)
    nll |= _with_heights(series, parts, target_W) if has_heights else _lags_only(series, parts, target_W)
    facts = {
        "entropies": {
            "Wigner surmise": sine_process.surmise_entropy(),
            "sine-process gap": sine_process.gap_moments()["entropy"],
        },
        "train_marginal": {"mean": float(train.mean()), "std": float(train.std())},
    }
    return Baselines(target_W, nll, facts)


def _lags_only(series: linear.Series, parts: Split, target_W: NDArray[np.int64]) -> dict[str, Floats]:
    fit = linear.accumulate(series, AR, parts.train, degree=0, title="AR fit").solve()
    (mean,) = linear.predict([fit], series, AR, torch.from_numpy(target_W))
    return {"AR(64)": _nll(fit, mean, series, target_W)}


def _with_heights(series: linear.Series, parts: Split, target_W: NDArray[np.int64]) -> dict[str, Floats]:
    targets = torch.from_numpy(target_W)
    lags = linear.Features(lags=50)
    everywhere = linear.accumulate(series, lags, scattered(parts.train), degree=0, title="AR fit").solve()
    height = linear.accumulate(series, AR, nearest(parts.train, AR_ROWS), degree=2, title="AR fit").solve()
    primes = linear.accumulate(
        series, PRIMES, nearest(parts.train, PRIME_ROWS), degree=1, title="prime-phase fit"
    ).solve()
    (mean_50,) = linear.predict([everywhere], series, lags, targets)
    # The lags are the first features of PRIMES too, so one pass over the rows serves both.
    mean_64, mean_primes = linear.predict([height, primes], series, PRIMES, targets)
    return {
        "AR(50)": _nll(everywhere, mean_50, series, target_W),
        "AR(64), height": _nll(height, mean_64, series, target_W),
        "prime phases": _nll(primes, mean_primes, series, target_W),
    }


def _nll(fit: linear.LinearFit, mean_W: torch.Tensor, series: linear.Series, target_W: NDArray[np.int64]) -> Floats:
    return fit.nll(mean_W, series.s_N[torch.from_numpy(target_W)]).numpy()


def nearest(ranges: tuple[tuple[int, int], ...], rows: int) -> list[tuple[int, int]]:
    """The last `rows` spacings of one range; of several, as many of each one's last as make up `rows`."""
    share = rows // len(ranges)
    return [(max(first, last - share), last) for first, last in ranges]


def scattered(ranges: tuple[tuple[int, int], ...], stretch: int = 4 * linear.CHUNK, every: int = 4) -> list[Any]:
    """One stretch in four of the ranges: enough for a fit that is the same at all heights."""
    if len(ranges) > 1:
        return list(ranges)
    first, last = ranges[0]
    return [(a, min(a + stretch, last)) for a in range(first, last, every * stretch)]


def gue_figures(spacings: int = GUE_SPACINGS, seed: int = GUE_SEED) -> dict[str, Any]:
    """Autoregression and the exact 8-gap prediction on simulated GUE spacings: what zeros without primes allow."""
    data = gue_spacings(spacings, seed, size=GUE_SIZE)
    matrices = [(first, first + data.segment) for first in range(0, len(data) - data.segment + 1, data.segment)]
    half = len(matrices) // 2
    fit = linear.accumulate(linear.Series.of(data), AR, matrices[:half], degree=0, title="GUE fit").solve()
    target = np.concatenate([np.arange(first + AR.lags, last) for first, last in matrices[half:]])
    series, s = linear.Series.of(data), np.asarray(data.s, dtype=np.float64)
    (mean,) = linear.predict([fit], series, AR, torch.from_numpy(target))
    some = target[::4]
    past = np.stack([s[some - k] for k in range(8, -1, -1)], axis=1)
    rows = {
        "AR(64)": block_estimate(_nll(fit, mean, series, target), target),
        "sine process, 8 gaps": block_estimate(sine_process.conditional_nll(past), some),
    }
    return {
        "data": f"{len(data):,} simulated GUE spacings",
        "nll_last": {name: row.json() for name, row in rows.items()},
    }


def for_zeros(count: int = ZEROS, file: Path | None = None, folder: Path | None = None) -> Baselines:
    """Baselines of zeta zeros on val_tail, from the cache beside the zeros when they were computed before."""
    data = DataConfig(zeros=count, file=None if file is None else str(file), folder=str(folder or DEFAULT_FOLDER))
    dataset = load_dataset(TrainConfig(data=data), torch.device("cpu"))
    return cached(dataset, Path(data.folder))


def cached(dataset: Dataset, folder: Path) -> Baselines:
    """`compute` on the scored windows of a data set, remembered in `folder` under the digest of its spacings; computed
    again where that file is damaged.

    Data without heights (GUE, shuffled) have fewer baselines.
    """
    spacings, parts = dataset.spacings, dataset.split
    has_heights = float(np.ptp(spacings.log_height)) > 0
    digest = hashlib.blake2b(np.ascontiguousarray(spacings.s).data, digest_size=8)
    digest.update(repr((parts, STRIDE, _VERSION)).encode())
    path = folder / f"baselines_{digest.hexdigest()}.npz"
    if (known := _remembered(path)) is not None:
        return known
    starts_W = parts.starts("val_tail" if parts.val_tail else "test", STRIDE)
    found = compute(spacings, parts, starts_W, has_heights=has_heights)
    if has_heights:
        found = replace(found, facts={**found.facts, "gue": gue_figures()})
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"facts": json_module.dumps(found.facts), "spacing": found.spacing_W, **found.nll}
    np.savez_compressed(buffer, **arrays)
    make_folder(folder)
    atomic_write(path, buffer.getvalue())
    return found


def _remembered(path: Path) -> Baselines | None:
    """What `cached` left in a file; None when there is none, or one that is damaged."""
    try:
        known: dict[str, Any] = load_arrays(path)
        facts = json_module.loads(str(known.pop("facts")))
        return Baselines(known.pop("spacing"), known, facts)
    except (ArrayFileError, KeyError, ValueError):
        return None


def table(result: dict[str, Any]) -> str:
    """Aligned columns of `Baselines.json()`."""
    lines = [
        f"NLL of the next spacing in nats (lower is better) on {result['windows']:,} windows; 95 % block-bootstrap "
        "intervals",
        f"{'predictor':24}{'knows':20}{'nll_last':>26}{'minus iid marginal':>28}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['name']:24}{row['information']:20}{_cell(row['nll_last']):>26}{_cell(row['minus_iid_marginal']):>28}"
        )
    for name, value in result["entropies"].items():
        lines.append(f"entropy of the {name}: {value:.4f}")
    if gue := result.get("gue"):
        for name, value in gue["nll_last"].items():
            lines.append(f"{gue['data']}, {name}: {_cell(value)}")
    return "\n".join(lines)


def _cell(x: dict[str, Any]) -> str:
    return f"{x['value']:.4f}" if x["low"] is None else f"{x['value']:.4f} [{x['low']:.4f}, {x['high']:.4f}]"


def main(json: bool = False, data: Path | None = None) -> dict[str, Any]:
    """`rh-memory baselines`: print the table (or one JSON object) and return it. data: a file of zeros."""
    result = for_zeros(file=data).json()
    print(json_module.dumps(result) if json else table(result))
    return result
