"""Features that v3 adds to a DOM's vector: waves of where, when and how much, and what the ice there is like.

Everything is elementwise on the DOMs' device. Shape suffixes: D hit DOMs, F features.
"""

from __future__ import annotations

import math

import torch
from lab_shared.errors import UserError
from torch import Tensor

from iceaggr.config import ModelConfig

ICE_SPEED = 0.299792458 / 1.35634
"""m/ns, the group velocity of Cherenkov light in the ice."""
LONGEST_WAVE = 4000.0
"""Metres; the k-th wavelength is this over 2^k. Times count as the way light goes in them."""
LONGEST_CHARGE_WAVE = 8.0
"""Decades of charge, halved in the same way."""
TRIGGER_TIME = 10_000.0
"""ns in the read-out clock; times are counted from here."""

ICE_FEATURES = (
    "log scattering",  # log(effective scattering length / 30 m)
    "log absorption",  # log(absorption length / 100 m)
    "efficiency",  # relative quantum efficiency - 1, in units of the high-efficiency DOMs' 0.35
)


def fourier_width(waves: int) -> int:
    """Columns of `fourier_features`: sine and cosine of x, y, z, t and q at each wavelength."""
    return 10 * waves


def fourier_features(xyz_D3: Tensor, time_D: Tensor, charge_D: Tensor, waves: int) -> Tensor:
    """(D, 10 waves) float32: sin and cos of 2 pi u 2^k / L, k = 0..waves - 1, of five coordinates u.

    u is x, y, z and c_ice (t - 10 us) in m with L = 4000 m, so that 8 waves resolve 31 m and 141 ns, and log10 of the
    charge with L = 8 decades. A linear layer of such waves can form narrow functions of position and time, which one
    of the coordinates themselves cannot. Source: Tancik et al., Fourier Features (arXiv:2006.10739).

    Args:
        xyz_D3: positions of the DOMs, m.
        time_D: first pulse of each DOM, ns in the read-out clock.
        charge_D: its charge, photo-electrons.
    """
    metres_D1 = ((time_D.to(torch.float64) - TRIGGER_TIME) * ICE_SPEED)[:, None]
    decades_D1 = charge_D.to(torch.float64).clamp(min=1e-6).log10()[:, None]
    turns_D5 = torch.cat([xyz_D3 / LONGEST_WAVE, metres_D1 / LONGEST_WAVE, decades_D1 / LONGEST_CHARGE_WAVE], 1)
    scale_W = 2.0 ** torch.arange(waves, device=xyz_D3.device, dtype=torch.float64)
    # In float64 up to here: whole turns are dropped exactly, however many.
    angle_DF = (2 * math.pi * (turns_D5[:, :, None] * scale_W).remainder(1)).flatten(1).to(torch.float32)
    return torch.cat([angle_DF.sin(), angle_DF.cos()], 1)


def ice_features(scattering_D: Tensor, absorption_D: Tensor, efficiency_D: Tensor) -> Tensor:
    """(D, len(ICE_FEATURES)) float32 from lengths in m and relative efficiencies at the DOMs."""
    columns = (torch.log(scattering_D / 30), torch.log(absorption_D / 100), (efficiency_D - 1) / 0.35)
    return torch.stack(columns, 1).to(torch.float32)


def extra_width(config: ModelConfig, aggregates: int) -> int:
    """Columns that v3's options add to the features. aggregates: how many an event-relative summary has.

    Raises:
        UserError: aggregates beside features = summary, which are the same numbers.
    """
    if config.aggregates and config.features != "seed":
        raise UserError("model.aggregates repeats what features = summary has: use it with features = seed")
    if config.fourier < 0:
        raise UserError(f"model.fourier is {config.fourier}; it is a number of wavelengths, 0 for none")
    extra = aggregates if config.aggregates else 0
    return extra + (len(ICE_FEATURES) if config.ice else 0) + fourier_width(config.fourier)
