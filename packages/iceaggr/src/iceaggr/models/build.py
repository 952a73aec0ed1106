"""From a configuration to its model, whatever the architecture."""

from __future__ import annotations

from iceaggr.config import ModelConfig
from iceaggr.data.features import feature_width
from iceaggr.models import flat, hierarchical
from iceaggr.models.flat import FlatTransformer
from iceaggr.models.hierarchical import HierarchicalTransformer

Model = FlatTransformer | HierarchicalTransformer


def build_model(config: ModelConfig) -> Model:
    """The untrained model. Raises ValueError for a configuration that no model can have."""
    if config.arch == "hierarchical":
        return HierarchicalTransformer(config)
    return flat.build_model(config, feature_width(config))


def not_hidden(model: Model) -> tuple[str, ...]:
    """Names under which a model keeps parameters that are no hidden matrices, as `make_optimizer` takes them."""
    return hierarchical.NOT_HIDDEN if isinstance(model, HierarchicalTransformer) else flat.not_hidden(model)
