"""The flat transformers: a token per hit DOM plus a CLS token, attention inside an event, direction from CLS.

Shape suffixes: T tokens of all events in a row, F features, D model width, E events.

An analysis that needs the inside of the model walks the same parts itself and leaves the training path alone:

    place_T5 = model.place(batch.features_TF, mask)         # None unless config.interval
    x0_TD = x_TD = model.embed(batch.features_TF, mask)
    for block in model.blocks:
        x_TD = block(x_TD, x0_TD, mask, place_T5=place_T5)  # every row, for norms per layer
    v_E3 = model.head(model.norm(x_TD[batch.cls_E]))

with `block.attention.project` for the queries and keys of its heads and `block.attention.score_mod` for what else
enters their scores.
"""

from __future__ import annotations

import torch
from lab_shared.attention import Mask
from lab_shared.errors import UserError
from lab_shared.norms import rms_norm
from torch import Tensor, nn
from torch.nn import functional as F

from iceaggr.config import ModelConfig
from iceaggr.models.blocks import BlockV1, BlockV2
from iceaggr.models.heads import DirectionalHead
from iceaggr.models.v3 import places


class FeatureProjection(nn.Module):
    """Features to model width: nothing but zero padding, one linear layer, or Linear - GELU - Linear.

    constant: the first column of the padding holds 1 instead of 0.
    Always in the parameters' type: bfloat16 would round times to 15 ns and positions to 2 m before the model
    sees them.
    """

    def __init__(self, mode: str, feature_width: int, d_model: int, constant: bool = False) -> None:
        super().__init__()
        self.padding, self.constant = d_model - feature_width, constant
        if mode == "none":
            if self.padding < 0:
                raise UserError(
                    f"model.input = none pads the features to d_model, but {feature_width} features are "
                    f"wider than d_model = {d_model}: raise d_model, lower slots, or use input = linear"
                )
            if constant and self.padding == 0:
                raise UserError("model.input_norm = none needs a free column beside the features: raise d_model")
            self.layers = nn.Sequential()
        elif mode == "linear":
            self.layers = nn.Sequential(nn.Linear(feature_width, d_model))
        elif mode == "mlp":
            self.layers = nn.Sequential(nn.Linear(feature_width, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        else:
            raise ValueError(f"model.input is {mode!r}; it must be none, linear or mlp")

    def forward(self, features_TF: Tensor) -> Tensor:
        if len(self.layers) == 0:
            if self.constant:
                features_TF = F.pad(features_TF, (0, 1), value=1.0)
            return F.pad(features_TF, (0, self.padding - self.constant))
        with torch.autocast(features_TF.device.type, enabled=False):
            return self.layers(features_TF)


class FunctionalRMSNorm(nn.Module):
    """RMSNorm without weights, as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)


class FlatTransformer(nn.Module):
    """v2: `BlockV2`, RMSNorm after the embedding and before the head. v1: `BlockV1`, LayerNorm at the end.

    The CLS vector (std 0.02) fills the CLS rows after the embedding norm. The last block does its
    feed-forward layer for the CLS rows alone, the only ones the head reads. Under autocast the residual
    stream has the autocast type, otherwise that of the parameters.

    `config.slots` and `empty` say how the features were made and are not read here; `features` is, for `place`.
    """

    def __init__(self, config: ModelConfig, feature_width: int) -> None:
        super().__init__()
        d_model = config.d_model
        if config.layers < 1:
            raise UserError(f"model.layers is {config.layers}; a model needs at least 1")
        if d_model % config.heads:
            raise UserError(f"model.d_model = {d_model} is not a multiple of model.heads = {config.heads}")
        if config.checkpoint or config.max_batch_size is not None:
            name = "checkpoint" if config.checkpoint else "max_batch_size"
            raise UserError(f"model.{name} is an option of arch = hierarchical; leave it out with {config.arch}")
        if config.head_mixture < 1:
            raise UserError(f"model.head_mixture is {config.head_mixture}; an answer has at least 1 component")
        v2, plain = config.arch == "v2", config.input_norm == "none"
        self.config = config
        self.input = FeatureProjection(config.input, feature_width, d_model, constant=v2 and plain)
        self.input_norm = FunctionalRMSNorm() if v2 and not plain else nn.Identity()
        self.cls_D = nn.Parameter(torch.randn(d_model) * 0.02)
        block = BlockV2 if v2 else BlockV1
        self.blocks = nn.ModuleList(
            block(d_model, config.d_hidden, config.heads, config.dropout, config.interval) for _ in range(config.layers)
        )
        self.norm = FunctionalRMSNorm() if v2 else nn.LayerNorm(d_model)
        self.head = DirectionalHead(d_model, config.head_hidden, config.head_mixture)

    def embed(self, features_TF: Tensor, mask: Mask) -> Tensor:
        """The residual stream before the first block, (T, D): projected features, CLS vector in the CLS rows.

        CLS rows are the first rows of the mask's segments; their features are ignored.
        """
        if mask.spans is None:
            raise ValueError(f"the mask is {mask.kind}; a flat model needs Mask.segments to know its events")
        x_TD = self.input_norm(self.input(features_TF))
        x_TD = torch.where(_is_cls(mask, features_TF)[:, None], self.cls_D, x_TD)
        device_type = x_TD.device.type
        if torch.is_autocast_enabled(device_type):
            x_TD = x_TD.to(torch.get_autocast_dtype(device_type))
        return x_TD

    def place(self, features_TF: Tensor, mask: Mask) -> Tensor | None:
        """Where and when each token is, (T, 5) as in `iceaggr.models.v3`; None for a model that does not ask."""
        return places(features_TF, _is_cls(mask, features_TF), self.config) if self.config.interval else None

    def forward(self, features_TF: Tensor, mask: Mask, cls_E: Tensor) -> Tensor:
        """Raw direction vectors v_E3 (float32); v / |v| points to where the neutrino came from, kappa = |v|.

        With config.head_mixture = K > 1 the answer is (E, 4 K), for `iceaggr.losses.mixture_parts` and `mean_vector`.

        features_TF: (T, F) float32 token rows. mask: `Mask.segments` over the same rows, each segment an
        event that starts with its CLS row. cls_E: (E,) int64 rows of the CLS tokens; those of unused events
        may point at any row and give finite, meaningless vectors.
        """
        x0_TD = x_TD = self.embed(features_TF, mask)
        place_T5 = self.place(features_TF, mask)
        for block in self.blocks[:-1]:
            x_TD = block(x_TD, x0_TD, mask, place_T5=place_T5)
        x_ED = self.blocks[-1](x_TD, x0_TD, mask, cls_E, place_T5)
        return self.head(self.norm(x_ED))


def _is_cls(mask: Mask, features_TF: Tensor) -> Tensor:
    """bool (T,): the first row of each segment."""
    assert mask.spans is not None  # embed has refused other masks
    return mask.spans.lo_T == torch.arange(features_TF.shape[0], device=features_TF.device)


NOT_HIDDEN = ("input", "cls_D", "head")
"""Names under which a flat model keeps parameters that are no hidden matrices (Muon leaves them to AdamW)."""


def not_hidden(model: FlatTransformer) -> tuple[str, ...]:
    """`NOT_HIDDEN` without the names this model has no parameters under (input = none has no projection).

    Takes the model as `build_model` made it, not what DDP or torch.compile put around it.
    """
    owners = {name.partition(".")[0] for name, _ in model.named_parameters()}
    return tuple(name for name in NOT_HIDDEN if name in owners)


def build_model(config: ModelConfig, feature_width: int) -> FlatTransformer:
    """The model of a config for features of this width (`iceaggr.data.features.feature_width`).

    Raises:
        UserError: the features do not fit into d_model with input = none, or heads do not divide d_model.
    """
    return FlatTransformer(config, feature_width)
