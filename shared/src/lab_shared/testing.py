"""Test helpers that ship as library code: parity with a slow reference, equivariance, golden losses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray | float


def assert_parity(fast: ArrayLike, reference: ArrayLike, *, atol: float, rtol: float = 0.0, name: str = "fast") -> None:
    """Raise AssertionError unless |fast - reference| <= atol + rtol |reference| everywhere, in float64.

    Shapes must be equal (no broadcasting). Infinities must agree in place and sign; a NaN on either side
    fails. The message tells how many elements are outside, the largest excess, where it is and both values
    there.
    """
    a, b = _float64(fast), _float64(reference)
    if a.shape != b.shape:
        raise AssertionError(f"{name}: shape {tuple(a.shape)}, the reference has {tuple(b.shape)}")
    if a.numel() == 0:
        return
    difference = (a - b).abs()
    # inf - inf is NaN: equal infinities are agreement, every other NaN is not.
    difference = torch.where(a == b, torch.zeros_like(difference), difference).nan_to_num(nan=math.inf)
    excess = difference - (atol + rtol * b.abs()).nan_to_num(nan=0.0, posinf=0.0)
    outside = int((excess > 0).sum())
    if outside:
        worst = int(excess.argmax())
        index = tuple(int(i) for i in np.unravel_index(worst, a.shape))
        raise AssertionError(
            f"{name}: {outside} of {a.numel()} elements outside atol={atol:g}, rtol={rtol:g}; "
            f"the worst at {list(index)}: {a.flatten()[worst].item():.9g} against "
            f"{b.flatten()[worst].item():.9g} (difference {difference.flatten()[worst].item():.3g}, "
            f"median {difference.median().item():.3g})"
        )


def assert_equivariant(
    function: Callable[[Any], ArrayLike],
    x: Any,
    transform_input: Callable[[Any], Any],
    transform_output: Callable[[ArrayLike], ArrayLike],
    *,
    atol: float,
    rtol: float = 0.0,
    name: str = "function",
) -> None:
    """Raise AssertionError unless function(transform_input(x)) equals transform_output(function(x)).

    Invariance is the case `transform_output = lambda y: y`. Comparison and message as in assert_parity.
    """
    assert_parity(
        function(transform_input(x)),
        transform_output(function(x)),
        atol=atol,
        rtol=rtol,
        name=f"{name}(transformed input) against transformed {name}(input)",
    )


def golden(path: str | Path, values: Sequence[float], *, rtol: float = 1e-7) -> None:
    """Compare `values` (the losses of a few fp32 steps on CPU) with the list of numbers committed at `path`.

    A refactor must not move them; a change that means to runs the tests with LAB_UPDATE_GOLDEN=1, which
    rewrites a file whose values moved by more than `rtol`, and the diff is reviewed. A missing file fails:
    nothing is ever created without that variable.

    Raises AssertionError naming the first value that moved.
    """
    path = Path(path)
    measured = [float(v) for v in values]
    if not measured or not all(math.isfinite(v) for v in measured):
        raise AssertionError(f"golden values must be finite and at least one, got {measured}")
    difference = _moved(path, measured, rtol)
    if difference is None:
        return
    if os.environ.get("LAB_UPDATE_GOLDEN") != "1":
        raise AssertionError(difference)
    path.parent.mkdir(parents=True, exist_ok=True)
    one_per_line = ",\n".join(f"  {v!r}" for v in measured)  # for readable diffs
    path.write_text(f"[\n{one_per_line}\n]\n")


def _moved(path: Path, measured: Sequence[float], rtol: float) -> str | None:
    """How the measured values differ from those of the file; None where they agree."""
    if not path.exists():
        return f"no golden file {path}: create it with LAB_UPDATE_GOLDEN=1 and commit it"
    expected = json.loads(path.read_text())
    if len(expected) != len(measured):
        return f"{path}: {len(expected)} golden values, {len(measured)} measured"
    for i, (want, got) in enumerate(zip(expected, measured, strict=True)):
        if abs(got - want) > rtol * abs(want):
            moved = abs(got - want) / abs(want) if want else math.inf
            return (
                f"{path}: value {i} is {got!r}, golden {want!r} "
                f"(relative change {moved:.2g}, allowed {rtol:g}). "
                "If the change is meant, rewrite the file with LAB_UPDATE_GOLDEN=1 and review the diff."
            )
    return None


def _float64(x: ArrayLike) -> Tensor:
    return torch.as_tensor(x).detach().to(device="cpu", dtype=torch.float64)
