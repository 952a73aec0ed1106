"""Statistics of ablation studies: intervals, paired tests, verdicts."""

import numpy as np
import pytest
import torch
from iceaggr.ablation_runs import effective_rank
from iceaggr.ablation_stats import Contrast, contrasts, holm_over_seeds, p_over_seeds, paired, verdicts
from iceaggr.ablations import study
from lab_shared.errors import UserError


def noise(shift, *, seeds=3, n=400, spread=0.02, key=0):
    """(S, N) errors: a common part per event, a little noise per run, and each seed's own offset."""
    rng = np.random.default_rng([17, key])
    events = np.random.default_rng(9).uniform(10, 120, n)
    return events + shift + rng.normal(0, 2, (seeds, n)) + rng.normal(0, spread, (seeds, 1))


def test_paired_intervals_have_their_width_and_need_common_events():
    found = paired(noise(-1, key=1), noise(0, key=2))
    assert found["difference"] == pytest.approx(-1, abs=0.3)
    width = found["events_high"] - found["events_low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(2 * 2**2 / 3 / 400), rel=0.15)
    assert found["seeds_low"] < found["difference"] < found["seeds_high"]
    assert found["p"] < 0.001
    one = paired(noise(-1, seeds=1, key=1), noise(0, seeds=1, key=2))
    assert one["seeds_low"] is None
    with pytest.raises(UserError, match="not of the same runs"):
        paired(noise(0), noise(0, seeds=2))


def test_findings_need_both_kinds_of_evidence():
    errors = {
        "base": noise(0, key=1),
        "better": noise(-1, key=2),
        "worse": noise(1, key=3),
        "same": noise(0, key=4),
        "lucky": noise(-1, spread=3.0, key=5),
    }
    found = contrasts([Contrast(name, "base", name) for name in errors if name != "base"], errors)
    assert [c["finding"] for c in found] == ["lower", "higher", "not shown", "not shown"]
    assert found[3]["p_holm"] < 0.05, "over events alone the lucky seeds would have passed"
    alone = {name: x[:1] for name, x in errors.items()}
    (single,) = contrasts([Contrast("better", "base", "?")], alone)
    assert single["finding"] == "not shown", "one seed shows nothing"


def seed_table(shifts, *, seeds=3):
    of = study("seed-table")
    errors = {name: noise(shifts.get(name, 0), seeds=seeds, key=i) for i, name in enumerate(of.variants)}
    rank = {"head_rank": 200.0, "head_rank_untrained": 230.0, "head_rank_limit": 256}
    return {
        "label": "simulated data",
        "contrasts": contrasts(of.contrasts, errors),
        "rows": [{"name": name, **rank} for name in errors],
    }


def test_verdicts_follow_the_numbers():
    flat = verdicts(seed_table({}))
    assert [v["status"] for v in flat] == ["fails", "holds", "holds", "fails", "fails"]
    seed_was_right = verdicts(seed_table({"v1": 5, "5M-less-data": 1.2, "5M-head-128": 0.5}))
    assert [v["status"] for v in seed_was_right] == ["holds"] * 5
    worse = verdicts(seed_table({"v2-mlp-K16": 3, "v2-linear-K41": -3, "v2-none-K41": -3}))
    assert [v["status"] for v in worse[1:3]] == ["fails", "fails"]
    assert all("simulated data" in v["measured"] for v in flat)
    assert "untrained 230" in flat[4]["measured"]
    assert {v["status"] for v in verdicts(seed_table({"v1": 5}, seeds=1))} == {"undecided"}
    nothing = {"label": "simulated data", "contrasts": [], "rows": []}
    assert {v["status"] for v in verdicts(nothing)} == {"undecided"}


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.ones(5), torch.arange(1.0, 4))) == pytest.approx(1)
    p = np.array([3, 1]) / 4
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_p_over_seeds_is_students():
    """Three differences of mean 2 and standard deviation 1: t = 3.464 with 2 degrees of freedom."""
    assert p_over_seeds([1.0, 2.0, 3.0]) == pytest.approx(0.07418, abs=1e-5)
    assert p_over_seeds([-1.0, -2.0, -3.0]) == pytest.approx(0.07418, abs=1e-5)
    assert (p_over_seeds([2.0, 2.0]), p_over_seeds([0.0, 0.0]), p_over_seeds([1.0])) == (0.0, 1.0, None)
    rows = [
        {"name": name, "seed_means": x} for name, x in (("a", [11, 12, 13]), ("b", [10, 10, 10]), ("c", [9, 12, 9]))
    ]
    asked = [{"treated": "a", "control": "b"}, {"treated": "c", "control": "b"}]
    assert holm_over_seeds({"rows": rows, "contrasts": asked}) == [pytest.approx(2 * 0.07418, abs=2e-5), 1.0]
    one = [{"name": r["name"], "seed_means": r["seed_means"][:1]} for r in rows]
    assert holm_over_seeds({"rows": one, "contrasts": asked}) == [None, None]
