"""The seed's hierarchical model: T1 turns the pulses of a DOM into its embedding, T2 the DOMs of an event into v.

Shape suffixes: R rows of pulses, D hit DOMs, E events, M model width, F pulse features.

Layout of the rows and why attention runs over the first of them only: `iceaggr.data.rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lab_shared.attention import Mask, attend
from lab_shared.errors import UserError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from iceaggr.config import ModelConfig
from iceaggr.data.rows import SEQUENCE
from iceaggr.data.schema import N_SENSORS
from iceaggr.models.blocks import SelfAttention
from iceaggr.models.heads import DirectionalHead

if TYPE_CHECKING:
    from iceaggr.data.pulse_batches import PulseBatch

N_FEATURES = 4
"""Of a pulse (`iceaggr.data.pulse_batches.PULSE_FEATURES`)."""


FLAT_ONLY = (
    "features", "slots", "empty", "dom_cap", "dom_select", "input", "input_norm", "fourier", "aggregates", "ice",
    "interval",
)  # fmt: skip
"""Options that mean nothing to T1 and T2."""


class PostNormBlock(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + ffn(x)): the encoder layer of Vaswani et al. 2017 (arXiv:1706.03762) with
    GELU, biases and torch's default initialisation.
    """

    def __init__(self, d_model: int, d_hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, heads, bias=True, normalize_qk=False, dropout=0.0)
        self.norm1 = nn.LayerNorm(d_model)
        self.c_fc = nn.Linear(d_model, d_hidden)
        self.c_proj = nn.Linear(d_hidden, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = dropout

    def forward(self, x_RM: Tensor, mask: Mask | None) -> Tensor:
        """(R, M) -> (R, M). mask: segments that attend to themselves; None: every row sees itself alone, so that its
        output is its value and no query or key is needed."""
        a = self.attention
        y_RM = a.v(x_RM) if mask is None else attend(*a.project(x_RM), mask).flatten(1)
        x_RM = self.norm1(x_RM + self._dropped(a.c_proj(y_RM))).to(x_RM.dtype)
        y_RM = self.c_proj(F.gelu(self.c_fc(x_RM)))
        return self.norm2(x_RM + self._dropped(y_RM)).to(x_RM.dtype)

    def _dropped(self, x_RM: Tensor) -> Tensor:
        return F.dropout(x_RM, self.dropout, self.training)


class DOMTransformer(nn.Module):
    """T1 before its mean over pulses: Linear(4, M), the blocks, LayerNorm. A pulse sees the pulses of its DOM chunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input = nn.Linear(N_FEATURES, config.d_model)
        self.blocks = _blocks(config)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, features_RF: Tensor, mask: Mask | None) -> Tensor:
        """(R, 4) -> (R, M) float32; mask as in `PostNormBlock`."""
        with torch.autocast(features_RF.device.type, enabled=False):  # bfloat16 would round times to 15 ns
            x_RM = self.input(features_RF)
        x_RM = _autocast(x_RM)
        for block in self.blocks:
            x_RM = block(x_RM, mask)
        return self.norm(x_RM).float()


class EventTransformer(nn.Module):
    """T2: DOM embedding + MLP(3, M/2, M) of its position (m / 500), the blocks inside each event, mean over DOMs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        half = config.d_model // 2
        self.geometry = nn.Sequential(nn.Linear(3, half), nn.GELU(), nn.Linear(half, config.d_model))
        self.blocks = _blocks(config)

    def forward(self, x_DM: Tensor, xyz_D3: Tensor, event_D: Tensor, mask: Mask, n_events: int) -> Tensor:
        """(D, M) -> (E, M) float32. event_D: n_events for the unused DOMs behind the segments of the mask."""
        with torch.autocast(xyz_D3.device.type, enabled=False):
            x_DM = x_DM + self.geometry(xyz_D3)
        x_DM = _autocast(x_DM)
        for block in self.blocks:
            x_DM = block(x_DM, mask)
        sums_EM = x_DM.new_zeros(n_events + 1, x_DM.shape[1], dtype=torch.float32).index_add(0, event_D, x_DM.float())
        n_doms_E = torch.zeros_like(sums_EM[:, 0]).index_add(0, event_D, torch.ones_like(xyz_D3[:, 0]))
        return sums_EM[:n_events] / n_doms_E[:n_events, None].clamp(min=1)


class HierarchicalTransformer(nn.Module):
    """T1, the mean over each DOM's pulses, T2, `DirectionalHead`.

    A DOM's mean is the sum over its rows by their number, so that it does not matter how its pulses are spread over
    chunks and mini-batches.

    Raises:
        UserError: an option of the flat models that has no meaning here, or heads do not divide d_model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.layers < 1:
            raise UserError(f"model.layers is {config.layers}; a model needs at least 1")
        if config.d_model % config.heads or config.d_model % 2:
            raise UserError(f"model.d_model = {config.d_model} is not a multiple of 2 and of heads = {config.heads}")
        plain = ModelConfig()
        if wrong := [name for name in FLAT_ONLY if getattr(config, name) != getattr(plain, name)]:
            raise UserError(f"model.{wrong[0]} is an option of the flat models; leave it out with arch = hierarchical")
        self.checkpoint = config.checkpoint
        self.most_rows = None if config.max_batch_size is None else SEQUENCE * config.max_batch_size
        self.t1 = DOMTransformer(config)
        self.t2 = EventTransformer(config)
        self.head = DirectionalHead(config.d_model, config.head_hidden, config.head_mixture)

    def embed_doms(self, features_RF: Tensor, dom_R: Tensor, masks: Sequence[Mask], count_D: Tensor) -> Tensor:
        """T1: (D, M) float32 mean over each DOM's pulses.

        dom_R: (R,) the DOM of each row, D for unused rows. masks: one per mini-batch of equally many rows for
        attention; the rows behind these are pulses that are alone in their DOM. count_D: (D,) pulses of each DOM.
        """
        sums_DM = features_RF.new_zeros(count_D.shape[0] + 1, self.t1.norm.weight.shape[0])
        for rows, mask in _pieces(features_RF.shape[0], masks, self.most_rows):
            if self.checkpoint and torch.is_grad_enabled():
                x_RM = checkpoint(self.t1, features_RF[rows], mask, use_reentrant=False)
            else:
                x_RM = self.t1(features_RF[rows], mask)
            sums_DM = sums_DM.index_add(0, dom_R[rows], x_RM)
        return sums_DM[:-1] / count_D[:, None]

    def forward(
        self,
        features_RF: Tensor,
        dom_R: Tensor,
        masks: Sequence[Mask],
        count_D: Tensor,
        xyz_D3: Tensor,
        event_D: Tensor,
        event_mask: Mask,
        n_events: int,
    ) -> Tensor:
        """Raw direction vectors v_E3 (float32); v / |v| points to where the neutrino came from, kappa = |v|.

        The arguments are those of `embed_doms` and of `EventTransformer.forward`, which `pulse_inputs` makes of a
        batch. Unused events give finite, meaningless vectors.
        """
        x_DM = self.embed_doms(features_RF, dom_R, masks, count_D)
        return self.head(self.t2(x_DM, xyz_D3, event_D, event_mask, n_events))


def pulse_inputs(batch: PulseBatch) -> tuple[Any, ...]:
    """What `HierarchicalTransformer.forward` takes of a batch."""
    # masks are built here once rather than by every layer of a compiled model
    backend: Literal["flex", "sdpa"] = "flex" if batch.features_RF.is_cuda else "sdpa"
    masks = tuple(
        Mask.segments(offsets_K, batch.batch_rows, max_len=min(SEQUENCE, batch.batch_rows)).prepare(backend)
        for offsets_K in batch.offsets_BK.unbind()
    )
    n_doms = batch.xyz_D3.shape[0]
    event_mask = Mask.segments(batch.offsets_E1, n_doms, max_len=min(n_doms, N_SENSORS)).prepare(backend)
    return (
        batch.features_RF,
        batch.dom_R,
        masks,
        batch.count_D,
        batch.xyz_D3,
        batch.event_D,
        event_mask,
        batch.valid_E.shape[0],
    )


NOT_HIDDEN = ("t1.input", "t2.geometry", "head")
"""Names under which the model keeps parameters that are no hidden matrices (Muon leaves them to AdamW)."""


def _blocks(config: ModelConfig) -> nn.ModuleList:
    return nn.ModuleList(
        PostNormBlock(config.d_model, config.d_hidden, config.heads, config.dropout) for _ in range(config.layers)
    )


def _autocast(x: Tensor) -> Tensor:
    """x in the type of the surrounding autocast: that of the residual stream."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _pieces(n_rows: int, masks: Sequence[Mask], most_rows: int | None) -> list[tuple[slice, Mask | None]]:
    """Rows that T1 takes at once, and their mask: the mini-batches, then the rest, at most `most_rows` at a time."""
    pieces: list[tuple[slice, Mask | None]] = []
    at = 0
    for mask in masks:
        assert mask.total is not None  # Mask.segments always has one
        pieces.append((slice(at, at + mask.total), mask))
        at += mask.total
    size = most_rows or max(n_rows - at, 1)
    return pieces + [(slice(low, min(low + size, n_rows)), None) for low in range(at, n_rows, size)]
