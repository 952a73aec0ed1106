"""Attention as softmax(-KL/kappa) between Gaussian beliefs transported by SO(3) frames.

The names below are loaded when they are first used, so that the command line answers without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gauge_attn.attention import Attended, FeatureCache, IrrepsAttended, kl_attention, kl_attention_irreps
    from gauge_attn.gaussians import Centre
    from gauge_attn.irreps import Irreps
    from gauge_attn.so3 import compose, frames, frames_for, generators, rope_frames

__version__ = "0.1.0"

_HOME = {
    "Attended": "attention",
    "Centre": "gaussians",
    "FeatureCache": "attention",
    "Irreps": "irreps",
    "IrrepsAttended": "attention",
    "compose": "so3",
    "frames": "so3",
    "frames_for": "so3",
    "generators": "so3",
    "kl_attention": "attention",
    "kl_attention_irreps": "attention",
    "rope_frames": "so3",
}
__all__ = [
    "Attended",
    "Centre",
    "FeatureCache",
    "Irreps",
    "IrrepsAttended",
    "compose",
    "frames",
    "frames_for",
    "generators",
    "kl_attention",
    "kl_attention_irreps",
    "rope_frames",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"gauge_attn.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gauge_attn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
