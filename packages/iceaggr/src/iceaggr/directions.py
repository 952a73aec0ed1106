"""Directions as angles and as unit vectors: where a neutrino came from, in the detector frame.

Functions take numpy arrays or torch tensors and answer in kind, in float64.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)


def angles_to_vector(azimuth: Array, zenith: Array) -> Array:
    """Angles in radians (...) -> unit vectors (..., 3) float64: (cos az sin zen, sin az sin zen, cos zen)."""
    az, zen = as_float64(azimuth), as_float64(zenith)
    vector = torch.stack([az.cos() * zen.sin(), az.sin() * zen.sin(), zen.cos()], dim=-1)
    return like(vector, azimuth)


def vector_to_angles(vector_E3: Array) -> tuple[Array, Array]:
    """Vectors of any length (..., 3) -> (azimuth in [0, 2 pi), zenith in [0, pi]) in radians, float64."""
    x, y, z = as_float64(vector_E3).unbind(-1)
    azimuth = torch.atan2(y, x).remainder(2 * torch.pi)
    # remainder rounds a tiny negative angle up to 2 pi itself
    azimuth = torch.where(azimuth >= 2 * torch.pi, 0.0, azimuth)
    zenith = torch.atan2(torch.hypot(x, y), z)
    return like(azimuth, vector_E3), like(zenith, vector_E3)


def as_float64(x: np.ndarray | Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(torch.float64)
    return torch.tensor(np.asarray(x, dtype=np.float64))  # copied: torch warns if it shares read-only memory


def like(x: Tensor, example: Array) -> Array:
    return x if isinstance(example, Tensor) else x.numpy()
