"""The models: without memory, with memory before the data (prefix), with memory behind it (postfix)."""

from __future__ import annotations

from rh_memory.config import ModelConfig
from rh_memory.models.backbone import Context, Output, SpacingMDN
from rh_memory.models.postfix import PostfixMDN
from rh_memory.models.prefix import PrefixMDN

__all__ = ["Context", "Model", "Output", "PostfixMDN", "PrefixMDN", "SpacingMDN", "build_model"]

Model = SpacingMDN | PrefixMDN | PostfixMDN


def build_model(config: ModelConfig) -> Model:
    """The model of a configuration, initialised from torch's global generator, on the CPU.

    Raises UserError for a configuration that makes no sense.
    """
    if config.memory == "none":
        return SpacingMDN(config)
    return PrefixMDN(config) if config.memory == "prefix" else PostfixMDN(config)
