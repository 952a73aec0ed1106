"""The information limit on simulated data: the direction that maximises the simulator's own likelihood.

The oracle knows what no reconstruction of real data knows: the exact physics, whether the event is a track or a
cascade, the light of muons that came by chance, and the truth as one of the places where its climb starts. The other
start is the best of a coarse scan of directions; the higher maximum counts, so an event whose pulses speak for another
direction is charged with the error. See `iceaggr.oracle_likelihood` for the approximations.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.allocator import keep_freed_memory
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from lab_shared.progress import Counter
from torch import Tensor

from iceaggr.data.kaggle import KaggleFolder, slice_events
from iceaggr.data.parquet import read_columns
from iceaggr.data.prepare import folder_geometry
from iceaggr.data.pulses import Pulses
from iceaggr.directions import angles_to_vector
from iceaggr.geometry import Geometry, icecube86
from iceaggr.metrics import opening_angle_deg, summary
from iceaggr.oracle_fit import maximise, maximise_globally
from iceaggr.oracle_likelihood import Layout, Likelihood, Observed, observe
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector, detector
from iceaggr.sim.events import Truth
from iceaggr.sim.spectrum import LIGHT_SPEED, Bursts, Tracks, muon_range
from iceaggr.sim.stream import iter_events

SCAN = 8
"""Directions of the coarse scan."""
STEPS = 25
"""Most evaluations of one climb."""
_CHUNK = {"cpu": 100_000, "cuda": 4_000_000}
"""Points and DOMs of all hypotheses that are worked on at once."""
_DOMS = 600
"""About so many DOMs see light of an event."""
_BRIGHT = 1500
"""Events with more points than this are not scanned: so many pulses are taken to leave no second maximum."""
_NO_LIGHT = 1.0
"""GeV at which an absent loss of a muon starts its fit."""
LABEL = "simulated data"
STORE = "oracle.npz"
"""In a simulated folder: the errors of those of its events that were asked for."""


@dataclass(frozen=True, eq=False)
class Known:
    """What the oracle starts from: fields of `iceaggr.sim.events.Truth`, in float64 on the device of the pulses."""

    energy_E: Tensor
    is_track_E: Tensor
    vertex_E3: Tensor
    time_E: Tensor
    azimuth_E: Tensor
    zenith_E: Tensor
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
        return cls(**{f.name: _float64(getattr(truth, f.name)) for f in fields(cls)})

    @property
    def direction_E3(self) -> Tensor:
        """Where the neutrino came from."""
        return angles_to_vector(self.azimuth_E, self.zenith_E)

    def rows(self, index_X: Tensor, layout: Layout, config: SimConfig) -> Tensor:
        """(R, X): the truth about these events, all of one type, as hypotheses.

        The point of a track is the one nearest the array's centre. Whether a cascade was a neutral current is not
        known: the charged-current light is assumed.
        """
        travel, vertex, time = -self.direction_E3[index_X], self.vertex_E3[index_X], self.time_E[index_X]
        energy, y = self.energy_E[index_X], self.inelasticity_E[index_X]
        hadronic = config.hadronic_light * y * energy
        if not layout.is_track:
            light = (1 - y) * energy + hadronic
            return torch.cat((travel.T, vertex.T, time[None], light.log()[None]))
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


def fit_events(
    pulses: Pulses,
    known: Known,
    geometry: Geometry,
    config: SimConfig,
    *,
    scan: int = SCAN,
    steps: int = STEPS,
    self_test: bool = False,
    counter: Counter | None = None,
) -> dict[str, np.ndarray]:
    """Arrays (E): error_deg, scan_won, evaluations; with self_test also twice the ln L that the fit gains over the
    truth with everything free (gain) and over the true direction with all else fitted (direction_gain)."""
    keep_freed_memory()
    array = detector(geometry, pulses.device)
    seen = observe(pulses, array, config, known.chance(config))
    names = ["error_deg", "scan_won", "evaluations", *(["gain", "direction_gain"] if self_test else [])]
    result = {name: np.zeros(pulses.n_events) for name in names}
    done = 0
    for index_X, is_track, directions in _chunks(seen, known, scan):
        layout = Layout(is_track, known.burst_energy_EB.shape[1] if is_track else 0)
        part = _fit_chunk(
            seen, index_X, known, layout, array, config, scan=directions, steps=steps, self_test=self_test
        )
        for name, values in part.items():
            result[name][index_X.cpu().numpy()] = values.double().cpu().numpy()
        done += index_X.numel()
        if counter is not None:
            counter.show(done)
    return result


def _fit_chunk(
    seen: Observed,
    index_X: Tensor,
    known: Known,
    layout: Layout,
    array: Detector,
    config: SimConfig,
    *,
    scan: int,
    steps: int,
    self_test: bool,
) -> dict[str, Tensor]:
    likelihood = Likelihood(seen[index_X], layout, array, config)
    truth_RX = known.rows(index_X, layout, config)
    fit, won_X = maximise_globally(likelihood, truth_RX, scan=scan, steps=steps)
    part = {
        "error_deg": opening_angle_deg(-fit.rows_RS[:3].T, known.direction_E3[index_X]),
        "scan_won": won_X,
        "evaluations": fit.steps_S,
    }
    if self_test:
        every = torch.arange(index_X.numel(), device=index_X.device)
        part["gain"] = 2 * (fit.value_S - likelihood.value(truth_RX, every))
        held = maximise(likelihood, truth_RX, every, steps=steps, fixed_direction=True)
        part["direction_gain"] = 2 * (fit.value_S - held.value_S)
    return part


def _chunks(seen: Observed, known: Known, scan: int) -> Iterator[tuple[Tensor, bool, int]]:
    """(events, whether they are tracks, directions to scan): of similar size, as many as fit at once."""
    points_E = seen.offsets_E1.diff()
    for is_track in (False, True):
        for bright in (False, True):
            chosen = ((known.is_track_E > 0) == is_track) & ((points_E > _BRIGHT) == bright)
            index = chosen.nonzero().squeeze(1)
            index = index[torch.argsort(points_E[index])]
            directions = 0 if bright else scan
            cost = (points_E[index] + _DOMS) * max(directions, 1)
            groups = torch.div(cost.cumsum(0), _CHUNK[cost.device.type], rounding_mode="floor").cpu()
            _, sizes = torch.unique_consecutive(groups, return_counts=True)
            for part in torch.split(index, sizes.tolist()):
                if part.numel():
                    yield part, is_track, directions


def run_oracle(
    *,
    data: Path | None = None,
    events: int,
    seed: int = 0,
    device: str | None = None,
    scan: int = SCAN,
) -> dict[str, Any]:
    """The oracle on the first events of a simulated folder, or on newly simulated ones, with its self-test.

    Returns {"label", "settings", "all", "track", "cascade", "n_pulses>=100", "self_test", "text"}; the figures are
    those of `iceaggr.metrics.summary`.

    Raises:
        UserError: the folder is no simulation, or was simulated without the truth that the oracle starts from.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    parts: list[dict[str, np.ndarray]] = []
    done = 0
    with Counter(f"oracle on {where.type}", events, "events") as counter:
        for pulses, known, geometry, config in _source(data, events, seed, where):
            part = fit_events(pulses, known, geometry, config, scan=scan, self_test=True)
            part["n_pulses"] = pulses.counts_E.cpu().numpy()
            part["is_track"] = known.is_track_E.cpu().numpy() > 0
            parts.append(part)
            done += pulses.n_events
            counter.show(done)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    settings = {"events": done, "seed": seed, "scan": scan, "steps": STEPS, "data": str(data) if data else None}
    result: dict[str, Any] = {"label": LABEL, "device": str(where), "settings": settings}
    groups = {
        "all": np.ones(done, dtype=bool),
        "track": arrays["is_track"],
        "cascade": ~arrays["is_track"],
        "n_pulses>=100": arrays["n_pulses"] >= 100,
    }
    for name, chosen in groups.items():
        if chosen.any():
            result[name] = summary(arrays["error_deg"][chosen])
            del result[name]["by"]
    result["scan_won"] = float(arrays["scan_won"].mean())
    result["self_test"] = _self_test(arrays)
    return result | {"text": _text(result)}


def folder_simulation(folder: Path) -> tuple[Geometry, SimConfig]:
    """The array and the physics a folder was simulated with. UserError for a folder that is no simulation."""
    record = Path(folder) / "simulation.json"
    if not record.exists():
        raise UserError(f"{folder} has no simulation.json: the oracle needs simulated events, whose physics is known")
    saved = json.loads(record.read_text())["config"]
    config: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items()}
    return folder_geometry(folder), SimConfig(**config)


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


_COLUMNS = {
    "energy_E": "energy",
    "time_E": "t0",
    "azimuth_E": "azimuth",
    "zenith_E": "zenith",
    "muon_energy_E": "muon_energy",
    "inelasticity_E": "inelasticity",
    "chance_energy_E": "chance_energy",
    "chance_start_E": "chance_start",
    "chance_time_E": "chance_time",
}


def _source(
    data: Path | None, events: int, seed: int, device: torch.device
) -> Iterator[tuple[Pulses, Known, Geometry, SimConfig]]:
    if data is None:
        config, geometry = SimConfig(), icecube86()
        for pulses, truth in iter_events(events, seed=seed, device=device):
            yield pulses, Known.of(truth), geometry, config
        return
    geometry, config = folder_simulation(data)
    folder = KaggleFolder(data)
    done = 0
    for batch in folder.batch_ids:
        if done == events:
            return
        pulses = folder.read_batch(batch)
        pulses = slice_events(pulses, 0, min(pulses.n_events, events - done))
        done += pulses.n_events
        known = read_known(data, pulses.event_id_E.numpy(), config, device)
        yield pulses.to(device), known, geometry, config


def _self_test(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Coverage of likelihood-ratio regions: how often 2 Delta ln L of the truth is below the chi-square quantile.

    The true direction has 2 degrees of freedom with all else fitted; a whole cascade has 7. A track's losses have no
    fixed number (those too faint to see are not fitted), so that it has no second line.
    """
    rows: dict[str, Any] = {}
    for name, gain, dof in (
        ("direction", arrays["direction_gain"], 2),
        ("cascade, all", arrays["gain"][~arrays["is_track"]], 7),
    ):
        if gain.size:
            below = torch.special.gammainc(torch.tensor(dof / 2.0), torch.from_numpy(gain).float().clamp(min=0) / 2)
            rows[name] = {"dof": dof, "n": int(gain.size)}
            rows[name] |= {f"within {p:.0%}": float((below <= p).float().mean()) for p in (0.5, 0.9, 0.99)}
    return rows


def _text(result: dict[str, Any]) -> str:
    n = result["all"]["n"]
    lines = [f"Oracle: opening angle in degrees, {n:,} events ({LABEL}), 95% intervals"]
    for name in ("all", "track", "cascade", "n_pulses>=100"):
        if name in result:
            figures = result[name]
            mean, median = (_interval(figures[key]) for key in ("mean_deg", "median_deg"))
            tails = "  ".join(f"{key} {figures[key]['value']:.1f}" for key in ("p10", "p25", "p75", "p90"))
            lines.append(f"{name:14} {figures['n']:7,}  mean {mean}  median {median}  {tails}")
    lines.append(f"the scan found a higher maximum than the climb from the truth in {result['scan_won']:.1%} of them")
    for name, row in result["self_test"].items():
        shares = ", ".join(f"{key.removeprefix('within ')} region {row[key]:.1%}" for key in row if "within" in key)
        lines.append(f"self-test, coverage of the truth, {name} ({row['dof']} degrees of freedom): {shares}")
    return "\n".join(lines)


def _interval(x: dict[str, float | None]) -> str:
    low, high = x["low"], x["high"]
    return f"{x['value']:6.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


def _float64(x: Tensor) -> Tensor:
    return x.double()


def held_out_errors(folder: Path, pulses: Pulses, device: torch.device) -> np.ndarray:
    """Oracle errors (degrees) of a simulated folder's events, in the order of `pulses`.

    They depend on nothing but the events, so that they are kept in FOLDER/oracle.npz and computed once for all runs.

    Raises:
        UserError: as from `folder_simulation` and `read_known`.
    """
    geometry, config = folder_simulation(folder)
    ids, store = pulses.event_id_E.numpy(), Path(folder) / STORE
    known_id, known_error = np.zeros(0, dtype=np.int64), np.zeros(0)
    if store.exists():
        with np.load(store, allow_pickle=False) as saved:
            if int(saved["scan"]) == SCAN:
                known_id, known_error = saved["event_id"], saved["error_deg"]
    if not np.isin(ids, known_id).all():
        known = read_known(folder, ids, config, device)
        with Counter(f"oracle on {device.type}", ids.size, "events") as counter:
            errors = fit_events(pulses.to(device), known, geometry, config, counter=counter)["error_deg"]
        new = ~np.isin(known_id, ids)
        known_id, known_error = np.append(known_id[new], ids), np.append(known_error[new], errors)
        content = io.BytesIO()
        np.savez(content, event_id=known_id, error_deg=known_error, scan=SCAN)
        atomic_write(store, content.getvalue())
    order = np.argsort(known_id)
    return known_error[order[np.searchsorted(known_id[order], ids)]]
