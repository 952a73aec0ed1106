import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.baselines import WINDOW_NS, line_fit, random_directions, segment_median
from iceaggr.data.pulses import Pulses
from iceaggr.metrics import opening_angle_deg
from lab_shared.testing import assert_parity

VARIANTS = ("windowed_hlc", "hlc", "all")


def make_pulses(events):
    """Pulses from a list of (sensor, time, charge, auxiliary) tuples of equal-length sequences."""
    columns = [np.concatenate([np.asarray(event[i]) for event in events]) for i in range(4)]
    counts = [len(event[0]) for event in events]
    return Pulses(
        event_id_E=torch.arange(len(events)),
        offsets_E1=torch.tensor(np.concatenate([[0], np.cumsum(counts)]), dtype=torch.int64),
        sensor_P=torch.tensor(columns[0], dtype=torch.int32),
        time_P=torch.tensor(columns[1], dtype=torch.int32),
        charge_P=torch.tensor(columns[2], dtype=torch.float32),
        auxiliary_P=torch.tensor(columns[3], dtype=torch.bool),
    )


def random_events(n_events, xyz, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 40, n_events)
    return [
        (
            rng.integers(0, len(xyz), n),
            np.sort(rng.integers(6000, 14_000, n)),
            0.025 * rng.integers(1, 200, n),
            rng.random(n) < 0.6,
        )
        for n in counts
    ]


@pytest.fixture
def xyz():
    return torch.tensor(np.random.default_rng(0).uniform(-500, 500, (300, 3)))


def fit_naive(event, xyz, variant):
    sensor, time, charge, aux = (np.asarray(c) for c in event)
    weight = charge.astype(np.float32).astype(np.float64) * (1 if variant == "all" else ~aux)
    if variant == "windowed_hlc" and (~aux).any():
        median = np.percentile(time[~aux], 50, method="lower")
        weight = weight * (np.abs(time - median) < WINDOW_NS)
    if (weight > 0).sum() < 2:
        return np.array([0.0, 0, 1])
    t = time - np.average(time, weights=weight)
    r = xyz[sensor] - np.average(xyz[sensor], axis=0, weights=weight)
    # weighted least squares of r against t, by the normal equations of a general solver
    velocity = np.linalg.lstsq(np.sqrt(weight)[:, None] * t[:, None], np.sqrt(weight)[:, None] * r, rcond=None)[0][0]
    norm = np.linalg.norm(velocity)
    return np.array([0.0, 0, 1]) if norm == 0 else -velocity / norm


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_a_naive_fit_per_event(variant, xyz):
    events = random_events(200, xyz, seed=1)
    fit = line_fit(make_pulses(events), xyz, variant)
    expected = np.stack([fit_naive(event, xyz.numpy(), variant) for event in events])
    assert_parity(fit.direction_E3, expected, atol=1e-7)
    assert_parity(fit.fallback_E.double(), (expected == [0, 0, 1]).all(-1).astype(float), atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recovers_where_a_particle_came_from(variant):
    """Hits on a straight line at the speed of light: the fit points back at the source."""
    rng = np.random.default_rng(2)
    source = rng.normal(size=(50, 3))
    source /= np.linalg.norm(source, axis=-1, keepdims=True)
    xyz, events = [], []
    for e, n in enumerate(source):
        times = np.arange(9000, 11_000, 50)
        xyz.append(rng.uniform(-100, 100, 3) - n * 0.299792 * (times - 10_000)[:, None])
        sensor = e * len(times) + np.arange(len(times))
        events.append((sensor, times, rng.uniform(0.5, 3, len(times)), np.zeros(len(times), bool)))
    fit = line_fit(make_pulses(events), torch.tensor(np.concatenate(xyz)), variant)
    assert_parity(fit.direction_E3, source, atol=1e-9)
    assert not fit.fallback_E.any()


def test_late_light_and_noise_are_left_out():
    along = np.stack([np.zeros(20), np.zeros(20), np.linspace(300, -300, 20)], -1)  # moves down: came from above
    xyz = torch.tensor(np.concatenate([along, [[400.0, 0, 0], [-400.0, 0, 0]]]))
    times = np.append(np.linspace(9800, 11_800, 20).astype(int), [15_000, 15_500])
    late_hlc = (np.arange(22), times, np.ones(22), np.zeros(22, bool))
    noise = (np.arange(22), times, np.ones(22), np.arange(22) >= 20)
    pulses = make_pulses([late_hlc, noise])
    up = torch.tensor([0.0, 0, 1]).double().expand(2, 3)
    assert opening_angle_deg(line_fit(pulses, xyz, "windowed_hlc").direction_E3, up).max() < 1e-6
    hlc = opening_angle_deg(line_fit(pulses, xyz, "hlc").direction_E3, up)
    assert hlc[0] > 3
    assert hlc[1] < 1e-6
    assert opening_angle_deg(line_fit(pulses, xyz, "all").direction_E3, up).min() > 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotation_equivariance_and_shift_invariance(variant, xyz):
    pulses = make_pulses(random_events(60, xyz, seed=3))
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    fit, turned = line_fit(pulses, xyz, variant), line_fit(pulses, xyz @ q.T + 1000.0, variant)
    assert torch.equal(fit.fallback_E, turned.fallback_E)
    kept = ~fit.fallback_E
    assert_parity(turned.direction_E3[kept], (fit.direction_E3 @ q.T)[kept], atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pulse_order_does_not_matter(variant, xyz):
    rng = np.random.default_rng(4)
    events = random_events(60, xyz, seed=4)
    shuffled = []
    for event in events:
        order = rng.permutation(len(event[0]))
        shuffled.append(tuple(np.asarray(column)[order] for column in event))
    a, b = line_fit(make_pulses(events), xyz, variant), line_fit(make_pulses(shuffled), xyz, variant)
    assert_parity(a.direction_E3, b.direction_E3, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_events_without_a_velocity_get_the_counted_fallback(variant, xyz):
    no, yes = [False] * 3, [True] * 3
    good = ([0, 1, 2], [10_000, 10_100, 10_300], [1.0] * 3, no)
    same_time = ([0, 1, 2], [10_000] * 3, [1.0] * 3, no)
    same_place = ([5, 5, 5], [10_000, 10_100, 10_300], [1.0] * 3, no)
    one_pulse = ([4], [10_000], [1.0], [False])
    no_hlc = ([0, 1, 2], [10_000, 10_100, 10_300], [1.0] * 3, yes)
    fit = line_fit(make_pulses([good, same_time, same_place, one_pulse, no_hlc]), xyz, variant)
    assert fit.fallback_E.tolist() == [False, True, True, True, variant != "all"]
    assert_parity(fit.direction_E3[1:4], torch.tensor([[0.0, 0, 1]]).expand(3, 3), atol=0)
    assert_parity(fit.direction_E3.norm(dim=-1), torch.ones(5), atol=1e-12)


@given(st.lists(st.lists(st.tuples(st.integers(-50, 50), st.booleans()), max_size=8), min_size=1, max_size=6))
@settings(deadline=None)
def test_segment_median_matches_its_definition(segments):
    value = torch.tensor([v for s in segments for v, _ in s], dtype=torch.int64)
    selected = torch.tensor([keep for s in segments for _, keep in s], dtype=torch.bool)
    offsets = torch.tensor(np.cumsum([0] + [len(s) for s in segments]))
    for segment, median in zip(segments, segment_median(value, selected, offsets).tolist(), strict=True):
        kept = [v for v, keep in segment if keep]
        if kept:
            assert median == np.percentile(kept, 50, method="lower")
        else:
            assert median in [v for v, _ in segment] or (not segment and median == 0)


def test_unknown_variant_is_refused(xyz):
    with pytest.raises(ValueError, match="variant is 'best'"):
        line_fit(make_pulses(random_events(1, xyz, 0)), xyz, "best")


def test_random_directions_are_isotropic_and_seeded():
    a = random_directions(20_000, seed=5)
    assert torch.equal(a, random_directions(20_000, seed=5))
    assert not torch.equal(a, random_directions(20_000, seed=6))
    assert_parity(a.norm(dim=-1), torch.ones(20_000), atol=1e-12)
    assert a.mean(0).abs().max() < 4 / np.sqrt(3 * 20_000)
    up = torch.tensor([0.0, 0, 1]).double()
    assert float(opening_angle_deg(a, up.expand_as(a)).mean()) == pytest.approx(90, abs=4 * 39.2 / np.sqrt(20_000))


def test_runs_on_the_real_events():
    folder = os.environ.get("LAB_REFERENCE_DATA")
    if not folder:
        pytest.skip("LAB_REFERENCE_DATA is unset: no real events to read")
    import polars as pl

    root = Path(folder) / "iceaggr"
    rows = pl.read_parquet(root / "kaggle_real_mini" / "train" / "batch_1.parquet")
    xyz = torch.tensor(pl.read_csv(root / "sensor_geometry.csv").select("x", "y", "z").to_numpy())
    columns = ("sensor_id", "time", "charge", "auxiliary")
    events = [
        tuple(event[name].to_numpy() for name in columns)
        for event in rows.partition_by("event_id", maintain_order=True)
    ]
    assert len(events) == 5
    for variant in VARIANTS:
        fit = line_fit(make_pulses(events), xyz, variant)
        assert not fit.fallback_E.any()
        assert_parity(fit.direction_E3.norm(dim=-1), torch.ones(5), atol=1e-12)
