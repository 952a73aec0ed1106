"""What an event may have been, as columns of numbers that can be moved, and the light sources they stand for.

Suffixes: S hypotheses, R numbers of one, K its free directions, M muons.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector
from iceaggr.sim.light import shower_light, shower_pairs
from iceaggr.sim.spectrum import LIGHT_SPEED, Bursts, Showers, Tracks, muon_range


@dataclass(frozen=True)
class Layout:
    """Rows of hypotheses: 0-2 unit vector of travel, 3-5 a point (m), 6 the time there (ns), then for

    a cascade: 7 the log of the shower's energy (GeV of electromagnetic light);
    a track: 7 where the muon starts (m from the point), then where its losses are, the log energies of the hadronic
    shower at the start and of the losses, and last that of the muon at its start.
    """

    is_track: bool
    losses: int = 0

    @property
    def showers(self) -> int:
        return 1 + self.losses

    @property
    def width(self) -> int:
        return 8 + 2 * self.showers if self.is_track else 8

    @property
    def free(self) -> int:
        """Directions in which it can move: a unit vector has two, and a point along its track none."""
        return self.width - (2 if self.is_track else 1)

    @property
    def log_energies(self) -> slice:
        """Its rows of log energies."""
        return slice(7 + self.showers, self.width) if self.is_track else slice(7, 8)

    @property
    def scale(self) -> list[float]:
        """(K) what counts as one step in each free direction: radians, m, ns and logs."""
        place = [100.0] * (2 if self.is_track else 3)
        rest = [100.0] * self.showers + [2.0] * (self.showers + 1) if self.is_track else [2.0]
        return [1.0, 1.0, *place, 300.0, *rest]

    def move(self, rows_RS: Tensor, frame_6S: Tensor, step_KS: Tensor) -> Tensor:
        """Hypotheses after a step in their free directions; `frame_6S` as from `frame`."""
        rows, axes, step = rows_RS.unbind(), frame_6S.unbind(), step_KS.unbind()
        travel = [x + step[0] * a + step[1] * b for x, a, b in zip(rows[:3], axes[:3], axes[3:], strict=True)]
        length = (travel[0].square() + travel[1].square() + travel[2].square()).sqrt()
        if self.is_track:
            point = [x + step[2] * a + step[3] * b for x, a, b in zip(rows[3:6], axes[:3], axes[3:], strict=True)]
            rest = [x + dx for x, dx in zip(rows[6:], step[4:], strict=True)]
        else:
            point = [x + dx for x, dx in zip(rows[3:6], step[2:5], strict=True)]
            rest = [x + dx for x, dx in zip(rows[6:], step[5:], strict=True)]
        return torch.stack([*(x / length for x in travel), *point, *rest])

    def shower(self, rows_RS: Tensor, slot: int) -> Showers:
        """One shower of each hypothesis."""
        rows = rows_RS.unbind()
        place, log_energy = (rows[7 + slot], rows[7 + self.showers + slot]) if self.is_track else (0.0, rows[7])
        point = torch.stack([x + place * u for x, u in zip(rows[3:6], rows[:3], strict=True)])
        lit = torch.ones_like(rows[0], dtype=torch.bool)
        number = torch.arange(rows_RS.shape[1], device=rows_RS.device)
        return Showers(number, point.T, rows_RS[:3].T, log_energy.exp(), rows[6] + place / LIGHT_SPEED, lit)

    def muon(self, rows_RS: Tensor, config: SimConfig) -> Tracks:
        """The muon of each hypothesis about a track."""
        rows = rows_RS.unbind()
        start, energy = rows[7], rows[-1].exp()
        lit = torch.ones_like(start, dtype=torch.bool)
        number = torch.arange(rows_RS.shape[1], device=rows_RS.device)
        stop = start + muon_range(energy, config)
        return Tracks(number, rows_RS[3:6].T, rows_RS[:3].T, start, stop, energy, rows[6], lit)


def frame(rows_RS: Tensor) -> Tensor:
    """(6, S): two unit vectors at right angles to each direction and to each other."""
    travel = rows_RS[:3]
    axis = torch.zeros_like(travel)
    steep = travel[2].abs() > 0.9
    axis[0], axis[2] = steep.to(axis), (~steep).to(axis)
    first = torch.linalg.cross(travel, axis, dim=0)
    first = first / first.norm(dim=0)
    return torch.cat((first, torch.linalg.cross(travel, first, dim=0)))


def muon_rows(tracks: Tracks, bursts: Bursts) -> Tensor:
    """(R, M): muons without a hadronic shower as hypotheses."""
    log = [torch.full_like(tracks.start_M[:, None], -7.0), bursts.energy_MB.clamp(min=1e-3).log()]
    log.append(tracks.energy_M[:, None].log())
    known = [tracks.direction_M3, tracks.anchor_M3, tracks.time_M[:, None], tracks.start_M[:, None], bursts.place_MB]
    return torch.cat([x.double() for x in (*known, *log)], dim=1).T


def shower_array_light(rows_RS: Tensor, array: Detector, config: SimConfig) -> Tensor:
    """(S) photo-electrons that cascades are expected to leave in the whole array."""
    showers = Layout(False).shower(rows_RS, 0)
    source_Q, sensor_Q = shower_pairs(showers, array, config)
    expected_Q = shower_light(showers, source_Q, sensor_Q, array, config).expected_Q
    return torch.zeros_like(rows_RS[0]).index_add(0, source_Q, expected_Q)


def double(array: Detector) -> Detector:
    """The same array in float64."""
    tables: dict[str, Any] = {f.name: getattr(array, f.name) for f in fields(array)}
    floats = {name: x.double() for name, x in tables.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return Detector(**(tables | floats))
