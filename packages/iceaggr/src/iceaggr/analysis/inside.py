"""One walk through a flat model over many events, keeping what the analyses of its inside need.

Everything is computed in float32, whatever the run was trained in. Attention weights are computed exactly, per event,
for the CLS query only: E x H x (DOMs of the event) numbers and never T x T.

Shape suffixes: T tokens of a batch, R the DOM tokens among them, E events, D model width, H heads, K width of one
head, L layers, V properties of a DOM, M multiplicity buckets, S stages, U hidden units of the direction head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from lab_shared.progress import Counter
from torch import Tensor, nn

from iceaggr.analysis.columns import PROPERTIES, columns_of, pulses_of_doms
from iceaggr.analysis.ranks import ranks_within, spearman_within
from iceaggr.config import TrainConfig
from iceaggr.data.batches import one_pass
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.pulses import TokenBatch
from iceaggr.data.schema import N_SENSORS
from iceaggr.models.blocks import BlockV1, BlockV2, SelfAttention
from iceaggr.models.flat import FlatTransformer
from iceaggr.predict import token_budget, token_mask
from iceaggr.summaries import Array

MIN_DOMS = 8
"""Events with fewer DOMs are left out of rank correlations."""
BUCKETS = {"1": 1, "2-3": 2, "4-10": 4, ">10": 11}
"""Pulses of a DOM, with the smallest number of each bucket."""


class Stage(NamedTuple):
    """The residual stream at one point of the model."""

    name: str
    x_TD: Tensor
    attention: SelfAttention | None
    """Of the block that has just run, with what entered it."""
    attended_TD: Tensor | None


@dataclass(frozen=True)
class Inside:
    """Per-event arrays and sums of one walk. NaN: not defined for the event (fewer than MIN_DOMS, all values equal)."""

    stages: list[str]
    cls_norm_S: Array  # mean over events
    dom_norm_S: Array  # mean over all DOM tokens
    dom_max_S: Array
    occupancy_S4: Array  # mean norm of DOM tokens in feature and in padded dimensions, then the same of CLS tokens
    self_ELH: Array  # weight of CLS on itself
    rho_ELHV: Array  # Spearman's rho of the weights on the DOMs with PROPERTIES
    mass_ELHM: Array  # share of the weight on DOMs that is on a bucket
    share_EM: Array  # share of the event's DOMs that are in a bucket
    dom_share_M: Array  # the same of all DOMs together
    hidden_EU: Array  # input of the direction head's GELU


def token_batches(cache: EventCache, index_N: np.ndarray, config: TrainConfig, tables: Tables) -> Iterator[TokenBatch]:
    """The events in batches as for a prediction."""
    budget = max(token_budget(config, tables.device), N_SENSORS + 1)
    return one_pass(cache, index_N, config.model, tables, token_budget=budget, static=tables.device.type == "cuda")


def walk(model: FlatTransformer, batch: TokenBatch) -> Iterator[Stage]:
    """The input, every block and the final norm, all rows of each."""
    mask = token_mask(batch)
    x0_TD = x_TD = model.embed(batch.features_TF, mask)
    place_T5 = model.place(batch.features_TF, mask)
    yield Stage("input", x_TD, None, None)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, BlockV1 | BlockV2)
        entered: list[Tensor] = []
        handle = block.attention.register_forward_pre_hook(lambda _, args, entered=entered: entered.append(args[0]))
        try:
            x_TD = block(x_TD, x0_TD, mask, place_T5=place_T5)
        finally:
            handle.remove()
        yield Stage(f"block {i}", x_TD, block.attention, entered[0])
    yield Stage("final norm", model.norm(x_TD), None, None)


def cls_attention(attention: SelfAttention, x_TD: Tensor, cls_E: Tensor, event_T: Tensor) -> Tensor:
    """Weights of each event's CLS query on the tokens of its event, (T, H): softmax(q . k / sqrt(K)) per event.

    What v3 adds to the scores of pairs of DOMs leaves those of CLS alone.
    x_TD: what enters the attention. event_T: event of each row, not decreasing; further rows of x_TD are padding.
    """
    q_THK, k_THK, _ = attention.project(x_TD)
    scale = q_THK.shape[-1] ** -0.5
    score_TH = (q_THK[cls_E][event_T] * k_THK[: len(event_T)]).sum(-1) * scale
    index_TH = event_T[:, None].expand_as(score_TH)
    top_EH = score_TH.new_full((len(cls_E), score_TH.shape[1]), -torch.inf)
    top_EH = top_EH.scatter_reduce(0, index_TH, score_TH, "amax")
    weight_TH = torch.exp(score_TH - top_EH[event_T])
    return weight_TH / torch.zeros_like(top_EH).index_add_(0, event_T, weight_TH)[event_T]


@torch.inference_mode()
def look_inside(
    model: FlatTransformer, cache: EventCache, index_N: np.ndarray, config: TrainConfig, tables: Tables
) -> Inside:
    """Walk through the events; the per-event arrays are in the order of the batches, not of index_N."""
    parts: list[_Part] = []
    with Counter("looking inside", index_N.size, "events") as counter:
        done = 0
        for batch in token_batches(cache, index_N, config, tables):
            parts.append(_look(model, batch, config))
            done += batch.n_events
            counter.show(done)

    def joined(name: str) -> Array:
        return torch.cat([getattr(part, name) for part in parts]).float().cpu().numpy()

    events, doms = sum(p.n_events for p in parts), sum(p.n_doms for p in parts)
    cls_S3 = (torch.stack([p.cls_S3 for p in parts]).sum(0) / events).cpu().numpy()
    dom_S3 = (torch.stack([p.dom_S3 for p in parts]).sum(0) / doms).cpu().numpy()
    return Inside(
        stages=parts[0].stages,
        cls_norm_S=cls_S3[:, 0],
        dom_norm_S=dom_S3[:, 0],
        dom_max_S=torch.stack([p.dom_max_S for p in parts]).amax(0).cpu().numpy(),
        occupancy_S4=np.concatenate([dom_S3[:, 1:], cls_S3[:, 1:]], axis=1),
        self_ELH=joined("self_ELH"),
        rho_ELHV=joined("rho_ELHV"),
        mass_ELHM=joined("mass_ELHM"),
        share_EM=joined("share_EM"),
        dom_share_M=(torch.stack([p.count_M for p in parts]).sum(0) / doms).cpu().numpy(),
        hidden_EU=joined("hidden_EU"),
    )


class _Part(NamedTuple):
    """One batch's share of `Inside`: sums where that has means."""

    n_events: int
    n_doms: int
    stages: list[str]
    cls_S3: Tensor  # norm, norm of the first F dimensions, norm of the others
    dom_S3: Tensor
    dom_max_S: Tensor
    self_ELH: Tensor
    rho_ELHV: Tensor
    mass_ELHM: Tensor
    share_EM: Tensor
    count_M: Tensor
    hidden_EU: Tensor


def _look(model: FlatTransformer, batch: TokenBatch, config: TrainConfig) -> _Part:
    n_events, cls_E = batch.n_events, batch.cls_E[: batch.n_events]
    length_E = batch.offsets_E1[: n_events + 1].diff().long()
    event_T = torch.repeat_interleave(torch.arange(n_events, device=cls_E.device), length_E, output_size=batch.n_tokens)
    is_dom_T = torch.ones_like(event_T, dtype=torch.bool).index_fill_(0, cls_E, False)
    row_R = is_dom_T.nonzero()[:, 0]
    event_R, doms_E = event_T[row_R], length_E - 1

    columns, features_RF = columns_of(config.model), batch.features_TF[row_R]
    values_RV = features_RF[:, [columns.properties[name] for name in PROPERTIES]]
    property_ranks_RV = ranks_within(values_RV, event_R)
    pulses_R = pulses_of_doms(features_RF, config.model, columns)
    least = torch.tensor(list(BUCKETS.values())[1:], device=row_R.device)
    bucket_RM = nn.functional.one_hot(torch.bucketize(pulses_R, least, right=True), len(BUCKETS)).float()

    def shares(weight_RH: Tensor) -> Tensor:
        """Share of an event's weight that is on each bucket, (E, H, M)."""
        mass_EHM = weight_RH.new_zeros(n_events, weight_RH.shape[1], bucket_RM.shape[1])
        mass_EHM.index_add_(0, event_R, weight_RH[:, :, None] * bucket_RM[:, None, :])
        total_EH = weight_RH.new_zeros(n_events, weight_RH.shape[1]).index_add_(0, event_R, weight_RH)
        return mass_EHM / total_EH[:, :, None]

    norms: list[tuple[Tensor, Tensor, Tensor]] = []
    layers: list[tuple[Tensor, Tensor, Tensor]] = []
    names: list[str] = []
    features, stage = batch.features_TF.shape[1], None
    for stage in walk(model, batch):
        names.append(stage.name)
        split = (stage.x_TD, stage.x_TD[:, :features], stage.x_TD[:, features:])
        norm_T3 = torch.stack([part.float().norm(dim=1) for part in split], 1)
        norms.append((norm_T3[cls_E].double().sum(0), norm_T3[row_R].double().sum(0), norm_T3[row_R, 0].amax()))
        if stage.attention is not None and stage.attended_TD is not None:
            weight_TH = cls_attention(stage.attention, stage.attended_TD, cls_E, event_T)
            weight_RH = weight_TH[row_R]
            rho_EHV = spearman_within(ranks_within(weight_RH, event_R), property_ranks_RV, event_R, n_events)
            rho_EHV = torch.where((doms_E >= MIN_DOMS)[:, None, None], rho_EHV, torch.nan)
            layers.append((weight_TH[cls_E], rho_EHV, shares(weight_RH)))
    assert stage is not None
    cls_S3, dom_S3, dom_max_S = (torch.stack(x) for x in zip(*norms, strict=True))
    self_ELH, rho_ELHV, mass_ELHM = (torch.stack(x, 1) for x in zip(*layers, strict=True))
    fc1 = model.head.fc1
    return _Part(
        n_events=n_events,
        n_doms=len(row_R),
        stages=names,
        cls_S3=cls_S3,
        dom_S3=dom_S3,
        dom_max_S=dom_max_S,
        self_ELH=self_ELH,
        rho_ELHV=rho_ELHV,
        mass_ELHM=mass_ELHM,
        share_EM=shares(torch.ones_like(event_R, dtype=torch.float32)[:, None])[:, 0],
        count_M=bucket_RM.sum(0),
        hidden_EU=fc1(stage.x_TD[cls_E].to(fc1.weight.dtype)),
    )
