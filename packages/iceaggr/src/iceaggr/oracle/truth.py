"""What the oracle knows of simulated events: their truth, from the simulator or from a simulated folder.

Suffixes as in `iceaggr.oracle.likelihood`; B stochastic losses of a muon.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.report_files import read_object
from torch import Tensor

from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.parquet import read_columns
from iceaggr.data.prepare import folder_geometry
from iceaggr.data.pulses import Pulses
from iceaggr.directions import angles_to_vector
from iceaggr.geometry import Geometry
from iceaggr.oracle.hypothesis import Layout, shower_array_light
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector
from iceaggr.sim.events import Truth
from iceaggr.sim.feed import HELD_OUT_SEED
from iceaggr.sim.spectrum import LIGHT_SPEED, Bursts, Tracks, muon_range
from iceaggr.sim.stream import iter_events

_NO_LIGHT = 1.0
"""GeV at which an absent loss of a muon starts its fit."""


@dataclass(frozen=True, eq=False)
class Known:
    """What the oracle starts from: fields of `iceaggr.sim.events.Truth`, in float64 on the device of the pulses."""

    energy_E: Tensor
    is_track_E: Tensor
    vertex_E3: Tensor
    time_E: Tensor
    azimuth_E: Tensor
    zenith_E: Tensor
    visible_E: Tensor
    muon_energy_E: Tensor
    inelasticity_E: Tensor
    burst_place_EB: Tensor
    burst_energy_EB: Tensor
    chance_energy_E: Tensor
    chance_start_E: Tensor
    chance_point_E3: Tensor
    chance_direction_E3: Tensor
    chance_time_E: Tensor
    chance_burst_place_EB: Tensor
    chance_burst_energy_EB: Tensor

    @classmethod
    def of(cls, truth: Truth) -> Known:
        return cls(**{f.name: getattr(truth, f.name).double() for f in fields(cls)})

    @property
    def direction_E3(self) -> Tensor:
        """Where the neutrino came from."""
        return angles_to_vector(self.azimuth_E, self.zenith_E)

    def rows(self, index_X: Tensor, layout: Layout, array: Detector, config: SimConfig) -> Tensor:
        """(R, X): the truth about these events, all of one type, as hypotheses.

        The point of a track is the one nearest the array's centre. A cascade was a neutral or a charged current,
        whichever explains the light that the simulation recorded (`visible_E`). `array` in float64.
        """
        travel, vertex, time = -self.direction_E3[index_X], self.vertex_E3[index_X], self.time_E[index_X]
        energy, y = self.energy_E[index_X], self.inelasticity_E[index_X]
        hadronic = config.hadronic_light * y * energy
        if not layout.is_track:
            kinds = [
                torch.cat((travel.T, vertex.T, time[None], light.log()[None]))
                for light in ((1 - y) * energy + hadronic, hadronic.clamp(min=_NO_LIGHT))
            ]
            visible = self.visible_E[index_X]
            charged, neutral = ((shower_array_light(rows, array, config) - visible).abs() for rows in kinds)
            return torch.where(neutral < charged, kinds[1], kinds[0])
        along = -(vertex * travel).sum(1)
        place = self.burst_place_EB[index_X] - along[:, None]
        loss = self.burst_energy_EB[index_X]
        place = torch.where(loss > 0, place, torch.linspace(-300, 300, layout.losses, device=loss.device).double())
        return torch.cat(
            (
                travel.T,
                (vertex + along[:, None] * travel).T,
                (time + along / LIGHT_SPEED)[None],
                -along[None],
                place.T,
                hadronic.clamp(min=_NO_LIGHT).log()[None],
                loss.clamp(min=_NO_LIGHT).log().T,
                self.muon_energy_E[index_X].log()[None],
            )
        )

    def chance(self, config: SimConfig) -> tuple[Tracks, Bursts]:
        """The muons that came by chance."""
        event = (self.chance_energy_E > 0).nonzero().squeeze(1)
        start, energy = self.chance_start_E[event], self.chance_energy_E[event]
        tracks = Tracks(
            event,
            self.chance_point_E3[event],
            self.chance_direction_E3[event],
            start,
            start + muon_range(energy, config),
            energy,
            self.chance_time_E[event],
            torch.zeros_like(event, dtype=torch.bool),
        )
        return tracks, Bursts(self.chance_burst_place_EB[event], self.chance_burst_energy_EB[event])


def folder_simulation(folder: Path) -> tuple[Geometry, SimConfig]:
    """The array and the physics a folder was simulated with. UserError for a folder that is no simulation."""
    record = Path(folder) / "simulation.json"
    found = read_object(record)
    if found is None:
        raise UserError(f"{folder} has no simulation.json: the oracle needs simulated events, whose physics is known")
    try:
        config: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found["config"].items()}
        return folder_geometry(folder), SimConfig(**config)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{record} does not say how {folder} was simulated: the oracle needs to know") from error


def read_known(folder: Path, event_ids: np.ndarray, config: SimConfig, device: torch.device) -> Known:
    """Truth of these events from a simulated folder's truth.parquet.

    Raises:
        UserError: the folder has no truth, or one without the columns of muon losses and chance muons.
    """
    import polars as pl

    file = KaggleFolder(folder).truth_file
    if file is None:
        raise UserError(f"{folder} has no truth.parquet: the oracle needs the truth of simulated events")
    slots = range(1, config.burst_slots + 1)
    columns = {name: [column] for name, column in _COLUMNS.items()}
    columns |= {f"{name}_E3": [f"{name}_{i}" for i in (1, 2, 3)] for name in ("chance_point", "chance_direction")}
    for name in ("burst_place", "burst_energy", "chance_burst_place", "chance_burst_energy"):
        columns[f"{name}_EB"] = [f"{name}_{i}" for i in slots]
    columns["vertex_E3"] = ["x", "y", "z"]
    wanted = {"event_id": "Int64", "type": "String"} | {c: "Float64" for group in columns.values() for c in group}
    if missing := set(wanted) - set(pl.read_parquet_schema(file)):
        raise UserError(
            f"{file} lacks {', '.join(sorted(missing)[:3])}: it was simulated by an older version; simulate it again"
        )
    table = read_columns(file, wanted, where=pl.col("event_id").is_in(event_ids.tolist()))
    order = np.argsort(table["event_id"])
    row_E = order[np.searchsorted(table["event_id"][order], event_ids).clip(max=len(order) - 1)]
    if not np.array_equal(table["event_id"][row_E], event_ids):
        raise UserError(f"{file} does not have every event of the pulses: simulate {folder} again")
    tensors = {
        name: torch.from_numpy(np.stack([table[c][row_E] for c in group], axis=1)).to(device, torch.float64)
        for name, group in columns.items()
    }
    tensors = {name: x if name.endswith(("3", "B")) else x[:, 0] for name, x in tensors.items()}
    is_track = torch.from_numpy((table["type"][row_E] == "track").astype(np.float64)).to(device)
    return Known(is_track_E=is_track, **tensors)


def streamed_known(pulses: Pulses, device: torch.device) -> Known:
    """Truth of events that `iceaggr.sim.feed.held_out_store` made: they are simulated again.

    Raises:
        UserError: other events come out, as on another kind of device or with another array.
    """
    assert pulses.azimuth_E is not None  # held-out events are labelled
    row_X = pulses.event_id_E.cpu() - (HELD_OUT_SEED << 31)
    blocks = iter_events(int(row_X.max()) + 1, seed=HELD_OUT_SEED, device=device)
    parts = [Known.of(truth) for _, truth in blocks]
    known = Known(**{f.name: torch.cat([getattr(part, f.name) for part in parts])[row_X] for f in fields(Known)})
    if not torch.equal(known.azimuth_E.cpu(), pulses.azimuth_E.cpu()):
        raise UserError(
            f"the held-out events cannot be simulated again on {device.type}: they are of another kind of device or "
            "another array. Score the run where it was trained, or a simulated folder with --data DIR"
        )
    return known


_COLUMNS = {
    "energy_E": "energy",
    "time_E": "t0",
    "azimuth_E": "azimuth",
    "zenith_E": "zenith",
    "visible_E": "visible",
    "muon_energy_E": "muon_energy",
    "inelasticity_E": "inelasticity",
    "chance_energy_E": "chance_energy",
    "chance_start_E": "chance_start",
    "chance_time_E": "chance_time",
}
