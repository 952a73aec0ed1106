"""A map of the sky as a file.

FILE.png and FILE.html need matplotlib alone: a Mollweide map of the whole sky, and beside it the neighbourhood of the
answer in Lambert's azimuthal equal-area projection, so that a region of one square degree is seen as well as one of
ten thousand. FILE.fits is a HEALPix map of the same probabilities, and needs healpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.errors import UserError, needs
from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page
from lab_shared.plotting import GREY, INK, RED, style, to_png

from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.skymap import Region, SkyMap
from iceaggr.uncertainty import Array, log_density

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = {0.5: "-", 0.9: (0, (4, 2))}
_WIDEST = 90.0  # deg, radius of the neighbourhood
_SMALLEST_NSIDE, _LARGEST_NSIDE = 64, 1024


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
