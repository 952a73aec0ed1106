"""What a model has to beat on the same events: random directions and the line fit.

The line fit of muon telescopes (J. Ahrens et al., NIM A 524 (2004) 169) lets a plane of light sweep the
detector with velocity u and minimises sum_i w_i |r_i - r0 - u t_i|^2 over the pulses, which has the closed
form u = cov(r, t) / var(t). The neutrino came from where the light came from: the answer is -u / |u|.

Everything works on whole batches of events by segment sums, on the device of the pulses and in float64.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iceaggr.data.pulses import Pulses

LineFitVariant = Literal["windowed_hlc", "hlc", "all"]

FALLBACK = (0.0, 0.0, 1.0)  # from straight above: no better than a guess, as a failed fit should be
WINDOW_NS = 1500.0


class LineFit(NamedTuple):
    """One direction per event, and which of them are the fallback."""

    direction_E3: Tensor  # float64 unit vectors to where the neutrino came from
    fallback_E: Tensor  # bool: the pulses fix no velocity and the direction is FALLBACK


def random_directions(n_events: int, *, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Isotropic unit vectors (n_events, 3) float64; the same on every device for one seed."""
    generator = torch.Generator().manual_seed(seed)
    vector_E3 = torch.randn(n_events, 3, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(vector_E3, dim=-1).to(device)


def line_fit(pulses: Pulses, xyz_S3: Tensor, variant: LineFitVariant = "windowed_hlc") -> LineFit:
    """Charge-weighted line fit of every event.

    Args:
        pulses: events in CSR form; the order of pulses inside an event does not matter.
        xyz_S3: sensor positions in metres.
        variant: "hlc" uses the pulses that are not auxiliary; "windowed_hlc" (the best of the three on
            simulated data) those of them less than 1.5 us from their median time; "all" every pulse.

    An event whose pulses share one time or one position, or are fewer than two, gets `FALLBACK` and its flag.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in get_args(LineFitVariant):
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(get_args(LineFitVariant))}")
    event_P = pulses.event_of_pulse_P()
    time_P = pulses.time_P.double()
    weight_P = pulses.charge_P.double()
    if variant != "all":
        weight_P = weight_P.masked_fill(pulses.auxiliary_P, 0.0)
    if variant == "windowed_hlc":
        median_E = segment_median(pulses.time_P, ~pulses.auxiliary_P, pulses.offsets_E1)
        weight_P = weight_P.masked_fill((time_P - median_E[event_P]).abs() >= WINDOW_NS, 0.0)
    xyz_P3 = xyz_S3.to(pulses.device).double()[pulses.sensor_P.long()]
    return _fit(xyz_P3, time_P, weight_P, event_P, pulses.n_events)


def segment_median(value_P: Tensor, selected_P: Tensor, offsets_E1: Tensor) -> Tensor:
    """Lower median of the selected values of each segment: the smallest that at least half of them reach.

    value_P: integers. selected_P: bool. offsets_E1: segment bounds, from 0 to P. Returns int64; segments
    without a selected value give one of their values, empty segments 0. One sort, no host sync.
    """
    n_segments, n_values = offsets_E1.numel() - 1, value_P.numel()
    if n_values == 0:
        return value_P.new_zeros(n_segments, dtype=torch.int64)
    counts_E = offsets_E1.diff()
    segment_P = torch.repeat_interleave(torch.arange(n_segments, device=value_P.device), counts_E, output_size=n_values)
    value_P = value_P.long()
    low, high = value_P.aminmax()
    order_P = torch.argsort(segment_P * (high - low + 1) + (value_P - low))  # segments stay where they are
    value_P, selected_P = value_P[order_P], selected_P[order_P].long()

    reached_P1 = torch.cat([counts_E.new_zeros(1), selected_P.cumsum(0)])
    before_E = reached_P1[offsets_E1[:-1]]
    total_E = reached_P1[offsets_E1[1:]] - before_E
    below_P = 2 * (reached_P1[1:] - before_E[segment_P]) < total_E[segment_P]
    index_E = offsets_E1[:-1] + _segment_sum(below_P.long(), segment_P, n_segments)
    return torch.where(counts_E > 0, value_P[index_E.clamp(max=n_values - 1)], 0)


def _fit(xyz_P3: Tensor, time_P: Tensor, weight_P: Tensor, event_P: Tensor, n_events: int) -> LineFit:
    total_E1 = _segment_sum(weight_P, event_P, n_events).clamp(min=1e-300)[:, None]

    def mean(value_PC: Tensor) -> Tensor:
        return _segment_sum(weight_P[:, None] * value_PC, event_P, n_events) / total_E1

    # centred before anything is squared, so that nothing cancels
    time_P1 = time_P[:, None] - mean(time_P[:, None])[event_P]
    xyz_P3 = xyz_P3 - mean(xyz_P3)[event_P]
    covariance_E3 = mean(xyz_P3 * time_P1)  # m ns
    length_E1 = covariance_E3.norm(dim=-1, keepdim=True)
    # times are whole ns and positions centimetres: a smaller covariance is rounding, not motion
    fallback_E1 = length_E1 < 1e-6
    direction_E3 = -covariance_E3 / length_E1.clamp(min=1e-6)
    return LineFit(torch.where(fallback_E1, direction_E3.new_tensor(FALLBACK), direction_E3), fallback_E1[:, 0])


def _segment_sum(value: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    return value.new_zeros(n_segments, *value.shape[1:]).index_add_(0, segment, value)
