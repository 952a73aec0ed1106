"""iceaggr.display: pulses gathered per DOM, and the pictures made of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.display import event_figure, event_png, event_still, write_display
from iceaggr.display_data import Event, charge_centre, hits_by_dom, time_range
from lab_shared.errors import UserError

UP = np.array([0.0, 0.0, 1.0])


def make_event(doms, times, charges, auxiliary, **known):
    """An event on DOMs that lie 17 m apart on a line."""
    doms = np.asarray(doms)
    xyz = np.stack([10.0 * doms, -5.0 * doms, 17.0 * doms], axis=1)
    return Event(xyz, np.asarray(times), np.asarray(charges, dtype=np.float64), np.asarray(auxiliary), **known)


@pytest.fixture
def event():
    known = {"true": UP, "predicted": np.array([0.6, 0.0, 0.8]), "event_id": 24, "kappa": 3.5}
    return make_event([0, 1, 1, 2], [100, 50, 200, 400], [1, 2, 3, 4], [False, True, False, True], **known)


pulse = st.tuples(st.integers(0, 5), st.integers(0, 1000), st.integers(1, 100), st.booleans())


@given(st.lists(pulse, min_size=1, max_size=40))
@settings(max_examples=60)
def test_hits_match_a_loop(pulses):
    doms, times, charges, auxiliary = map(list, zip(*pulses, strict=True))
    event = make_event(doms, times, charges, auxiliary, sensor=np.asarray(doms))
    hits = hits_by_dom(event)
    assert (np.diff(hits.time) >= 0).all()
    assert hits.sensor is not None
    assert sorted(hits.sensor.tolist()) == sorted(set(doms))
    for row, dom in enumerate(hits.sensor.tolist()):
        own = [(t, q, a) for d, t, q, a in pulses if d == dom]
        hlc = [t for t, _, a in own if not a]
        assert hits.time[row] == min(hlc or [t for t, _, _ in own])
        assert hits.charge[row] == sum(q for _, q, _ in own)
        assert hits.pulses[row] == len(own)
        assert hits.auxiliary[row] == (not hlc)
        np.testing.assert_array_equal(hits.xyz[row], [10 * dom, -5 * dom, 17 * dom])
    low, high = time_range(hits)
    assert low < high


def test_centre_is_weighted_by_hlc_charge_only(event):
    np.testing.assert_allclose(charge_centre(event), (0 * np.ones(3) + 3 * np.array([10, -5, 17])) / 4)
    noise = make_event([0, 2], [1, 2], [1, 1], [True, True])
    np.testing.assert_allclose(charge_centre(noise), [10, -5, 17])


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1.0, np.pi])
def test_opening_angle(angle):
    event = make_event([0], [1], [1], [False], true=UP, predicted=np.array([np.sin(angle), 0, np.cos(angle)]))
    assert event.error_deg == pytest.approx(np.degrees(angle), abs=1e-12)


def test_title_says_what_is_known(event):
    assert event.title == "event 24 · opening angle 36.9° · κ 3.5"
    assert make_event([0], [1], [1], [True]).title == ""


def test_events_that_cannot_be_drawn():
    with pytest.raises(UserError, match="got \\[0\\]"):
        hits_by_dom(make_event(np.zeros(0, dtype=int), [], [], np.zeros(0, dtype=bool)))
    with pytest.raises(UserError, match="got \\[1, 2\\]"):
        hits_by_dom(make_event([0, 1], [1], [1, 1], [True, True]))


def test_figure_shows_hits_arrows_and_the_array(event):
    array = np.random.default_rng(0).uniform(-500, 500, (5160, 3))
    figure = event_figure(event, array)
    traces = {trace.name: trace for trace in figure.data if trace.name}
    assert set(traces) == {"all DOMs", "auxiliary only", "HLC", "true", "predicted"}
    assert len(traces["all DOMs"].x) == 5160
    assert len(traces["HLC"].x) == 2
    assert len(traces["auxiliary only"].x) == 1
    assert traces["HLC"].marker.size[1] > traces["HLC"].marker.size[0], "more charge, larger"
    assert "5.00 p.e. in 2 pulses" in traces["HLC"].text[1]
    assert figure.layout.scene.aspectmode == "data"
    assert "event 24" in figure.layout.title.text
    # The neutrino comes from above, so the arrow runs downwards through the centre.
    z = traces["true"].z
    assert z[0] > charge_centre(event)[2] > z[1]
    assert np.mean(z) == pytest.approx(charge_centre(event)[2])
    cone = next(trace for trace in figure.data if trace.type == "cone")
    assert cone.w[0] < 0


def test_animation_lights_doms_in_event_time(event):
    figure = event_figure(event, np.zeros((3, 3)), animated=True)
    assert not event_figure(event).frames
    names = [trace.name for trace in figure.data]
    hits = hits_by_dom(event)
    before = -1
    for frame in figure.frames:
        lit = sum(int((np.asarray(data.marker.size) > 0).sum()) for data in frame.data)
        assert [names[i] for i in frame.traces] == ["auxiliary only", "HLC"]
        if frame.name != "all":
            limit = float(frame.name.removesuffix(" ns").replace(",", ""))
            assert abs(lit - (hits.time <= limit).sum()) <= (np.abs(hits.time - limit) < 1).sum(), "names are rounded"
        assert lit >= before
        before = lit
    assert before == len(hits.time)
    assert len(figure.layout.sliders[0].steps) == len(figure.frames)
    assert figure.layout.updatemenus[0].buttons[0].label == "Play"


def test_figure_of_an_unlabelled_event_and_its_sensors():
    event = make_event([0, 1], [1, 2], [1, 1], [False, False], sensor=np.array([0, 5159]))
    figure = event_figure(event)
    assert [trace.name for trace in figure.data] == ["HLC"]
    assert "sensor 5159 (string 86, DOM 60)" in figure.data[0].text[1]


def test_pictures_for_paper(event, tmp_path):
    assert len(event_still(event).axes) == 3, "side, top, colour bar"
    assert event_still(event, label="simulated data").get_suptitle() == f"{event.title} · simulated data"
    path = event_png(tmp_path / "new" / "event.png", event, np.zeros((3, 3)))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dom", [-30, 0, 30])
def test_arrows_end_inside_a_still(dom):
    """Matplotlib draws no arrow whose tip is outside: near a corner too both are seen, and point as they should."""
    true, predicted = np.array([0.6, 0.0, -0.8]), np.array([-0.6, 0.48, 0.64])
    event = make_event([dom], [1], [1], [False], true=true, predicted=predicted)
    for ax, (i, j) in zip(event_still(event).axes[:2], ((0, 2), (0, 1)), strict=True):
        assert len(ax.texts) == 2
        for arrow, direction in zip(ax.texts, (true, predicted), strict=True):
            tip, tail = np.array(arrow.xy), np.array(arrow.xyann)
            assert np.abs([tip, tail]).max() < 700
            along = tip - tail
            across = along[0] * direction[j] - along[1] * direction[i]
            assert across == pytest.approx(0, abs=1e-9)
            assert along @ direction[[i, j]] < 0, "the particle travels away from its source"


def test_page_of_one_event(event, tmp_path):
    text = write_display(tmp_path / "event.html", event, label="simulated data").read_text(encoding="utf-8")
    assert "<h1>Event 24</h1>" in text
    assert "simulated data" in text
    assert "zenith 36.9°, azimuth 0.0°" in text
    assert "4 (2 auxiliary)" in text
    assert text.count("Plotly.newPlot(") >= 1


def test_event_of_very_many_pulses_is_drawn_per_dom():
    rng = np.random.default_rng(5)
    n = 178_250
    doms = rng.integers(0, 2000, n)
    event = make_event(doms, rng.integers(0, 10**5, n), np.ones(n), rng.random(n) < 0.3, true=UP)
    figure = event_figure(event)
    assert sum(len(trace.x) for trace in figure.data if trace.name in ("HLC", "auxiliary only")) == 2000
