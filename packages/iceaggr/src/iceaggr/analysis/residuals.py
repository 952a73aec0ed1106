"""The residual stream: its learned scales, its norms from layer to layer, and how full its padded dimensions are."""

from __future__ import annotations

import numpy as np

from iceaggr.analysis import figures
from iceaggr.analysis.inside import Inside
from iceaggr.analysis.study import Absent, Study
from iceaggr.models.blocks import BlockV2
from iceaggr.models.flat import FlatTransformer

SCALES = ("residual_scales", "Residual scales")
NORMS = ("norms", "Norm progression")
PADDED = ("padded_dimensions", "Padded dimensions")


def scales(model: FlatTransformer) -> Study | Absent:
    """Per layer the factors a and b of x = a x + b x0, with x0 the model's input."""
    blocks = [block for block in model.blocks if isinstance(block, BlockV2)]
    if not blocks:
        return Absent(*SCALES, "v1 adds its layers without learned factors")
    x = np.array([block.scale_x.item() for block in blocks])
    x0 = np.array([block.scale_x0.item() for block in blocks])
    layers = np.arange(len(blocks))
    return Study(
        *SCALES,
        caption="Learned factors of x = scale_x · x + scale_x0 · x0 before each layer; they start at 1 and 0.1.",
        tables={"by layer": {"layer": layers, "scale_x": x, "scale_x0": x0}},
        figure=figures.lines(
            [str(i) for i in layers], {"scale_x": x, "scale_x0": x0}, "learned factor", xlabel="layer", reference=0
        ),
        scalars={f"layer {i}, {name}": float(v[i]) for i in layers for name, v in (("scale_x", x), ("scale_x0", x0))},
    )


def norms(inside: Inside, label: str) -> Study:
    """Mean L2 norm of CLS tokens, mean and largest of DOM tokens, at every stage."""
    columns = {"CLS mean": inside.cls_norm_S, "DOM mean": inside.dom_norm_S, "DOM max": inside.dom_max_S}
    peak = int(inside.dom_max_S.argmax())
    return Study(
        *NORMS,
        caption=f"L2 norm of the residual stream after the input, each block and the final norm, {label}.",
        tables={"by stage": {"stage": np.array(inside.stages), **columns}},
        figure=figures.lines(inside.stages, columns, "L2 norm", log=True),
        scalars={
            "largest DOM norm": f"{inside.dom_max_S[peak]:.4g} ({inside.stages[peak]})",
            "CLS norm after the last block": float(inside.cls_norm_S[-2]),
            "DOM mean norm after the last block": float(inside.dom_norm_S[-2]),
        },
    )


def padded_dimensions(model: FlatTransformer, inside: Inside, label: str) -> Study | Absent:
    """Mean norm of DOM (and CLS) tokens in the dimensions that features fill, and in those padded with zeros."""
    if len(model.input.layers) > 0:
        return Absent(*PADDED, "the input projection fills all dimensions (only input = none pads with zeros)")
    if model.input.padding == 0:
        return Absent(*PADDED, "the features fill all dimensions of the model")
    names = ("DOM features", "DOM padding", "CLS features", "CLS padding")
    columns = {name: inside.occupancy_S4[:, i] for i, name in enumerate(names)}
    with np.errstate(divide="ignore"):
        ratio = inside.occupancy_S4[:, 0] / inside.occupancy_S4[:, 1]
    constant = ", but for one that starts as 1," if model.input.constant else ""
    scalars: dict[str, float | str] = {}
    for stage, value in zip(inside.stages[1:], ratio[1:], strict=True):
        scalars[f"features / padding, {stage}"] = float(value)
    return Study(
        *PADDED,
        caption=f"Mean L2 norm in the {model.cls_D.numel() - model.input.padding} dimensions that start as features "
        f"and in the {model.input.padding} that start as zeros{constant} and the ratio of the two for DOM tokens, "
        f"{label}.",
        tables={"by stage": {"stage": np.array(inside.stages), **columns, "DOM ratio": ratio}},
        figure=figures.lines(inside.stages, columns, "mean L2 norm"),
        scalars=scalars,
    )
