"""Resolution tables against loops, and where an interaction lies in the array."""

import numpy as np
import pytest
from iceaggr.geometry import icecube86
from iceaggr.resolution import depth_inside, resolution_table, select
from iceaggr.summaries import MIN_EVENTS

BOX = np.array([[x, y, z] for x in (0.0, 10) for y in (0.0, 20) for z in (-5.0, 5)] + [[5.0, 5.0, 0.0]])


@pytest.fixture
def events():
    rng = np.random.default_rng(0)
    n = 2000
    return {
        "error_deg": rng.uniform(0, 100, n),
        "zenith": np.arccos(rng.uniform(-1, 1, n)),
        "n_pulses": rng.integers(10, 500, n),
        "energy": 10 ** rng.uniform(2.1, 4.9, n),
        "type": rng.integers(0, 2, n),
        **{f"vertex_{axis}": rng.uniform(-800, 800, n).astype(np.float32) for axis in "xyz"},
    }


def test_depth_inside_a_box():
    points = np.array([[5.0, 10, 0], [1, 10, 0], [5, 10, 4], [-3, 10, 0], [5, 23, 0], [5, 10, 9]])
    np.testing.assert_allclose(depth_inside(points, BOX), [5, 1, 1, -3, -3, -4])
    xyz = icecube86().xyz
    assert depth_inside(xyz, xyz).min() > -1e-9, "every DOM is in the array"
    assert depth_inside(np.array([[0.0, 0, 0], [900, 0, 0]]), xyz)[0] > 300


def test_rows_match_a_loop(events):
    table = resolution_table(events, icecube86().xyz)
    assert set(table["quantity"]) == {"energy", "cos_zenith", "n_pulses", "depth_inside", "contained", "type"}
    for quantity, x in (("energy", events["energy"]), ("cos_zenith", np.cos(events["zenith"]))):
        rows = select(table, quantity, "track")
        for i in range(0, len(rows["x"]), 3):
            inside = (x >= rows["low"][i]) & (x < rows["high"][i]) & (events["type"] == 1)
            error = events["error_deg"][inside]
            assert rows["events"][i] == len(error) >= MIN_EVENTS
            assert rows["median"][i] == np.median(error)
            assert rows["mean"][i] == pytest.approx(error.mean())
            assert rows["p90"][i] == np.quantile(error, 0.9)
            assert rows["median_low"][i] <= rows["median"][i] <= rows["median_high"][i]
    vertex = np.stack([events[f"vertex_{axis}"] for axis in "xyz"], axis=1)
    within = depth_inside(vertex, icecube86().xyz) > 0
    contained = select(table, "contained", "all")
    assert contained["low"].tolist() == [0, 1]
    outside, inside = (events["error_deg"][rows].mean() for rows in (~within, within))
    np.testing.assert_allclose(contained["mean"], [outside, inside])
    for quantity in set(table["quantity"]):
        everything = select(table, quantity, "all")
        assert everything["events"].sum() == 2000, f"every event has its bin of {quantity}"


def test_intervals_cover(events):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        error = rng.exponential(30, 80)
        n = np.zeros(80, dtype=int) + 50
        row = select(resolution_table({"error_deg": error, "zenith": np.ones(80), "n_pulses": n}, BOX), "n_pulses")
        hits += row["median_low"][0] <= 30 * np.log(2) <= row["median_high"][0]
    assert 0.9 < hits / 300 <= 0.99


def test_few_events_and_few_columns():
    few = {"error_deg": np.ones(5), "zenith": np.ones(5), "n_pulses": np.arange(5)}
    assert resolution_table(few, BOX) == {}
