"""Which input features the model uses: norms of the input projection's columns, and permutation importance.

Shape suffixes: T tokens of a batch, R DOM tokens of all batches, F features, E events.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lab_shared.progress import Counter
from lab_shared.stats import bca_interval
from torch import Tensor, nn

from iceaggr.analysis import figures
from iceaggr.analysis.columns import Columns, permuted_groups
from iceaggr.analysis.study import Absent, Study
from iceaggr.config import TrainConfig
from iceaggr.data.pulses import TokenBatch
from iceaggr.losses import mean_vector
from iceaggr.metrics import opening_angle_deg
from iceaggr.models.flat import FlatTransformer
from iceaggr.predict import token_mask
from iceaggr.summaries import Array

NORMS = ("feature_norms", "Feature importance: column norms")
PERMUTATION = ("feature_permutation", "Feature importance: permutation")


def column_norms(model: FlatTransformer, columns: Columns, deviation_F: Array) -> Study | Absent:
    """L2 norm of each column of the (first) input projection, with shares by type and norms by pulse slot.

    A type's share is its part of the sum of all norms; a slot's norm runs over its three columns. Beside it the norm
    times the feature's standard deviation over DOM tokens: a feature of small numbers needs a large column.
    """
    if len(model.input.layers) == 0:
        return Absent(*NORMS, "input = none has no projection: the features themselves are the residual stream")
    weight = model.input.layers[0].weight
    assert isinstance(weight, Tensor)
    norm_F = weight.detach().double().norm(dim=0).cpu().numpy()
    felt_F = norm_F * deviation_F
    kinds = list(columns.types)
    share = np.array([norm_F[columns.types[kind]].sum() for kind in kinds]) / norm_F.sum()
    felt_share = np.array([felt_F[columns.types[kind]].sum() for kind in kinds]) / felt_F.sum()
    slot = np.array([np.linalg.norm(norm_F[members]) for members in columns.slots.values()])
    order = np.argsort(-norm_F)
    scalars: dict[str, float | str] = {f"share of {kind}": float(x) for kind, x in zip(kinds, share, strict=True)}
    scalars |= {f"{name} norm": float(x) for name, x in zip(list(columns.slots)[:2], slot, strict=False)}
    tables = {
        "by type": {"type": np.array(kinds), "share": share, "share of norm x deviation": felt_share},
        "by feature": {
            "feature": np.array(columns.names)[order],
            "norm": norm_F[order],
            "norm x deviation": felt_F[order],
        },
    }
    if columns.slots:
        tables["by pulse slot"] = {"slot": np.array(list(columns.slots)), "norm": slot}
    shown = order[:25]
    return Study(
        *NORMS,
        caption="L2 norm of each column of the input projection. A type's share is its part of the sum of all norms, a "
        "slot's norm runs over its three columns; deviation is a feature's standard deviation over DOM tokens."
        + ("" if columns.slots else " Summary features have no pulse slots."),
        tables=tables,
        figure=figures.bars([columns.names[i] for i in shown], norm_F[shown], "L2 norm of the column"),
        scalars=scalars,
        arrays={"norm_F": norm_F, "deviation_F": deviation_F},
    )


def dom_rows(batch: TokenBatch) -> Tensor:
    """(R,) rows of the DOM tokens of a batch."""
    is_dom_T = torch.ones(batch.n_tokens, dtype=torch.bool, device=batch.cls_E.device)
    is_dom_T[batch.cls_E[: batch.n_events]] = False
    return is_dom_T.nonzero()[:, 0]


def deviations(batches: Sequence[TokenBatch]) -> Array:
    """(F,) standard deviation of each feature over the DOM tokens."""
    return torch.cat([batch.features_TF[dom_rows(batch)] for batch in batches]).double().std(0).cpu().numpy()


@torch.inference_mode()
def permuted_errors(
    model: nn.Module, batches: Sequence[TokenBatch], groups: dict[str, list[int]], columns: Columns, *, seed: int
) -> tuple[Array, dict[str, Array]]:
    """Errors (E,) in degrees, as they are and with each group of columns shuffled, events in the order of the batches.

    A group's columns move together, between all DOM tokens of all events; those with one value per event move between
    events, so that they stay the same for all DOMs of one.
    """
    row_R = [dom_rows(batch) for batch in batches]
    features_RF = torch.cat([batch.features_TF[rows] for batch, rows in zip(batches, row_R, strict=True)])
    doms_E = torch.cat([batch.offsets_E1[: batch.n_events + 1].diff() - 1 for batch in batches]).long()
    event_R = torch.repeat_interleave(torch.arange(len(doms_E), device=doms_E.device), doms_E)
    first_E = doms_E.cumsum(0) - doms_E
    generator = torch.Generator().manual_seed(seed)

    def error(changed_RF: Tensor) -> Array:
        errors, start = [], 0
        for batch, rows in zip(batches, row_R, strict=True):
            features_TF = batch.features_TF.index_copy(0, rows, changed_RF[start : start + len(rows)])
            start += len(rows)
            v_E3 = mean_vector(model(features_TF, token_mask(batch), batch.cls_E)[: batch.n_events])
            assert batch.target_E3 is not None  # the sample is labelled
            errors.append(opening_angle_deg(v_E3, batch.target_E3[: batch.n_events]).cpu().numpy())
        return np.concatenate(errors)

    with Counter("permuting features", len(groups) + 1, "passes") as counter:
        whole = error(features_RF)
        shuffled: dict[str, Array] = {}
        for done, (name, members) in enumerate(groups.items(), 1):
            counter.show(done)
            other_R = torch.randperm(len(event_R), generator=generator).to(event_R.device)
            other_E = torch.randperm(len(doms_E), generator=generator).to(event_R.device)
            changed_RF = features_RF.clone()
            for i in members:
                source_R = first_E[other_E[event_R]] if i in columns.event_level else other_R
                changed_RF[:, i] = features_RF[source_R, i]
            shuffled[name] = error(changed_RF)
        counter.show(len(groups) + 1)
    return whole, shuffled


def permutation(
    model: nn.Module, batches: Sequence[TokenBatch], config: TrainConfig, columns: Columns, label: str
) -> Study:
    """Increase of the mean opening angle when features are shuffled, with the bootstrap interval of the paired mean."""
    groups = permuted_groups(columns)
    whole, shuffled = permuted_errors(model, batches, groups, columns, seed=config.seed)
    increase = {name: error - whole for name, error in shuffled.items()}
    mean = np.array([values.mean() for values in increase.values()])
    bounds = np.array([bca_interval(values) for values in increase.values()])
    names = list(groups)
    return Study(
        *PERMUTATION,
        caption=f"Increase of the mean opening angle over {whole.mean():.1f}° when features are shuffled among all "
        f"DOMs of {whole.size:,} held-out events (those with one value per event among the events), {label}; 95% "
        "intervals of the paired mean over events, each looked at once and in float32. Columns of a group move "
        "together. The model is not trained again: a feature that another could replace counts all the same.",
        tables={
            "in degrees": {
                "shuffled": np.array(names),
                "increase": mean,
                "low": bounds[:, 0],
                "high": bounds[:, 1],
            }
        },
        figure=figures.bars(names, mean, "increase of the mean opening angle (°)", low=bounds[:, 0], high=bounds[:, 1]),
        scalars={f"{name} (°)": float(value) for name, value in zip(names, mean, strict=True)},
        arrays={"error_deg": whole, "permuted_error_deg": np.stack(list(shuffled.values()))},
    )
