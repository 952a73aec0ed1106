"""The information limit on simulated data: the direction that maximises the simulator's own likelihood.

The oracle knows what no reconstruction of real data knows: the exact physics, whether the event is a track or a
cascade, the light of muons that came by chance, and the truth as one of the places where its climb starts. The other
start is the best of a coarse scan of directions, at the place that the first climb found; the higher maximum counts, so
that an event whose pulses speak for another direction is charged with the error. The errors of both climbs are kept:
the one from the truth is optimistic; the scan does not know the direction and may miss the maximum. See
`iceaggr.oracle.likelihood` for the approximations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.allocator import keep_freed_memory
from lab_shared.arrays import load_arrays, save_arrays
from lab_shared.progress import Counter
from lab_shared.runs import pick_device
from torch import Tensor

from iceaggr.data.kaggle import KaggleFolder, slice_events
from iceaggr.data.pulses import Pulses
from iceaggr.geometry import Geometry, icecube86
from iceaggr.metrics import opening_angle_deg, summary
from iceaggr.oracle.fit import higher, maximise, scan_and_climb
from iceaggr.oracle.hypothesis import Layout
from iceaggr.oracle.likelihood import Likelihood, observe_all
from iceaggr.oracle.observed import Observed
from iceaggr.oracle.truth import Known, folder_simulation, read_known, streamed_known
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import detector
from iceaggr.sim.feed import HELD_OUT_SEED
from iceaggr.sim.rng import check_seed
from iceaggr.sim.stream import iter_events

SCAN = 8
"""Directions of the coarse scan ..."""
STEPS = 25
"""... and most evaluations of one climb: a compromise with the time. More of both find higher maxima of some events;
that the mean error changes was not seen (RESULTS.md)."""
_CHUNK = {"cpu": 100_000, "cuda": 4_000_000}
"""Points and DOMs of all hypotheses that are worked on at once."""
_DOMS = 600
"""About so many DOMs see light of an event."""
_BRIGHT = 1500
"""Events with more points than this are not scanned: so many pulses are taken to leave no second maximum."""
SHORT = 0.5
"""ln L by which a climb must stay below another to count as one that missed the maximum."""
_CLIMBS = {"": "error_deg", "truth start, ": "truth_start_deg", "scan only, ": "scan_only_deg"}
"""Arrays of `fit_events` and what is written before the names of the groups in their summaries."""
LABEL = "simulated data"
VERSION = 3
"""Of likelihood and climb: errors that another version has kept are computed anew."""
STORE = "oracle.npz"
"""In a simulated folder: the errors of those of its events that were asked for."""


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
    """Arrays (E): error_deg; truth_start_deg and scan_only_deg, the errors of its two climbs; scan_won; scan_short,
    True where the scan's maximum is the lower one; evaluations. With self_test also twice the ln L that the fit gains
    over the truth with everything free (gain) and over the true direction with all else fitted (direction_gain)."""
    keep_freed_memory()
    array = detector(geometry, pulses.device)
    seen = observe_all(pulses, array, config, known.chance(config))
    result: dict[str, np.ndarray] = {}
    done = 0
    for index_X, is_track, directions in _chunks(seen, known, scan):
        layout = Layout(is_track, known.burst_energy_EB.shape[1] if is_track else 0)
        likelihood = Likelihood(seen[index_X], layout, array, config)
        truth_RX = known.rows(index_X, layout, likelihood.array, config)
        true_X3 = known.direction_E3[index_X]
        part = _fit_chunk(likelihood, truth_RX, true_X3, scan=directions, steps=steps, self_test=self_test)
        for name, values in part.items():
            into = result.setdefault(name, np.zeros(pulses.n_events))
            into[index_X.cpu().numpy()] = values.double().cpu().numpy()
        done += index_X.numel()
        if counter is not None:
            counter.show(done)
    return result


def _fit_chunk(
    likelihood: Likelihood,
    truth_RX: Tensor,
    true_X3: Tensor,
    *,
    scan: int,
    steps: int,
    self_test: bool,
) -> dict[str, Tensor]:
    every = torch.arange(truth_RX.shape[1], device=truth_RX.device)
    from_truth = maximise(likelihood, truth_RX, every, steps=steps)
    from_scan = scan_and_climb(likelihood, from_truth.rows_RS, scan=scan, steps=steps) if scan else from_truth
    fit, won_X = higher(from_truth, from_scan)
    part = {
        name: opening_angle_deg(-x.rows_RS[:3].T, true_X3)
        for name, x in (("error_deg", fit), ("truth_start_deg", from_truth), ("scan_only_deg", from_scan))
    }
    part |= {
        "scan_won": won_X,
        "scan_short": from_scan.value_S < from_truth.value_S - SHORT,
        "evaluations": from_truth.steps_S + from_scan.steps_S,
    }
    if self_test:
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
    steps: int = STEPS,
) -> dict[str, Any]:
    """The oracle on the first events of a simulated folder, or on newly simulated ones, with its self-test.

    scan, steps: directions of the coarse scan, and most evaluations of one climb.

    Returns {"label", "settings", "all", "track", "cascade", "n_pulses>=100", "self_test", "errors_deg" (by event),
    "text"}, the groups also as "truth start, ..." and "scan only, ..."; their figures are those of
    `iceaggr.metrics.summary`.

    Raises:
        UserError: no such device or seed, or the folder is no simulation, or was simulated without the truth that the
            oracle starts from.
    """
    where = pick_device(device)
    if data is None:
        check_seed(seed)
    parts: list[dict[str, np.ndarray]] = []
    done = 0
    with Counter(f"oracle on {where.type}", events, "events") as counter:
        for pulses, known, geometry, config in _source(data, events, seed, where):
            part = fit_events(pulses, known, geometry, config, scan=scan, steps=steps, self_test=True)
            part["n_pulses"] = pulses.counts_E.cpu().numpy()
            part["is_track"] = known.is_track_E.cpu().numpy() > 0
            parts.append(part)
            done += pulses.n_events
            counter.show(done)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    settings = {"events": done, "seed": seed, "scan": scan, "steps": steps, "data": str(data) if data else None}
    result: dict[str, Any] = {"label": LABEL, "device": str(where), "settings": settings}
    groups = {
        "all": np.ones(done, dtype=bool),
        "track": arrays["is_track"],
        "cascade": ~arrays["is_track"],
        "n_pulses>=100": arrays["n_pulses"] >= 100,
    }
    for name, chosen in groups.items():
        if chosen.any():
            for before, climb in _CLIMBS.items():
                result[before + name] = summary(arrays[climb][chosen])
                del result[before + name]["by"]
    result["scan_won"], result["scan_short"] = (float(arrays[name].mean()) for name in ("scan_won", "scan_short"))
    result["self_test"] = _self_test(arrays)
    result["errors_deg"] = [round(float(x), 3) for x in arrays["error_deg"]]
    return result | {"text": _text(result)}


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
    for name in ("all", "track", "cascade", "n_pulses>=100", "truth start, all", "scan only, all"):
        if name in result:
            figures = result[name]
            mean, median = (_interval(figures[key]) for key in ("mean_deg", "median_deg"))
            tails = "  ".join(f"{key} {figures[key]['value']:.1f}" for key in ("p10", "p25", "p75", "p90"))
            lines.append(f"{name:16} {figures['n']:7,}  mean {mean}  median {median}  {tails}")
    lines.append(
        f"the scan found a higher maximum than the climb from the truth in {result['scan_won']:.1%} of them, "
        f"a lower one in {result['scan_short']:.1%}"
    )
    for name, row in result["self_test"].items():
        shares = ", ".join(f"{key.removeprefix('within ')} region {row[key]:.1%}" for key in row if "within" in key)
        lines.append(f"self-test, coverage of the truth, {name} ({row['dof']} degrees of freedom): {shares}")
    return "\n".join(lines)


def _interval(x: dict[str, float | None]) -> str:
    low, high = x["low"], x["high"]
    return f"{x['value']:6.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


def held_out_errors(folder: Path, pulses: Pulses, device: torch.device) -> np.ndarray:
    """Oracle errors (degrees) of a simulated folder's events, in the order of `pulses`.

    They depend on nothing but the events, so that they are kept in FOLDER/oracle.npz and computed once for all runs.
    Held-out events of a stream are in no folder: they are simulated again.

    Raises:
        UserError: as from `folder_simulation`, `read_known` and `streamed_known`, or the file is damaged.
    """
    ids, store = pulses.event_id_E.numpy(), Path(folder) / STORE
    if (ids >> 31 == HELD_OUT_SEED).all() and not (Path(folder) / "simulation.json").exists():
        known = streamed_known(pulses, device)
        with Counter(f"oracle on {device.type}", ids.size, "events") as counter:
            return fit_events(pulses.to(device), known, icecube86(), SimConfig(), counter=counter)["error_deg"]
    geometry, config = folder_simulation(folder)
    known_id, known_error = np.zeros(0, dtype=np.int64), np.zeros(0)
    if store.exists():
        saved = load_arrays(store)
        if (int(saved["scan"]), int(saved.get("version", 1))) == (SCAN, VERSION):
            known_id, known_error = saved["event_id"], saved["error_deg"]
    if not np.isin(ids, known_id).all():
        known = read_known(folder, ids, config, device)
        with Counter(f"oracle on {device.type}", ids.size, "events") as counter:
            errors = fit_events(pulses.to(device), known, geometry, config, counter=counter)["error_deg"]
        new = ~np.isin(known_id, ids)
        known_id, known_error = np.append(known_id[new], ids), np.append(known_error[new], errors)
        made_by = {"scan": np.array(SCAN), "version": np.array(VERSION)}
        save_arrays(store, event_id=known_id, error_deg=known_error, **made_by)
    order = np.argsort(known_id)
    return known_error[order[np.searchsorted(known_id[order], ids)]]
