"""One event's answer as a map of the sky: density, 50% and 90% contours, and their areas in square degrees.

FILE.png and FILE.html need matplotlib alone: a Mollweide map of the whole sky, and beside it the neighbourhood of the
answer in Lambert's azimuthal equal-area projection, so that a region of one square degree is seen as well as one of
ten thousand. FILE.fits is a HEALPix map of the same probabilities, and needs healpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.errors import UserError, needs
from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page
from lab_shared.plotting import GREY, INK, RED, style, to_png

from iceaggr.calibrate import Calibration
from iceaggr.calibration import sharpness
from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.uncertainty import Array, Mixture, containment, credible_regions, log_density, mean_direction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (0.5, 0.9)
_LINES = {0.5: "-", 0.9: (0, (4, 2))}
_WIDEST = 90.0  # deg, radius of the neighbourhood
_SMALLEST_NSIDE, _LARGEST_NSIDE = 64, 1024


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


def write_skymap(path: Path, sky: SkyMap) -> Path:
    """Write FILE.png, FILE.html or FILE.fits. Raises UserError for another ending, or .fits without healpy."""
    make_folder(path.parent)
    if path.suffix == ".png":
        atomic_write(path, to_png(figure(sky)))
    elif path.suffix == ".html":
        _page(sky).write(path)
    elif path.suffix == ".fits":
        write_healpix(path, sky)
    else:
        raise UserError(f"{path}: a sky map is written as .png, .html or .fits (HEALPix)")
    return path


def figure(sky: SkyMap) -> Figure:
    """The whole sky (Mollweide, straight down-going on top) and the neighbourhood of the answer (equal-area)."""
    from matplotlib.figure import Figure

    with style():
        fig = Figure(figsize=(9.4, 3.9), layout="constrained")
        whole = fig.add_subplot(1, 2, 1, projection="mollweide")
        near = fig.add_subplot(1, 2, 2)
        longitude, latitude = np.linspace(-np.pi, np.pi, 481), np.linspace(-np.pi / 2, np.pi / 2, 241)
        mesh = np.meshgrid(longitude, latitude)
        _draw(whole, *mesh, angles_to_vector(mesh[0] + np.pi, np.pi / 2 - mesh[1]), sky)
        for name, direction, marker in _marks(sky):
            azimuth, zenith = vector_to_angles(direction)
            whole.plot(azimuth - np.pi, np.pi / 2 - zenith, marker, color=RED, markersize=7, label=name)
        whole.set_xticks(np.radians(range(-120, 121, 60)), [f"{a}°" for a in range(60, 301, 60)], fontsize=7.5)
        whole.set_yticks(np.radians(range(60, -61, -30)), [f"{z}°" for z in range(30, 151, 30)], fontsize=7.5)
        whole.set_title("whole sky: azimuth, zenith", pad=14)
        whole.set_axisbelow(False)
        whole.grid(color=GREY, alpha=0.4, linewidth=0.5)

        east, north = _tangents(sky.best)
        radius = _radius(sky)
        side = np.linspace(-1, 1, 201) * 2 * np.rad2deg(np.sin(np.deg2rad(radius) / 2))
        x, y = np.meshgrid(side, side)
        _draw(near, x, y, _from_plane(x, y, sky.best, east, north), sky)
        for name, direction, marker in _marks(sky):
            if np.dot(direction, sky.best) > np.cos(np.deg2rad(radius)):
                near.plot(*_to_plane(direction, sky.best, east, north), marker, color=RED, markersize=7, label=name)
        near.set(xlabel="towards larger azimuth (°)", ylabel="towards the zenith (°)", aspect="equal")
        near.set_title("around the answer, equal-area")
        for region in sky.regions:
            near.plot([], [], color=INK, linestyle=_line(region), label=_said(region))
        near.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        fig.suptitle(f"event {sky.event_id}, {sky.label}", fontsize=9.5, color=INK)
    return fig


def write_healpix(path: Path, sky: SkyMap) -> None:
    """Probability per pixel as a HEALPix FITS file (nested): theta is the zenith, phi the azimuth of the detector.

    The pixels are a quarter of the smallest region's radius or smaller, within nside 64 to 1024.

    Raises:
        MissingPackage: healpy is not installed.
    """
    with needs(f"{path} (a HEALPix map)", "write a .png or .html"):
        import healpy
    pixel_deg = max(np.sqrt(min(r.area_deg2 for r in sky.regions) / np.pi) / 4, 1e-3)
    nside = int(np.clip(2 ** np.ceil(np.log2(58.6 / pixel_deg)), _SMALLEST_NSIDE, _LARGEST_NSIDE))
    directions = np.stack(healpy.pix2vec(nside, np.arange(12 * nside**2), nest=True), axis=1)
    log_S = log_density(sky.mixture, directions)[0]
    probability_S = np.exp(log_S - log_S.max())
    probability_S /= probability_S.sum()
    header: list[tuple[Any, ...]] = [
        ("EVENT", sky.event_id),
        ("FRAME", "detector: theta = zenith, phi = azimuth"),
        ("DATA", sky.label),
    ]
    header += [(f"AREA{round(100 * r.level)}", r.area_deg2, "square degrees") for r in sky.regions]
    healpy.write_map(
        path, probability_S, nest=True, column_names=["PROB"], dtype=np.float64, extra_header=header, overwrite=True
    )


def _draw(ax: Any, x: Array, y: Array, directions: Array, sky: SkyMap) -> None:
    log = log_density(sky.mixture, directions.reshape(-1, 3))[0].reshape(x.shape)
    ax.pcolormesh(x, y, np.exp(log - log.max()), cmap="Blues", vmin=0, vmax=1.2, rasterized=True, shading="auto")
    for region in sky.regions:
        if log.min() < region.log_threshold < log.max():
            line = {"colors": [INK], "linewidths": 1.1, "linestyles": [_line(region)]}
            ax.contour(x, y, log, [region.log_threshold], **line)


def _line(region: Region) -> Any:
    return _LINES.get(region.level, ":")


def _marks(sky: SkyMap) -> list[tuple[str, Array, str]]:
    return [("predicted", sky.best, "+")] + ([] if sky.true is None else [("true", sky.true, "x")])


def _said(region: Region) -> str:
    area = region.area_deg2
    return f"{region.level:.0%}: {area:,.0f} deg²" if area >= 100 else f"{region.level:.0%}: {area:.3g} deg²"


def _radius(sky: SkyMap) -> float:
    """Degrees around the answer that show the largest region, and the truth if it is not far out of it."""
    largest = max(region.area_deg2 for region in sky.regions)
    cap = np.rad2deg(2 * np.arcsin(np.sqrt(min(largest / (4 * np.pi * (180 / np.pi) ** 2), 1.0))))
    away = 0.0 if sky.true is None else np.rad2deg(np.arccos(np.clip(np.dot(sky.best, sky.true), -1, 1)))
    return float(min(_WIDEST, 1.4 * max(cap, away if away < 3 * cap else 0.0)))


def _tangents(direction: Array) -> tuple[Array, Array]:
    """Unit vectors towards larger azimuth and towards smaller zenith."""
    azimuth, _ = vector_to_angles(direction)
    east = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    return east, np.cross(direction, east)


def _from_plane(x: Array, y: Array, centre: Array, east: Array, north: Array) -> Array:
    """Lambert's azimuthal equal-area plane (degrees) -> unit vectors; beyond the antipode its edge is repeated."""
    x, y = np.deg2rad(x), np.deg2rad(y)
    half = np.minimum((x**2 + y**2) / 4, 1.0)[..., None]
    return (1 - 2 * half) * centre + np.sqrt(1 - half) * (x[..., None] * east + y[..., None] * north)


def _to_plane(direction: Array, centre: Array, east: Array, north: Array) -> tuple[float, float]:
    scale = np.sqrt(2 / (1 + np.dot(direction, centre)))
    return float(np.rad2deg(scale * np.dot(direction, east))), float(np.rad2deg(scale * np.dot(direction, north)))


def _page(sky: SkyMap) -> Page:
    page = Page(f"Event {sky.event_id} on the sky", sky.label)
    what = "Density of the direction the neutrino came from, with the smallest regions of each probability."
    page.figure(figure(sky), what, alt=what)
    figures = sky.summary()
    rows = [
        ("mean direction", f"zenith {figures['zenith_deg']:.2f}°, azimuth {figures['azimuth_deg']:.2f}°"),
        ("components", str(figures["components"])),
        ("concentration κ", f"{figures['kappa']:.4g}"),
        ("calibration", sky.calibrated),
    ]
    for region in sky.regions:
        rows.append((f"{region.level:.0%} region", f"{region.area_deg2:,.4g} deg² (nominal {region.nominal:.1%})"))
    for name, inside in figures.get("true_inside", {}).items():
        rows.append((f"truth inside {name}", "yes" if inside else "no"))
    page.table(["quantity", "value"], rows, align="ll")
    return page


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
