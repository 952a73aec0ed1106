"""One event's answer as a map of the sky: density, 50% and 90% regions, and their areas in square degrees.

`iceaggr.skymap_files` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iceaggr.calibrate import Calibration
from iceaggr.calibration import sharpness
from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.uncertainty import Array, Mixture, containment, credible_regions, log_density, mean_direction

LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Region:
    """The smallest part of the sky that holds a share of the probability."""

    level: float
    """Share of events it is to hold."""
    nominal: float
    """Its probability under the model; differs from `level` where a calibration says so."""
    log_threshold: float
    """It is where log p (per steradian) exceeds this."""
    area_deg2: float


@dataclass(frozen=True)
class SkyMap:
    mixture: Mixture
    """Of this one event, calibrated if the run is."""
    regions: list[Region]
    event_id: int
    label: str
    """What data it is: "simulated data"."""
    calibrated: str
    """Which calibration was applied, in words."""
    true: Array | None = None
    """(3,) unit vector."""

    @property
    def best(self) -> Array:
        """(3,) unit vector: the mean direction."""
        return mean_direction(self.mixture)[0]

    def summary(self) -> dict[str, Any]:
        """The figures, ready for JSON; angles in degrees."""
        azimuth, zenith = vector_to_angles(self.best)
        result: dict[str, Any] = {
            "event_id": self.event_id,
            "label": self.label,
            "azimuth_deg": float(np.rad2deg(azimuth)),
            "zenith_deg": float(np.rad2deg(zenith)),
            "kappa": float(sharpness(self.mixture)[0]),
            "components": self.mixture.weight_EK.shape[1],
            "calibration": self.calibrated,
            "regions": [{"level": r.level, "nominal": r.nominal, "area_deg2": r.area_deg2} for r in self.regions],
        }
        if self.true is not None:
            u = float(containment(self.mixture, self.true[None])[0])
            inside = float(log_density(self.mixture, self.true[None])[0, 0])
            result["true_at_probability"] = u
            result["true_inside"] = {f"{r.level:.0%}": inside >= r.log_threshold for r in self.regions}
        return result


def event_skymap(run_dir: Path, folder: Path, event_id: int, *, device: str | None = None) -> SkyMap:
    """The map of one event of a folder under a run's model, calibrated if `iceaggr calibrate` has been there."""
    from lab_shared.runs import pick_device

    from iceaggr.calibrate import load_calibration
    from iceaggr.data.cache import EventCache
    from iceaggr.data.features import Tables
    from iceaggr.data.kaggle import KaggleFolder
    from iceaggr.data.prepare import data_label, folder_geometry
    from iceaggr.predict import load_run, predict_events, predict_outputs

    where = pick_device(device)
    config, model = load_run(run_dir, where)
    pulses = KaggleFolder(folder).read_event(event_id)
    tables = Tables.of(folder_geometry(folder, config.data.geometry), where)
    several = config.model.head_mixture > 1
    # rotations at test time average single vectors; a mixture is shown as the model gives it
    predict = predict_outputs if several else predict_events
    out_EC = predict(model, EventCache.in_memory(pulses), np.zeros(1, dtype=np.int64), config, tables)
    true = None
    if pulses.azimuth_E is not None and pulses.zenith_E is not None:
        true = angles_to_vector(pulses.azimuth_E.numpy(), pulses.zenith_E.numpy())[0]
    calibration = load_calibration(run_dir, mixture=several)
    return sky_map(
        Mixture.of_output(out_EC),
        event_id=event_id,
        label=data_label(folder),
        calibration=calibration,
        said="none (run `iceaggr calibrate`)" if calibration is None else calibration.said(run_dir),
        true=true,
    )


def sky_map(
    mixture: Mixture,
    *,
    event_id: int,
    label: str,
    calibration: Calibration | None = None,
    said: str = "none",
    true: Array | None = None,
    levels: Sequence[float] = LEVELS,
) -> SkyMap:
    """The map of one event, from the raw mixture of the model (one row) and the run's calibration."""
    nominal = list(levels)
    if calibration is not None:
        mixture = mixture.tempered(calibration.temperature)
        confidence = float(sharpness(mixture)[0])
        nominal = [float(np.clip(calibration.levels.wanted(level, confidence), 1e-4, 1 - 1e-4)) for level in levels]
    threshold_EL, area_EL = credible_regions(mixture, nominal)
    regions = [
        Region(level, n, float(threshold), float(area))
        for level, n, threshold, area in zip(levels, nominal, threshold_EL[0], area_EL[0], strict=True)
    ]
    return SkyMap(mixture, regions, event_id, label, said, true)


def text(sky: SkyMap) -> str:
    """The figures as aligned lines."""
    found = sky.summary()
    lines = [
        f"event {sky.event_id} ({sky.label}): zenith {found['zenith_deg']:.2f}°, azimuth {found['azimuth_deg']:.2f}°, "
        f"kappa {found['kappa']:.4g}, components {found['components']}",
        f"calibration: {sky.calibrated}",
    ]
    for region in sky.regions:
        inside = found.get("true_inside", {}).get(f"{region.level:.0%}")
        verdict = "" if inside is None else f"  truth {'inside' if inside else 'outside'}"
        lines.append(
            f"{region.level:4.0%} region  {region.area_deg2:12,.4g} deg²  nominal {region.nominal:.1%}{verdict}"
        )
    return "\n".join(lines)
