"""What the attention heads look at: rank correlations with properties of DOMs, CLS itself, and DOMs of many pulses.

Shape suffixes: E events, L layers, H heads, V properties, M multiplicity buckets.
"""

from __future__ import annotations

import numpy as np

from iceaggr.analysis import figures
from iceaggr.analysis.columns import PROPERTIES
from iceaggr.analysis.inside import BUCKETS, MIN_DOMS, Inside
from iceaggr.analysis.study import Study
from iceaggr.summaries import Array, Columns

SPECIALISATION = ("head_specialisation", "Head specialisation")
SELF = ("cls_self_attention", "CLS self-attention")
MULTIPLICITY = ("attention_by_multiplicity", "Attention by DOM multiplicity")


def mean_and_error(values_EX: Array) -> tuple[Array, Array, Array]:
    """Mean over the first axis without NaN, its standard error sd / sqrt(n) (NaN below two values), and n."""
    known = ~np.isnan(values_EX)
    n = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values_EX, 0).sum(0, dtype=np.float64) / n
        square = (np.where(known, values_EX - mean, 0) ** 2).sum(0, dtype=np.float64)
        return mean, np.sqrt(square / (n - 1) / n), n


def _grid(shape: tuple[int, ...]) -> Columns:
    """Columns layer and head for arrays (L, H), row by row."""
    layer, head = np.indices(shape)
    return {"layer": layer.ravel(), "head": head.ravel()}


def specialisation(inside: Inside, label: str) -> Study:
    """Per layer and head: mean over events of Spearman's rho between CLS's weights on DOMs and the DOMs' properties."""
    mean_LHV, error_LHV, n_LHV = mean_and_error(inside.rho_ELHV)
    table = _grid(mean_LHV.shape[:2])
    scalars: dict[str, float | str] = {}
    for i, name in enumerate(PROPERTIES):
        mean_LH, error_LH = mean_LHV[..., i], error_LHV[..., i]
        table |= {f"{name} rho": mean_LH.ravel(), f"{name} se": error_LH.ravel()}
        if np.isnan(mean_LH).all():
            continue
        layer, head = divmod(int(np.nanargmax(np.abs(mean_LH))), mean_LH.shape[1])
        at = f"{mean_LH[layer, head]:+.3f} ± {error_LH[layer, head]:.3f} (L{layer}.H{head})"
        scalars[f"strongest rho with {name}"] = at
    return Study(
        *SPECIALISATION,
        caption="Spearman's ρ between the attention of CLS to the DOMs of an event and their first time t1, height "
        f"z, first charge q1 and number of pulses, averaged over the events with at least {MIN_DOMS} DOMs "
        f"(se: standard error of that mean), {label}. An event whose DOMs all have one value does not count.",
        tables={"by layer and head": table},
        figure=figures.heatmaps({name: mean_LHV[..., i] for i, name in enumerate(PROPERTIES)}, "mean ρ", signed=True),
        scalars=scalars,
        arrays={"rho_LHV": mean_LHV, "se_LHV": error_LHV, "events_LHV": n_LHV},
        width="full",
    )


def self_attention(inside: Inside, label: str) -> Study:
    """Per layer and head: mean weight of CLS on itself."""
    mean_LH, error_LH, _ = mean_and_error(inside.self_ELH)
    scalars: dict[str, float | str] = {}
    for layer, row in enumerate(mean_LH):
        scalars[f"layer {layer}, mean over heads"] = float(row.mean())
    layer, head = divmod(int(mean_LH.argmax()), mean_LH.shape[1])
    scalars["largest"] = f"{mean_LH[layer, head]:.3f} (L{layer}.H{head})"
    return Study(
        *SELF,
        caption=f"Mean weight that the CLS token gives to itself, with the standard error over events, {label}.",
        tables={"by layer and head": _grid(mean_LH.shape) | {"weight": mean_LH.ravel(), "se": error_LH.ravel()}},
        figure=figures.heatmaps({"CLS on itself": mean_LH}, "mean weight", signed=False),
        scalars=scalars,
        arrays={"self_LH": mean_LH, "se_LH": error_LH},
    )


def relative_mass(mass_EXM: Array, share_EM: Array) -> tuple[Array, Array]:
    """Attention on a bucket over the share of DOMs in it, (X, M): a ratio of means over events, with standard error.

    1 for a head that looks at all DOMs alike. The error is that of the linearised ratio, sd(mass - ratio * share) /
    (mean share * sqrt(n)). NaN for buckets without DOMs.
    """
    share_M = share_EM.mean(0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_XM = mass_EXM.mean(0, dtype=np.float64) / share_M
        residual = mass_EXM - ratio_XM * share_EM[:, None, :]
        error_XM = residual.std(0, ddof=1) / (share_M * np.sqrt(len(share_EM)))
    return ratio_XM, error_XM


def multiplicity(inside: Inside, label: str) -> Study:
    """Attention of CLS on DOMs of 1, 2-3, 4-10 and more pulses, relative to how many there are."""
    n_events, layers, heads, n_buckets = inside.mass_ELHM.shape
    head_ratio, head_error = relative_mass(inside.mass_ELHM.reshape(n_events, -1, n_buckets), inside.share_EM)
    ratio_LM, error_LM = relative_mass(inside.mass_ELHM.mean(2), inside.share_EM)
    table: Columns = {"layer": np.arange(layers)}
    for i, name in enumerate(BUCKETS):
        table |= {f"{name} pulses": ratio_LM[:, i], f"{name} se": error_LM[:, i]}
    by_head = _grid((layers, heads)) | {f"{name} pulses": head_ratio[:, i] for i, name in enumerate(BUCKETS)}
    names = [f"{name} pulses" for name in BUCKETS]
    return Study(
        *MULTIPLICITY,
        caption="Attention of CLS on the DOMs with so many pulses (of its attention on all DOMs) over their share "
        f"of the event's DOMs, means over events; 1: no preference, {label}. Lines: mean over heads.",
        tables={
            "by layer": table,
            "share of all DOMs": {"pulses": np.array(list(BUCKETS)), "share": inside.dom_share_M},
            "by layer and head": by_head,
        },
        figure=figures.lines(
            [str(i) for i in range(layers)],
            {name: ratio_LM[:, i] for i, name in enumerate(names)},
            "attention / share of DOMs",
            errors={name: error_LM[:, i] for i, name in enumerate(names)},
            reference=1,
            xlabel="layer",
        ),
        scalars={f"last layer, {name}": float(ratio_LM[-1, i]) for i, name in enumerate(names)},
        arrays={
            "ratio_LHM": head_ratio.reshape(layers, heads, n_buckets),
            "se_LHM": head_error.reshape(layers, heads, n_buckets),
        },
    )
