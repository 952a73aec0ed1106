"""The direction head Linear - GELU - Linear: ranks, dead units, activation rate, and the rows that make x, y and z.

Shape suffixes: E events, U hidden units, D model width, C outputs (x, y, z; for a mixture x, y, z and
the logit w of its weight for each component).
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from iceaggr.analysis import figures
from iceaggr.analysis.rank import effective_rank, participation_ratio, singular_values
from iceaggr.analysis.study import Study
from iceaggr.models.heads import DirectionalHead
from iceaggr.summaries import Array

HEAD = ("direction_head", "Direction head")


def direction_head(head: DirectionalHead, hidden_EU: Array | None, label: str) -> Study:
    """hidden_EU: inputs of the GELU over held-out events; None leaves out what needs them."""
    fc1_UD, fc2_CU = (layer.weight.detach().double().cpu().numpy() for layer in (head.fc1, head.fc2))
    spectrum = {"fc1": singular_values(fc1_UD)}
    scalars: dict[str, float | str] = {
        "effective rank of fc1": effective_rank(spectrum["fc1"]),
        "participation ratio of fc1": participation_ratio(spectrum["fc1"]),
        "largest possible rank of fc1": float(min(fc1_UD.shape)),
    }
    if hidden_EU is not None:
        active = hidden_EU > 0
        activation_EU = gelu(hidden_EU)
        spectrum["activations"] = singular_values(activation_EU - activation_EU.mean(0))
        scalars |= {
            "effective rank of activations": effective_rank(spectrum["activations"]),
            "participation ratio of activations": participation_ratio(spectrum["activations"]),
            "dead units": float((~active.any(0)).sum()),
            "units": float(hidden_EU.shape[1]),
            "mean activation rate": float(active.mean()),
        }
    components = 1 if len(fc2_CU) == 3 else len(fc2_CU) // 4
    for k, rows_CU in enumerate(np.split(fc2_CU, components), 1):
        of = f" of component {k}" if components > 1 else ""
        norm_C = np.linalg.norm(rows_CU, axis=1)
        scalars |= {f"norm of row {axis}{of}": float(value) for axis, value in zip("xyzw", norm_C, strict=False)}
        for i, j in combinations(range(3), 2):
            cosine = float(rows_CU[i] @ rows_CU[j] / (norm_C[i] * norm_C[j]))
            scalars[f"cosine of rows {'xyz'[i]} and {'xyz'[j]}{of}"] = cosine
    n = "" if hidden_EU is None else f" over {len(hidden_EU):,} held-out events, {label}"
    return Study(
        *HEAD,
        caption="Effective rank exp(H(s / Σs)) and participation ratio (Σs²)² / Σs⁴ of the singular values s of the "
        f"first matrix and of the centred activations; a unit is dead that is never above 0{n}. Rows of the second "
        "matrix make x, y and z.",
        tables={"values": {"quantity": np.array(list(scalars)), "value": np.array(list(scalars.values()))}},
        figure=figures.spectra({name: s[s > 0] / s[0] for name, s in spectrum.items()}, "singular value / largest"),
        scalars=scalars,
        arrays={f"singular_values_{name}": values for name, values in spectrum.items()}
        | ({} if hidden_EU is None else {"activation_rate_U": (hidden_EU > 0).mean(0)}),
    )


def gelu(x: Array) -> Array:
    """The head's own activation, on a numpy array."""
    y: Tensor = nn.functional.gelu(torch.from_numpy(x))
    return y.numpy()
