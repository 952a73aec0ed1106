"""The array and the ice as tensors: what the light, noise and trigger steps look up.

Suffixes: S sensors (5160), R strings (86), Z steps of depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from iceaggr.geometry import DOMS_PER_STRING, SURFACE_Z, Geometry, ice_properties

_LAYER = 10.0
"""Thickness of the layers in which the ice is taken as even, m: that of the published table."""
_LAYERS_Z = np.arange(-700.0, 700.0 + _LAYER, _LAYER)


@dataclass(frozen=True, eq=False)
class Detector:
    """Everything static, on one device. Build with `detector(geometry, device)`, which caches."""

    xyz_3S: Tensor  # float32 m
    efficiency_S: Tensor  # float32; relative quantum efficiency, 0 for dead DOMs
    noise_cdf_S: Tensor  # float32 cumulative share of the noise, ends at 1
    noise_doms: float  # the array's noise in units of a standard DOM
    string_R2: Tensor  # float32 mean x, y of each string
    group_R: Tensor  # int64, 0 for strings 1-78, 1 for DeepCore: strings of a group have DOMs at the same depths
    layer_z_GD: Tensor  # float32 m, mean z of the DOMs of a group
    layer_S: Tensor  # int64 layer of ice of each DOM
    ice_4LL: Tensor  # (4, L * L) averages from layer to layer, 1/m; see Ice
    attenuation_LK: Tensor  # 1/m, from each layer of ice to the K = 2 * 60 layers of layer_z_GD
    clear_GD: Tensor  # m, attenuation length of the ice around those depths
    deepcore_S: Tensor  # bool, DOMs of the DeepCore trigger

    def layer(self, z: Tensor) -> Tensor:
        """Index of the layer of ice at z (m), clamped to the outermost ones."""
        return ((z - _LAYERS_Z[0]) / _LAYER).round().long().clamp(0, len(_LAYERS_Z) - 1)

    def ice_between(self, z: Tensor, layer: Tensor) -> Ice:
        """The ice from depth z (m) to a layer, of the same (Q) shape."""
        return Ice(*self.ice_4LL.index_select(1, self.layer(z) * len(_LAYERS_Z) + layer))


@dataclass(frozen=True, eq=False)
class Ice:
    """Averages over the depths that light crosses, as inverse lengths, 1/m (arXiv:1301.5361)."""

    scattering: Tensor
    """Effective scattering."""
    absorption: Tensor
    attenuation: Tensor
    """Of diffuse light: sqrt(3 scattering absorption), the inverse of lambda_p."""
    cross_over: Tensor
    """Inverse of lambda_c, the distance at which light turns diffuse."""


@lru_cache(maxsize=4)
def detector(geometry: Geometry, device: torch.device) -> Detector:
    xyz = geometry.xyz.reshape(-1, DOMS_PER_STRING, 3)
    layer_z = np.stack((xyz[:78, :, 2].mean(axis=0), xyz[78:, :, 2].mean(axis=0)))
    ice = _layer_to_layer()
    # Light of a track comes from some layers away: the average of the seven around.
    around = np.lib.stride_tricks.sliding_window_view(np.pad(np.diagonal(ice[2]), 3, mode="edge"), 7)
    efficiency = np.where(geometry.dead, 0.0, geometry.rde)

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.tensor(array, dtype=dtype, device=device)

    return Detector(
        xyz_3S=tensor(geometry.xyz.T, torch.float32),
        efficiency_S=tensor(efficiency, torch.float32),
        noise_cdf_S=tensor(efficiency.cumsum() / efficiency.sum(), torch.float32),
        noise_doms=float(efficiency.sum()),
        string_R2=tensor(xyz[:, :, :2].mean(axis=1), torch.float32),
        group_R=tensor(np.arange(86) >= 78, torch.int64),
        layer_z_GD=tensor(layer_z, torch.float32),
        layer_S=tensor(_layer(geometry.xyz[:, 2]), torch.int64),
        ice_4LL=tensor(ice.reshape(4, -1), torch.float32),
        attenuation_LK=tensor(ice[2][:, _layer(layer_z.reshape(-1))], torch.float32),
        clear_GD=tensor(np.interp(layer_z, _LAYERS_Z, 1 / around.mean(axis=1)), torch.float32),
        deepcore_S=tensor(_deepcore(geometry), torch.bool),
    )


def _deepcore(geometry: Geometry) -> np.ndarray:
    """DOMs of the DeepCore trigger: strings 79-86 below the dust, and the deep part of the strings around."""
    string, depth = geometry.string, geometry.depth
    deep = (depth > 2100) & np.isin(string, (25, 26, 27, 34, 35, 36, 37, 44, 45, 46, 47))
    return deep | ((string >= 79) & (geometry.dom > 10))


def _layer(z: np.ndarray) -> np.ndarray:
    return np.rint((z - _LAYERS_Z[0]) / _LAYER).clip(0, len(_LAYERS_Z) - 1).astype(np.int64)


def _layer_to_layer() -> np.ndarray:
    """(4, L, L): the fields of `Ice` averaged from the middle of one layer to the middle of another."""
    inverse = 1 / np.stack(ice_properties(SURFACE_Z - _LAYERS_Z))
    integral = np.concatenate((np.zeros((2, 1)), ((inverse[:, 1:] + inverse[:, :-1]) / 2).cumsum(axis=1)), axis=1)
    index = np.arange(len(_LAYERS_Z))
    apart = index[:, None] - index
    across = (integral[:, :, None] - integral[:, None, :]) / np.where(apart == 0, 1, apart)
    scattering, absorption = np.where(apart == 0, inverse[:, :, None], across)
    attenuation = np.sqrt(3 * scattering * absorption)
    cross_over = 3 * scattering * np.exp(-absorption / scattering)
    return np.stack((scattering, absorption, attenuation, cross_over))
