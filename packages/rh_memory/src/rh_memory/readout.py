"""Which primes has a model learned? Read from its predictions, and from what it loses without a frequency.

The explicit formula makes the gap that begins at the zero gamma, with its middle expected at m, a sum of lines

    s = 1 + sum_q a_q cos(m log q) + ...,   a_q = A sin(log q / 2D) / (r q^b),   A = 2 / pi, b = 1/2, q = p^r.

A joint fit of such lines to the true spacings, to a model's predicted means and to what is left between them shows
line by line what the model predicts; fitting A and b to its lines reads the law off the model. Controls: random
frequencies, which show nothing, and composite numbers, where only second-order lines (log 6 = log 2 + log 3) remain.
The law holds to first order: taken from the zeros themselves, b is nearer .6, which a model's b should match.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from lab_shared.progress import Counter
from numpy.typing import NDArray

from rh_memory import arithmetic, physics
from rh_memory.data.unfold import Spacings
from rh_memory.diagnostics.golden import Golden, window_nll
from rh_memory.linear import prime_powers
from rh_memory.physics import COMPOSITES, Columns

LIMIT = 128
RANDOM = 12
_CLEAR = 3.0  # standard errors a line must stand out by to take part in a fit


def frequencies(seed: int = 0) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """(kinds, labels, omegas) of the prime powers up to LIMIT, composites, and random frequencies in between."""
    powers = [q for q, _, _ in prime_powers(LIMIT)]
    rng = np.random.default_rng(seed)
    drawn: list[float] = []
    while len(drawn) < RANDOM:
        omega = rng.uniform(math.log(2), math.log(LIMIT))
        # Not on a line: a few thousandths is what the fit resolves.
        if min(abs(omega - math.log(n)) for n in (*powers, *COMPOSITES)) > 0.004:
            drawn.append(omega)
    kinds = ["prime power"] * len(powers) + ["composite"] * len(COMPOSITES) + ["random"] * RANDOM
    labels = [str(n) for n in (*powers, *COMPOSITES)] + [f"exp({x:.3f})" for x in sorted(drawn)]
    omegas = np.array([math.log(n) for n in (*powers, *COMPOSITES)] + sorted(drawn))
    return kinds, labels, omegas


def unknowns() -> int:
    """What `lines` fits jointly: a constant, and a cosine and a sine for each frequency."""
    return 1 + 2 * len(frequencies()[0])


def lines(spacings: Spacings, spacing_W: NDArray[np.int64], mean_W: NDArray[np.float64]) -> Columns:
    """Lines in the true spacings, the predicted means and the residuals, with the explicit formula's amplitudes.

    spacing_W: indices of the predicted spacings; mean_W: their predicted means. The columns "... sin" should be 0.
    """
    kinds, labels, omegas = frequencies()
    before = spacing_W - 1  # the zero at which the gap begins ends the gap before
    gamma = np.asarray(spacings.centre)[before] + np.asarray(spacings.offset)[before]
    true = np.asarray(spacings.s, dtype=np.float64)[spacing_W]
    height = float(np.median(gamma))
    orders = {q: r for q, _, r in prime_powers(LIMIT)}
    theory = [
        arithmetic.line_amplitude(int(label), orders[int(label)], height) if kind == "prime power" else 0.0
        for kind, label in zip(kinds, labels, strict=True)
    ]
    columns: Columns = {"kind": np.array(kinds), "q": np.array(labels), "omega": omegas, "theory": np.array(theory)}
    for name, values in (("zeros", true), ("model", mean_W), ("residual", true - mean_W)):
        found = physics.line_fit(values, gamma, spacing_W, omegas.tolist())
        for part in ("cos", "cos error", "sin", "sin error"):
            columns[f"{name} {part}"] = found[part]
    return columns


def learned(columns: Columns) -> dict[str, Any]:
    """Share of the prime lines' power that the model predicts, and what the controls show.

    share of power: 1 - |residual line|^2 / |line in the zeros|^2, over the prime powers whose line stands out; None
    where none does, as among few zeros.
    """

    def power(name: str) -> NDArray[np.float64]:
        noise = columns[f"{name} cos error"] ** 2 + columns[f"{name} sin error"] ** 2
        return np.maximum(columns[f"{name} cos"] ** 2 + columns[f"{name} sin"] ** 2 - noise, 0)

    prime = columns["kind"] == "prime power"
    clear = prime & (columns["zeros cos"] > _CLEAR * columns["zeros cos error"])
    share = 1 - power("residual")[clear] / power("zeros")[clear]
    whole = float(power("zeros")[clear].sum())
    names = columns["q"][clear]
    z_score = np.abs(columns["model cos"] / np.maximum(columns["model cos error"], 1e-12))
    return {
        "lines_that_stand_out": int(clear.sum()),
        "power_predicted": 1 - float(power("residual")[clear].sum()) / whole if whole else None,
        "learned": [str(q) for q, x in zip(names, share, strict=True) if x > 0.5],
        "not_learned": [str(q) for q, x in zip(names, share, strict=True) if x <= 0.5],
        "median_z": {
            kind: float(np.median(z_score[columns["kind"] == kind])) for kind in ("prime power", "composite", "random")
        },
    }


def law(columns: Columns, height: float, name: str) -> dict[str, Any]:
    """A and b of a_p = A sin(log p / 2D) / p^b, from the primes' lines in `name` ("zeros" or "model").

    Weighted least squares of log(a_p / sin) on log p over the lines that stand out; 95 % intervals with the scatter of
    the points. Powers p^r take no part; `powers` is the mean of their lines over the law times 1 / r.
    """
    powers = {str(q): (q, r) for q, _, r in prime_powers(LIMIT)}
    half_gap = math.pi / math.log(height / (2 * math.pi))
    rows: list[tuple[float, float, float, int]] = []
    rest: list[tuple[float, float, float, int]] = []
    for label, a, error in zip(columns["q"], columns[f"{name} cos"], columns[f"{name} cos error"], strict=True):
        q, r = powers.get(str(label), (0, 0))
        if q and a > _CLEAR * error:
            (rows if r == 1 else rest).append((math.log(q), a / math.sin(half_gap * math.log(q)), a / error, r))
    if len(rows) < 3:
        return {"lines": len(rows), "exponent": None, "prefactor": None, "powers": None}
    x, ratio, weight, _ = np.array(rows).T
    design = np.stack([np.ones_like(x), -x], axis=1)
    normal = np.linalg.inv(design.T @ (weight[:, None] ** 2 * design))
    solution = normal @ (design.T @ (weight**2 * np.log(ratio)))
    residual = weight * (np.log(ratio) - design @ solution)
    scatter = max(1.0, float(residual @ residual) / (len(rows) - 2))
    half = 1.96 * np.sqrt(np.diag(normal) * scatter)
    prefactor = [math.exp(solution[0] + d * half[0]) for d in (0, -1, 1)]
    expected = [math.exp(solution[0] - solution[1] * row[0]) / row[3] for row in rest]
    return {
        "lines": len(rows),
        "exponent": {
            "value": float(solution[1]),
            "low": float(solution[1] - half[1]),
            "high": float(solution[1] + half[1]),
        },
        "prefactor": dict(zip(("value", "low", "high"), prefactor, strict=True)),
        "powers": float(np.mean([row[1] / e for row, e in zip(rest, expected, strict=True)])) if rest else None,
    }


@torch.no_grad()
def frequency_use(model: Any, golden: Golden) -> Columns | None:
    """Cost in nats of silencing each frequency of an explicit-formula model in all layers; None for other models.

    The pair of value channels that turns at the frequency is set to zero. Columns: frequency, cost, low, high.
    """
    turns_HF = model.backbone.turns_per_gamma_HF
    if turns_HF.numel() == 0:
        return None
    heads, pairs = turns_HF.shape
    base_W = window_nll(model, golden)
    rows = []
    with Counter("silencing", heads * pairs, "frequencies") as counter:
        for h in range(heads):
            for f in range(pairs):
                first = (h * pairs + f) * 2
                saved = []
                for block in model.backbone.blocks:
                    v = block.attention.v
                    saved.append((v.weight[first : first + 2].clone(), v.bias[first : first + 2].clone()))
                    v.weight[first : first + 2] = 0
                    v.bias[first : first + 2] = 0
                cost = golden.estimate(window_nll(model, golden) - base_W)
                for block, (weight, bias) in zip(model.backbone.blocks, saved, strict=True):
                    block.attention.v.weight[first : first + 2] = weight
                    block.attention.v.bias[first : first + 2] = bias
                rows.append((float(turns_HF[h, f]) * 2 * math.pi, *cost))
                counter.show(len(rows))
    table = np.array(sorted(rows), dtype=np.float64)
    return dict(zip(("frequency", "cost", "low", "high"), table.T, strict=True))
