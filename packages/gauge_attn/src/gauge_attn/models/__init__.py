"""The three language models behind one interface.

model(tokens_BN) -> Output: training, evaluation and, with cache=model.new_cache(), generation are the same function.
"""

from __future__ import annotations

from gauge_attn.config import ModelConfig, OptimConfig
from gauge_attn.models.faithful import Faithful
from gauge_attn.models.gpt import GPT
from gauge_attn.models.layers import Output, Temperature, build_optimizer
from gauge_attn.models.practical import Practical

__all__ = ["GPT", "Faithful", "Model", "Output", "Practical", "Temperature", "build_model", "build_optimizer"]

Model = Faithful | Practical | GPT


def build_model(config: ModelConfig, vocab: int, window: int, optim: OptimConfig | None = None) -> Model:
    """The model of a configuration; `optim` says whether and how it returns an alignment loss.

    Raises UserError for options that exclude each other.
    """
    alignment = optim.alignment_reduction if optim is not None and optim.alignment else "none"
    if config.arch == "gpt":
        return GPT(config, vocab, window)
    kind = Faithful if config.arch == "faithful" else Practical
    return kind(config, vocab, window, alignment)
