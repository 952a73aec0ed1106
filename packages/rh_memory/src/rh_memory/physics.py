"""Statistics of the zeros themselves, each beside what random matrices and the primes predict.

Every function returns columns of equal length for one figure: measured values, intervals where they are cheap, theory.
u are unfolded heights (mean gap 1), gamma heights, D the density of zeros. Intervals are 95 % and resample blocks.
"""

from __future__ import annotations

import io
import json as json_module
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import load_arrays
from lab_shared.files import atomic_write
from lab_shared.runs import pick_device
from numpy.typing import NDArray

from rh_memory import arithmetic, sine_process
from rh_memory.linear import prime_powers
from rh_memory.scores import block_estimate

Floats = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]
COMPOSITES = (6, 10, 12, 14, 15, 18, 20, 21, 22, 24, 26, 28, 30)
"""Numbers with two different prime factors: the explicit formula has no line at their logarithms."""
LOCAL = 200_000
SEGMENT = 2048.0
"""Length in t of the pieces a spectrum is averaged over: lines are .003 wide in log q."""
_SAMPLES = 32  # per unit of t, so that what lies above the highest frequency hardly folds back


def unfolded(gamma_N: Floats) -> Floats:
    """u = (gamma / 2 pi) log(gamma / 2 pi e), less its first value; differences are the spacings."""
    u = gamma_N / (2 * math.pi) * np.log(gamma_N / (2 * math.pi * math.e))
    return u - u[0]


def gap_histogram(s_N: Floats, bins: int = 70, longest: float = 3.5) -> Columns:
    """Density of the spacings, with the exact sine-process gap and Wigner's surmise at the bin centres."""
    edges = np.linspace(0, longest, bins + 1)
    counts, _ = np.histogram(s_N, edges)
    centre, width = (edges[1:] + edges[:-1]) / 2, longest / bins
    share = counts / len(s_N)
    # Multinomial error: spacings are anti-correlated, so this is an upper bound.
    error = np.sqrt(share * (1 - share) / len(s_N)) / width
    return {
        "s": centre,
        "density": share / width,
        "standard error": error,
        "sine process": np.exp(sine_process.gap_log_density(centre)),
        "surmise": np.exp(sine_process.surmise_log_density(centre)),
    }


def number_variance(u_N: Floats, height: float | None, lengths: Floats | None = None) -> Columns:
    """Mean of (points in [u, u + L) minus L)^2 over windows half a mean gap apart.

    height: adds the prediction with primes at this height; None for data without (GUE).
    """
    lengths = np.concatenate([np.arange(0.1, 2, 0.1), np.arange(2, 60, 0.75)]) if lengths is None else lengths
    start = np.arange(u_N[0], u_N[-1] - lengths.max(), 0.5)
    before = np.searchsorted(u_N, start)
    block = max(256, len(u_N) // 64)
    rows = []
    for L in lengths:
        squared = (np.searchsorted(u_N, start + L) - before - L) ** 2
        rows.append(block_estimate(squared, start.astype(np.int64), block=block))
    columns: Columns = {
        "L": lengths,
        "variance": np.array([row.value for row in rows]),
        "low": np.array([row.low for row in rows], dtype=np.float64),
        "high": np.array([row.high for row in rows], dtype=np.float64),
        "GUE": sine_process.number_variance(lengths),
    }
    if height is not None:
        columns["primes"] = arithmetic.number_variance(lengths, height)
    return columns


def _distances(x_N: Floats, longest: float, bins: int) -> Floats:
    """Counts of the distances x_j - x_i, j > i, up to `longest` in equal bins."""
    counts = np.zeros(bins)
    for lag in range(1, len(x_N)):
        d = x_N[lag:] - x_N[:-lag]
        d = d[d < longest]
        if d.size == 0:
            break
        counts += np.bincount((d * (bins / longest)).astype(np.int64), minlength=bins)[:bins]
    return counts


def pair_correlation_near(u_N: Floats, longest: float = 4.0, bins: int = 160) -> Columns:
    """Pair correlation of unfolded points, beside 1 - sinc^2."""
    r = (np.arange(bins) + 0.5) * longest / bins
    counts = _distances(u_N, longest, bins)
    expected = (u_N[-1] - u_N[0] - r) * longest / bins
    return {"r": r, "pairs": counts / expected, "GUE": sine_process.pair_correlation(r)}


def pair_correlation_far(gamma_N: Floats, longest: float = 34.0, bins: int = 680) -> Columns:
    """Pair correlation against the distance in height, beside the prediction with primes: it dips at 14.13, 21.02, ...

    The sample should span little of log T; its density is taken as constant at its middle.
    """
    width = longest / bins
    e: Floats = np.asarray((np.arange(bins) + 0.5) * width, dtype=np.float64)
    span, n = gamma_N[-1] - gamma_N[0], len(gamma_N)
    expected = n**2 / span * (1 - e / span) * width
    middle = float(gamma_N[n // 2])
    return {
        "distance": e,
        "pairs": _distances(gamma_N, longest, bins) / expected,
        "standard error": 1 / np.sqrt(expected),
        "primes": arithmetic.pair_correlation(e, middle),
        "GUE": sine_process.pair_correlation(e * n / span),
    }


def form_factor(gamma_N: Floats, highest: float | None = None) -> Columns:
    """K(omega) = mean over segments of |sum_gamma h(gamma) e^{i omega gamma}|^2 / sum h^2, with Hann tapers h.

    Independent points give 1, GUE min(tau, 1) at tau = omega / log(T / 2 pi), the primes lines at omega = log q.
    """
    log_t = math.log(float(gamma_N[len(gamma_N) // 2]) / (2 * math.pi))
    highest = 1.2 * log_t if highest is None else highest
    samples = int(SEGMENT * _SAMPLES)
    segments = int((gamma_N[-1] - gamma_N[0]) / SEGMENT)
    if segments < 1:
        raise ValueError(f"zeros over {gamma_N[-1] - gamma_N[0]:.0f} in height: a spectrum needs {SEGMENT:.0f}")
    t = gamma_N - gamma_N[0]
    taper = np.hanning(samples)
    power = np.zeros(samples // 2 + 1)
    for k in range(segments):
        a, b = np.searchsorted(t, [k * SEGMENT, (k + 1) * SEGMENT])
        place = np.minimum(((t[a:b] - k * SEGMENT) * _SAMPLES).astype(np.int64), samples - 1)
        signal = np.bincount(place, minlength=samples) - (b - a) / samples
        found = np.fft.rfft(signal * taper)
        power += np.abs(found) ** 2 / (taper[place] ** 2).sum()
    omega = 2 * math.pi * np.arange(len(power)) / SEGMENT
    kept = (omega > 4 * omega[1]) & (omega < highest)
    omega, power = omega[kept], power[kept] / segments
    power /= np.sinc(omega / (2 * math.pi * _SAMPLES)) ** 2  # points were moved to a grid
    tau = omega / log_t
    return {"omega": omega, "tau": tau, "K": power, "GUE": np.minimum(tau, 1.0)}


def form_factor_peaks(columns: Columns, limit: int = 60) -> Columns:
    """Power at log n over the median power nearby, for prime powers and, as a control, the other n <= limit."""
    omega, power = columns["omega"], columns["K"]
    step = omega[1] - omega[0]
    powers = {q for q, _, _ in prime_powers(limit)}
    rows = []
    for n in range(2, limit + 1):
        at = round((math.log(n) - omega[0]) / step)
        if not 40 <= at < len(omega) - 40:
            continue
        around = np.concatenate([power[at - 40 : at - 3], power[at + 4 : at + 41]])
        rows.append((n, n in powers, power[at - 1 : at + 2].max() / np.median(around)))
    table = np.array(rows, dtype=np.float64)
    return {
        "n": table[:, 0].astype(np.int64),
        "prime power": table[:, 1].astype(bool),
        "peak over background": table[:, 2],
    }


def mid_gap(gamma_N: Floats) -> Floats:
    """Where the middle of the gap that begins at gamma is expected: gamma + 1 / (2 D)."""
    return gamma_N + math.pi / np.log(gamma_N / (2 * math.pi))


def line_fit(values_N: Floats, gamma_N: Floats, spacing_N: NDArray[np.int64], omegas: Sequence[float]) -> Columns:
    """Joint least squares values ~ c_0 + sum_w a_w cos(w m) + b_w sin(w m), m the expected middle of the gap.

    gamma_N: height of the zero at which the gap in question begins. Standard errors are cluster-robust over blocks of
    256 spacings. Columns: omega, cos, sin, and their standard errors.
    """
    phase_QN = np.asarray(omegas)[:, None] * mid_gap(gamma_N)
    x_CN = np.concatenate([np.ones((1, len(values_N))), np.cos(phase_QN), np.sin(phase_QN)])
    inverse = np.linalg.inv(x_CN @ x_CN.T)
    beta = inverse @ (x_CN @ values_N)
    influence_CN = (inverse @ x_CN) * (values_N - beta @ x_CN)
    _, member = np.unique(spacing_N // 256, return_inverse=True)
    blocks = np.stack([np.bincount(member, weights=row) for row in influence_CN])
    error = np.sqrt((blocks**2).sum(axis=1))
    q = len(omegas)
    return {
        "omega": np.asarray(omegas, dtype=np.float64),
        "cos": beta[1 : q + 1],
        "cos error": error[1 : q + 1],
        "sin": beta[q + 1 :],
        "sin error": error[q + 1 :],
    }


def of_zeros(s_N: Floats, gamma_N: Floats) -> dict[str, Columns]:
    """Every figure about the zeros themselves, from consecutive spacings and the heights they end at.

    What is compared with a prediction at one height is taken from the last LOCAL zeros only.
    """
    u_N, local_N = unfolded(gamma_N), gamma_N[-LOCAL:]
    spectrum = form_factor(gamma_N)
    return {
        "spacings": gap_histogram(s_N),
        "number_variance": number_variance(u_N[-LOCAL:], float(np.median(local_N))),
        "pair_correlation_near": pair_correlation_near(u_N),
        "pair_correlation_far": pair_correlation_far(local_N),
        "form_factor": spectrum,
        "form_factor_peaks": form_factor_peaks(spectrum),
    }


def save(path: Path, figures: dict[str, Columns]) -> None:
    """Write all columns to one .npz, as "figure/column". Raises StorageError."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"{name}/{key}": x for name, columns in figures.items() for key, x in columns.items()}
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def read(path: Path) -> dict[str, Columns]:
    """What `save` wrote. Raises ArrayFileError."""
    figures: dict[str, Columns] = {}
    for name, values in load_arrays(path).items():
        figure, _, column = name.partition("/")
        figures.setdefault(figure, {})[column] = values
    return figures


def summary_of(figures: dict[str, Columns], height: float) -> dict[str, Any]:
    """A few numbers for a table: where the number variance stands at L = 20, how sharp the lines are."""
    variance, peaks = figures["number_variance"], figures["form_factor_peaks"]
    at = int(np.argmin(np.abs(variance["L"] - 20)))
    prime = peaks["prime power"]
    return {
        "height": height,
        "saturation_length": arithmetic.saturation_length(height),
        "number_variance_near_20": {
            name: float(variance[name][at]) for name in ("L", "variance", "low", "high", "GUE", "primes")
        },
        "peak_over_background": {
            "prime powers, median": float(np.median(peaks["peak over background"][prime])),
            "other numbers, median": float(np.median(peaks["peak over background"][~prime])),
        },
    }


def main(
    run_folder: Path | None = None,
    data: Path | None = None,
    json: bool = False,
    device: str | None = None,
    zeros: int | None = None,
) -> dict[str, Any]:
    """Statistics of the last `zeros` zeros (default: all); with a run also the lines in its predictions.

    With a run, writes RUN/physics.json and RUN/physics.npz for its report; needs RUN/predictions.npz, so evaluate
    first. Explicit-formula models are also asked what each frequency is worth. Prints a summary, or JSON.
    """
    from rh_memory import physics_run

    if run_folder is None:
        figures, result = physics_run.without_run(data, zeros)
    else:
        figures, result = physics_run.with_run(Path(run_folder), data, zeros, pick_device(device))
        save(Path(run_folder) / "physics.npz", figures)
        atomic_write(Path(run_folder) / "physics.json", json_module.dumps(result, indent=1) + "\n")
    print(json_module.dumps(result) if json else physics_run.text(result))
    return result
