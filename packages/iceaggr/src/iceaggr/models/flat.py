"""The flat transformers: a token per hit DOM plus a CLS token, attention inside an event, direction from CLS.

Shape suffixes: T tokens of all events in a row, F features, D model width, E events.

An analysis that needs the inside of the model walks the same parts itself and leaves the training path alone:

    x0_TD = x_TD = model.embed(batch.features_TF, mask)
    for block in model.blocks:
        x_TD = block(x_TD, x0_TD, mask)                     # every row, for norms per layer
    v_E3 = model.head(model.norm(x_TD[batch.cls_E]))

with `block.attention.project` for the queries and keys of its heads.
"""

from __future__ import annotations

import torch
from lab_shared.attention import Mask
from lab_shared.norms import rms_norm
from torch import Tensor, nn
from torch.nn import functional as F

from iceaggr.config import ModelConfig
from iceaggr.models.blocks import BlockV1, BlockV2
from iceaggr.models.heads import DirectionalHead


class FeatureProjection(nn.Module):
    """Features to model width: nothing but zero padding, one linear layer, or Linear - GELU - Linear.

    Always in the parameters' type: bfloat16 would round times to 15 ns and positions to 2 m before the model
    sees them.
    """

    def __init__(self, mode: str, feature_width: int, d_model: int) -> None:
        super().__init__()
        self.padding = d_model - feature_width
        if mode == "none":
            if self.padding < 0:
                raise ValueError(
                    f"model.input = none pads the features to d_model, but {feature_width} features are "
                    f"wider than d_model = {d_model}: raise d_model, lower slots, or use input = linear"
                )
            self.layers = nn.Sequential()
        elif mode == "linear":
            self.layers = nn.Sequential(nn.Linear(feature_width, d_model))
        elif mode == "mlp":
            self.layers = nn.Sequential(nn.Linear(feature_width, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        else:
            raise ValueError(f"model.input is {mode!r}; it must be none, linear or mlp")

    def forward(self, features_TF: Tensor) -> Tensor:
        if len(self.layers) == 0:
            return F.pad(features_TF, (0, self.padding))
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

    `config.features`, `slots` and `empty` say how the features were made and are not read here.
    """

    def __init__(self, config: ModelConfig, feature_width: int) -> None:
        super().__init__()
        d_model = config.d_model
        if config.layers < 1:
            raise ValueError(f"model.layers is {config.layers}; a model needs at least 1")
        if d_model % config.heads:
            raise ValueError(f"model.d_model = {d_model} is not a multiple of model.heads = {config.heads}")
        v2 = config.arch == "v2"
        self.input = FeatureProjection(config.input, feature_width, d_model)
        self.input_norm = FunctionalRMSNorm() if v2 else nn.Identity()
        self.cls_D = nn.Parameter(torch.randn(d_model) * 0.02)
        block = BlockV2 if v2 else BlockV1
        self.blocks = nn.ModuleList(
            block(d_model, config.d_hidden, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = FunctionalRMSNorm() if v2 else nn.LayerNorm(d_model)
        self.head = DirectionalHead(d_model, config.head_hidden)

    def embed(self, features_TF: Tensor, mask: Mask) -> Tensor:
        """The residual stream before the first block, (T, D): projected features, CLS vector in the CLS rows.

        CLS rows are the first rows of the mask's segments; their features are ignored.
        """
        if mask.spans is None:
            raise ValueError(f"the mask is {mask.kind}; a flat model needs Mask.segments to know its events")
        x_TD = self.input_norm(self.input(features_TF))
        is_cls_T = mask.spans.lo_T == torch.arange(x_TD.shape[0], device=x_TD.device)
        x_TD = torch.where(is_cls_T[:, None], self.cls_D, x_TD)
        device_type = x_TD.device.type
        if torch.is_autocast_enabled(device_type):
            x_TD = x_TD.to(torch.get_autocast_dtype(device_type))
        return x_TD

    def forward(self, features_TF: Tensor, mask: Mask, cls_E: Tensor) -> Tensor:
        """Raw direction vectors v_E3 (float32); v / |v| points to where the neutrino came from, kappa = |v|.

        features_TF: (T, F) float32 token rows. mask: `Mask.segments` over the same rows, each segment an
        event that starts with its CLS row. cls_E: (E,) int64 rows of the CLS tokens; those of unused events
        may point at any row and give finite, meaningless vectors.
        """
        x0_TD = x_TD = self.embed(features_TF, mask)
        for block in self.blocks[:-1]:
            x_TD = block(x_TD, x0_TD, mask)
        x_ED = self.blocks[-1](x_TD, x0_TD, mask, cls_E)
        return self.head(self.norm(x_ED))


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
        ValueError: the features do not fit into d_model with input = none, or heads do not divide d_model.
    """
    return FlatTransformer(config, feature_width)
