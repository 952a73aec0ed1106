"""Local coincidence, triggers and the read-out window: from all pulses of a proposal to those that are kept.

The laws are those of the 8 public real events.
Suffixes: P pulses, L launches in coincidence, W trigger windows, N proposals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iceaggr.geometry import DOMS_PER_STRING
from iceaggr.sim import hits
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector

SMT8 = (8, 5_000)
"""In-ice simple majority: DOMs in coincidence, ns."""
SMT3 = (3, 2_500)
"""DeepCore simple majority."""
STRING = (5, 7, 1_500)
"""String trigger: so many of so many adjacent DOMs, ns."""
VOLUME = (4, 1_000, 175.0, 37.5)
"""Volume trigger: DOMs, ns, m in the horizontal and in the vertical from the first."""
_LOOK_AHEAD = 12
"""Launches after a first one that the string and volume triggers look at."""
_KEY_BITS = hits.TIME_BITS + 1
_IN_ICE = 78 * DOMS_PER_STRING


def coincidence(dom_P: Tensor, time_P: Tensor, config: SimConfig) -> tuple[Tensor, Tensor]:
    """(near_P, launch_P) of pulses sorted by (dom, time); dom = event << 13 | sensor.

    near: another pulse within +-hlc_span DOMs of the same string (not the same DOM) and +-hlc_window. launch:
    near, and no near pulse on the same DOM in the `launch_length` before.
    """
    key = _key(dom_P, time_P)
    # Only pulses next to another hit DOM can be near one: the search runs on those.
    first = hits.starts(dom_P)
    hit_D = dom_P[first]
    beside_D = torch.zeros_like(hit_D, dtype=torch.bool)
    close = hit_D[1:] - hit_D[:-1] <= config.hlc_span
    beside_D[1:] |= close
    beside_D[:-1] |= close
    some = beside_D[first.cumsum(0) - 1].nonzero().squeeze(1)
    among = key.index_select(0, some)
    position = (dom_P.index_select(0, some) & 8191) % DOMS_PER_STRING
    near_some = torch.zeros_like(some, dtype=torch.bool)
    for step in (s for s in range(-config.hlc_span, config.hlc_span + 1) if s != 0):
        other = among + (step << _KEY_BITS)
        found = hits.search(among, other - config.hlc_window).clamp(max=among.numel() - 1)
        same_string = (position + step >= 0) & (position + step < DOMS_PER_STRING)
        near_some |= same_string & ((among.index_select(0, found) - other).abs() <= config.hlc_window)
    near = torch.zeros_like(dom_P, dtype=torch.bool)
    near[some] = near_some
    last = _last_near(key, near)
    before = torch.zeros_like(last)
    before[1:] = last[:-1]
    return near, near & (key - before > config.launch_length)


def auxiliary(dom_P: Tensor, time_P: Tensor, near_P: Tensor, config: SimConfig) -> Tensor:
    """True for pulses out of coincidence: no near pulse on the DOM now or in the `launch_length` before."""
    key = _key(dom_P, time_P)
    return key - _last_near(key, near_P) > config.launch_length


def _key(dom_P: Tensor, time_P: Tensor) -> Tensor:
    """One bit more than times need: keys of different DOMs differ by more than any time window."""
    return (dom_P << _KEY_BITS) | time_P


def _last_near(key_P: Tensor, near_P: Tensor) -> Tensor:
    """Key of the last near pulse at or before each pulse, perhaps of another DOM."""
    return hits.running_max(torch.where(near_P, key_P, -(1 << _KEY_BITS)))


def isolated_dead_time(dom_P: Tensor, time_P: Tensor, auxiliary_P: Tensor, config: SimConfig) -> Tensor:
    """False for what an isolated launch does not report: after its charge stamp, within its dead time.

    Dropping them changes no coincidence: a pulse that is near another makes that one near too.
    """
    first = hits.starts(dom_P)
    first[1:] |= time_P[1:] - time_P[:-1] > config.stamp_dead
    since = time_P - time_P[hits.segment_start(first)]
    return ~auxiliary_P | (since <= config.stamp_length)


def triggers(event_L: Tensor, sensor_L: Tensor, time_L: Tensor, detector: Detector) -> Tensor:
    """Satisfied trigger windows as sorted int64 event << 34 | start << 17 | end (times with their offset).

    event, sensor and time of the launches in any order. Host syncs: six, sizes of lists.
    """
    by_time = hits.sort_int64((event_L << 30) | (time_L << 13) | sensor_L)
    event, time, sensor = by_time >> 30, (by_time >> 13) & 0x1FFFF, by_time & 8191
    in_ice, deepcore = sensor < _IN_ICE, detector.deepcore_S[sensor]
    found = [
        _majority(event[in_ice], time[in_ice], *SMT8),
        _majority(event[deepcore], time[deepcore], *SMT3),
        _volume(event, time, detector.xyz_3S[:, sensor]),
    ]
    string = torch.div(sensor, DOMS_PER_STRING, rounding_mode="floor")
    by_string = hits.sort_int64((((event << 7) | string) << 30) | (time << 13) | sensor)
    found.append(_string(by_string >> 30, (by_string >> 13) & 0x1FFFF, by_string & 8191))
    return hits.sort_int64(torch.cat(found))


def readout(windows_W: Tensor, n: int, config: SimConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(triggered_N, start_N, end_N): from first trigger start to last trigger end of the first read-out.

    Read-outs reach from `readout_before` ahead of a trigger to `readout_after` behind it; those that touch
    are one event, later ones are dropped. windows_W as from `triggers`.
    """
    event, start, end = windows_W >> 34, (windows_W >> 17) & 0x1FFFF, windows_W & 0x1FFFF
    first = hits.starts(event)
    reach = hits.running_max((event << 17) | end)  # latest end so far; an event's keys exceed all earlier events'
    gap = torch.zeros_like(first)
    gap[1:] = ~first[1:] & (start[1:] - (reach[:-1] & 0x1FFFF) > config.readout_before + config.readout_after)
    gaps = gap.cumsum(0)
    kept = gaps == gaps[hits.segment_start(first)] if event.numel() else first
    none = 1 << 17
    start_N = torch.full((n,), none, device=event.device).scatter_reduce_(0, event, start, "amin")
    end_N = torch.zeros(n, dtype=torch.int64, device=event.device)
    end_N.scatter_reduce_(0, event, torch.where(kept, end, 0), "amax")
    return start_N < none, start_N, end_N


def _majority(event_L: Tensor, time_L: Tensor, need: int, window: int) -> Tensor:
    """`need` launches within `window`, in time order: the i-th and the (i + need - 1)-th are close enough."""
    last = slice(need - 1, None)
    first = slice(None, max(event_L.numel() - need + 1, 0))
    met = (event_L[last] == event_L[first]) & (time_L[last] - time_L[first] <= window)
    return _windows(event_L[first], time_L[first], time_L[last])[met]


def _volume(event_L: Tensor, time_L: Tensor, xyz_3L: Tensor) -> Tensor:
    need, window, radius, half_height = VOLUME
    close = torch.ones_like(event_L)
    end = time_L.clone()
    for ahead in range(1, min(_LOOK_AHEAD, event_L.numel() - 1) + 1):
        apart = xyz_3L[:, ahead:] - xyz_3L[:, :-ahead]
        late = time_L[ahead:] - time_L[:-ahead]
        inside = (
            (event_L[ahead:] == event_L[:-ahead])
            & (late <= window)
            & (apart[:2].square().sum(0) <= radius**2)
            & (apart[2].abs() <= half_height)
        )
        close[:-ahead] += inside
        end[:-ahead] += torch.where(inside, time_L[ahead:] - end[:-ahead], 0)
    return _windows(event_L, time_L, end)[close >= need]


def _string(string_L: Tensor, time_L: Tensor, sensor_L: Tensor) -> Tensor:
    """string_L = event << 7 | string, launches sorted by string and time."""
    need, span, window = STRING
    hit = torch.full_like(string_L, 1 << (span - 1))  # bit b: the DOM b - (span - 1) below the first one
    end = time_L.clone()
    for ahead in range(1, min(_LOOK_AHEAD, string_L.numel() - 1) + 1):
        below = sensor_L[ahead:] - sensor_L[:-ahead] + span - 1
        inside = (
            (string_L[ahead:] == string_L[:-ahead])
            & (time_L[ahead:] - time_L[:-ahead] <= window)
            & (below >= 0)
            & (below < 2 * span - 1)
        )
        hit[:-ahead] |= torch.where(inside, 1 << below.clamp(0, 2 * span - 2), 0)
        end[:-ahead] += torch.where(inside, time_L[ahead:] - end[:-ahead], 0)
    met = torch.zeros_like(string_L, dtype=torch.bool)
    for low in range(span):
        met |= sum((hit >> bit) & 1 for bit in range(low, low + span)) >= need
    return _windows(string_L >> 7, time_L, end)[met]


def _windows(event_W: Tensor, start_W: Tensor, end_W: Tensor) -> Tensor:
    return (event_W << 34) | (start_W << 17) | end_W
