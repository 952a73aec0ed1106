"""Regions on the sky: figures, pages, HEALPix, and the calibration they apply."""

import json
import sys

import numpy as np
import pytest
from iceaggr.calibrate import Calibration
from iceaggr.calibration import Levels
from iceaggr.skymap import sky_map, text
from iceaggr.skymap_files import _from_plane, _tangents, _to_plane, figure, write_skymap
from iceaggr.uncertainty import Mixture, containment, sphere_grid
from lab_shared.errors import UserError

TWO = Mixture([[0.7, 0.3]], [[[3.0, 20.0, 10.0], [-2.0, -12.0, -4.0]]])


def test_summary_says_where_the_truth_is():
    for true in sphere_grid(40):
        sky = sky_map(TWO, event_id=7, label="simulated data", true=true)
        figures = sky.summary()
        u = containment(TWO, true[None])[0]
        if abs(u - 0.5) > 0.01 and abs(u - 0.9) > 0.01:
            assert figures["true_inside"] == {"50%": u < 0.5, "90%": u < 0.9}
    assert figures["regions"][0]["area_deg2"] < figures["regions"][1]["area_deg2"]
    assert "simulated data" in text(sky)
    assert json.dumps(figures)


def test_calibration_changes_width_and_level():
    raw = sky_map(Mixture.single(np.array([[0, 0, 50.0]])), event_id=1, label="x")
    percent = np.linspace(0, 1, 101)
    calibration = Calibration(2.0, Levels(np.zeros(0), percent[None] ** 2))
    done = sky_map(raw.mixture, event_id=1, label="x", calibration=calibration, said="so")
    assert done.mixture.kappa_EK[0, 0] == 25
    assert [r.nominal for r in done.regions] == pytest.approx([0.25, 0.81])
    assert [r.level for r in done.regions] == [0.5, 0.9]
    plain = sky_map(Mixture.single(np.array([[0, 0, 25.0]])), event_id=1, label="x", levels=(0.25, 0.81))
    assert [r.area_deg2 for r in done.regions] == pytest.approx([r.area_deg2 for r in plain.regions])
    assert "so" in text(done)


def test_the_plane_keeps_areas_and_comes_back():
    centre = np.array([0.6, 0.0, 0.8])
    east, north = _tangents(centre)
    assert east[1] > 0
    assert north[2] > 0
    rng = np.random.default_rng(0)
    xy = rng.uniform(-60, 60, (2, 200))
    directions = _from_plane(*xy, centre, east, north)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    np.testing.assert_allclose([_to_plane(d, centre, east, north) for d in directions], xy.T, atol=1e-9)
    step = 1e-4
    x, y = (np.array([v, v + step, v]) for v in (20.0, -30.0))
    a, b, c = _from_plane(x + [0, 0, 0], y + np.array([0, -step, step]), centre, east, north)
    assert np.linalg.norm(np.cross(b - a, c - a)) == pytest.approx(np.deg2rad(step) ** 2, rel=1e-3)


@pytest.mark.parametrize(("azimuth", "zenith"), [(1.0, 0.6), (5.5, 2.2)])
def test_whole_sky_has_azimuth_to_the_right_and_from_above_on_top(azimuth, zenith):
    best = 300 * np.array([np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith), np.cos(zenith)])
    whole, near = figure(sky_map(Mixture.single(best[None]), event_id=1, label="simulated data")).axes
    place = azimuth - np.pi, np.pi / 2 - zenith
    marker = next(line for line in whole.lines if line.get_label() == "predicted")
    assert (marker.get_xdata()[0], marker.get_ydata()[0]) == pytest.approx(place)
    mesh = whole.collections[0]
    row, column = np.unravel_index(np.argmax(mesh.get_array()), mesh.get_array().shape)
    np.testing.assert_allclose(mesh.get_coordinates()[row, column], place, atol=0.03, err_msg="density at the marker")
    marker = next(line for line in near.lines if line.get_label() == "predicted")
    assert (marker.get_xdata()[0], marker.get_ydata()[0]) == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize("kappa", [0.0, 1e5])
def test_pictures_of_blind_and_of_sharp_answers(tmp_path, kappa):
    sky = sky_map(Mixture.single(np.array([[0.0, kappa, 0.0]])), event_id=3, label="simulated data")
    assert write_skymap(tmp_path / "a" / "sky.png", sky).read_bytes().startswith(b"\x89PNG")


def test_page_and_endings(tmp_path):
    sky = sky_map(TWO, event_id=3, label="simulated data", true=np.array([0.0, 0.0, 1.0]))
    page = write_skymap(tmp_path / "sky.html", sky).read_text(encoding="utf-8")
    assert "Event 3 on the sky" in page
    assert "simulated data" in page
    assert "deg²" in page
    assert 'src="http' not in page
    with pytest.raises(UserError, match=r"\.png, \.html or \.fits"):
        write_skymap(tmp_path / "sky.pdf", sky)


def test_healpix_needs_healpy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "healpy", None)
    with pytest.raises(UserError, match="uv pip install healpy"):
        write_skymap(tmp_path / "sky.fits", sky_map(TWO, event_id=3, label="simulated data"))


def test_healpix_map(tmp_path):
    healpy = pytest.importorskip("healpy", reason="the HEALPix output needs healpy, which is optional")
    sky = sky_map(TWO, event_id=3, label="simulated data")
    write_skymap(tmp_path / "sky.fits", sky)
    probability = healpy.read_map(tmp_path / "sky.fits", nest=True)
    assert probability.sum() == pytest.approx(1)
    ordered = np.sort(probability)[::-1]
    inside = int(np.searchsorted(ordered.cumsum(), 0.5))
    area = inside * 4 * np.pi * (180 / np.pi) ** 2 / len(ordered)
    assert area == pytest.approx(sky.regions[0].area_deg2, rel=0.02)
