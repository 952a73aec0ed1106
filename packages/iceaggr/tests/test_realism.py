"""The statistics against direct computation, and the simulator against the published figures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.pulses import Pulses
from iceaggr.inspection import inspect_folder
from iceaggr.realism import TARGETS, compare, qq_figure, save_qq_figure, statistics, table
from iceaggr.sim.stream import iter_events


def direct(pulses: Pulses) -> dict[str, float]:
    """The same figures event by event."""
    offsets = pulses.offsets_E1.tolist()
    counts, spans, doms, auxiliary, per_dom = [], [], [], [], []
    for begin, end in itertools.pairwise(offsets):
        sensor, time = pulses.sensor_P[begin:end].numpy(), pulses.time_P[begin:end].numpy()
        counts.append(end - begin)
        spans.append(time.max() - time.min())
        hit = np.unique(sensor, return_counts=True)[1]
        doms.append(len(hit))
        per_dom += hit.tolist()
        auxiliary.append(pulses.auxiliary_P[begin:end].float().mean().item())
    charge = pulses.charge_P.double().numpy()
    return {
        "events": len(counts),
        "n_pulses 75%": np.quantile(counts, 0.75),
        "n_pulses std": np.std(counts),
        "span 95%": np.quantile(spans, 0.95),
        "doms mean": np.mean(doms),
        "doms with one pulse": np.mean(np.array(per_dom) == 1),
        "doms with at most 16 pulses": np.mean(np.array(per_dom) <= 16),
        "events 100 to 1,000 pulses": np.mean([100 <= n < 1000 for n in counts]),
        "n_pulses tail exponent": 1 + 1 / np.mean([np.log(n / 100) for n in counts if n > 100]),
        "charge std": charge.std(),
        "charge min": charge.min(),
        "coincident charge 75%": np.quantile(charge[~pulses.auxiliary_P.numpy()], 0.75, method="inverted_cdf"),
        "auxiliary charge 25%": np.quantile(charge[pulses.auxiliary_P.numpy()], 0.25, method="inverted_cdf"),
        "time max": pulses.time_P.max().item(),
        "pulses per dom 95%": np.quantile(per_dom, 0.95, method="inverted_cdf"),
        "charge 75%": np.quantile(charge, 0.75, method="inverted_cdf"),
        "charge mean": charge.mean(),
        "time mean": pulses.time_P.double().mean().item(),
        "auxiliary per event": np.mean(auxiliary),
        "auxiliary per pulse": pulses.auxiliary_P.double().mean().item(),
        "zenith std": pulses.zenith_E.numpy().std() if pulses.zenith_E is not None else None,
    }


def test_statistics_equal_the_direct_computation(make_pulses: Callable[..., Pulses]) -> None:
    pulses = make_pulses([1, 5, 900, 40, 40, 333], seed=4, sensors=300)
    found = statistics([pulses])
    assert {k: found[k] for k in direct(pulses)} == pytest.approx(direct(pulses), rel=1e-6)


def test_statistics_over_batches_equal_those_of_all_events(make_pulses: Callable[..., Pulses]) -> None:
    first, second = make_pulses([10, 20, 30], seed=1), make_pulses([500, 7], seed=2)
    merged = statistics([first, second])
    assert merged["n_pulses mean"] == pytest.approx(567 / 5)
    assert merged["pulses"] == 567
    charges = np.concatenate([p.charge_P.double().numpy() for p in (first, second)])
    assert merged["charge mean"] == pytest.approx(charges.mean())


def test_real_events(real_mini: Path) -> None:
    found = statistics([KaggleFolder(real_mini).read_batch(1)])
    assert found["events"] == 5
    assert found["pulses"] == 352
    assert found["n_pulses 50%"] == 61
    assert found["span 50%"] == 11571
    assert found["zenith 50%"] == pytest.approx(1.549686, abs=1e-6)


def test_inspection_says_its_units_and_that_few_events_prove_little(real_mini: Path) -> None:
    text = inspect_folder(real_mini)["text"]
    assert "times in ns, charges in p.e., angles in rad" in text
    assert "fewer than 60,000 events" in text


def test_unlabelled_events_have_no_zenith_and_no_events_are_an_error(
    make_pulses: Callable[..., Pulses],
) -> None:
    rows = compare(statistics([make_pulses([20, 30], labelled=False)]))
    assert not any(row.quantity.startswith(("zenith", "azimuth")) for row in rows)
    with pytest.raises(ValueError, match="no events"):
        statistics([])


def test_comparison_judges_by_tolerance() -> None:
    exact = {name: target.real for name, target in TARGETS.items()}
    rows = compare(exact)
    judged = [row for row in rows if row.tolerance is not None]
    assert len(rows) == len(TARGETS)
    assert len(judged) == 8 + 7 + 1 + 3 + 1
    assert all(row.ok for row in judged)
    assert all(row.ok is None for row in rows if row.tolerance is None)
    off = exact | {"n_pulses 50%": 70, "auxiliary per event": 0.605, "doms 50%": 51.4}
    assert {row.quantity for row in compare(off) if row.ok is False} == {
        "n_pulses 50%",
        "auxiliary per event",
    }
    text = table(compare(off))
    assert "within 10%: NO" in text
    assert "within 0.03: NO" in text
    assert text.count("\n") == len(TARGETS)


@pytest.mark.slow
def test_figure_is_written(make_pulses: Callable[..., Pulses], tmp_path: Path) -> None:
    save_qq_figure(statistics([make_pulses([50] * 20)]), tmp_path / "qq.png", "simulated data")
    assert (tmp_path / "qq.png").stat().st_size > 10_000


def test_quantiles_are_joined_in_their_order(make_pulses: Callable[..., Pulses]) -> None:
    for axes in qq_figure(statistics([make_pulses([20, 50, 90])]), "simulated data").axes:
        assert (np.diff(axes.lines[1].get_xdata()) > 0).all()


def test_labels_of_quantiles_do_not_lie_on_each_other() -> None:
    published = {name: target.real for name, target in TARGETS.items()} | {"n_pulses 0%": 15.0}
    for axes in qq_figure(published, "as published").axes:
        x = np.log([text.xy[0] for text in axes.texts])
        assert len(x) >= 3
        assert (np.diff(x) > 0.05 * np.ptp(np.log(axes.lines[1].get_xdata()))).all()


def test_the_simulator_is_close_with_few_events() -> None:
    """Wide margins for 1,500 events; the figures that few bright events decide are left to the slow test."""
    found = statistics(pulses for pulses, _ in iter_events(1500, seed=31))
    for name in (
        "n_pulses 10%",
        "n_pulses 50%",
        "n_pulses 75%",
        "span 10%",
        "span 50%",
        "span 75%",
        "doms 50%",
    ):
        assert found[name] == pytest.approx(TARGETS[name].real, rel=0.12), name
    assert found["auxiliary per event"] == pytest.approx(0.64, abs=0.05)
    assert found["charge 50%"] == pytest.approx(1.075, rel=0.2)
    assert found["events without coincidence"] == 0


@pytest.mark.slow
def test_the_simulator_meets_every_realism_requirement() -> None:
    rows = compare(statistics(pulses for pulses, _ in iter_events(60_000, seed=2024)))
    assert not [row for row in rows if row.ok is False], "\n" + table(rows)
