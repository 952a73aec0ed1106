"""What is asked of scores and times: by the mean, with the seeds there are, and of every run."""

from dataclasses import replace

import pytest
from rh_memory import targets, verdicts
from rh_memory.config import PRESETS
from rh_memory.records import Record, experiment


def record(preset, seed, score, seconds=None, **changes):
    config = replace(PRESETS[preset][1], seed=seed, **changes)
    scored = {"value": score, "low": score - 0.01, "high": score + 0.01}
    evaluation = {
        "part": "val_tail",
        "label": "made-up zeros",
        "nll_last": scored,
        "nll_all": scored,
        "nll_last_minus": {},
        "baselines": {"rows": []},
    }
    found, name = experiment(config)
    return Record(f"{name}-{seed}", name, found, config, evaluation, None, config.steps, None, seconds)


def rows(*found):
    result = verdicts.verdicts(list(found))
    return {row["experiment"]: row for row in result["experiments"]}, {row["claim"]: row for row in result["claims"]}


def test_two_seeds_have_a_mean_and_no_interval():
    pairs = ((7, -0.5), (42, -0.7))
    experiments, claims = rows(*(record(name, seed, value) for name in ("e0", "e4") for seed, value in pairs))
    e0 = experiments["e0"]
    assert e0["nll_last"]["mean"] == pytest.approx(-0.6)
    assert (e0["nll_last"]["low"], e0["nll_last"]["high"]) == (None, None)
    assert (e0["target_metric"], e0["met"], targets.met(e0)) == ("nll_all", True, "met (2 of 3 seeds)")
    for claim in ("E0 without memory reaches -.572", "seeds differ much"):
        assert claims[claim]["value"] is not None
        assert (claims[claim]["low"], claims[claim]["high"]) == (None, None)


def test_the_mean_decides_and_three_seeds_need_no_remark():
    experiments, _ = rows(*(record("explicit", seed, value) for seed, value in ((7, -2.2), (42, -2.5), (1337, -2.4))))
    assert experiments["explicit"]["nll_last"]["high"] > -2.35 > experiments["explicit"]["nll_last"]["mean"]
    assert targets.met(experiments["explicit"]) == "met"


def test_what_is_asked_of_postfix_memory_is_asked_at_any_length():
    asked = {
        name: targets.target(record(name, 7, -0.4, steps=3000))
        for name in ("e3", "e4", "e5", "e3-explicit", "e0", "e0-rope", "explicit")
    }
    assert [asked[name].high for name in ("e3", "e4", "e5", "e3-explicit")] == [-0.5, -0.5, -0.5, -1.0]
    assert [asked[name] for name in ("e0", "e0-rope", "explicit")] == [None, None, None]
    assert targets.target(record("explicit", 7, -2.9, steps=16_000)).text == "nll_last <= -2.8"
    assert targets.target(record("e3", 7, -0.4, steps=3000, batch_size=256)) is None


def test_a_time_limit_is_kept_by_every_run_or_not_at_all():
    slow = ((7, 99.0), (42, 100.4), (1337, 98.0))
    names = ("e0-rope", "explicit", "e1-rope")
    found = [record(name, seed, -2.5, seconds) for name in names for seed, seconds in slow]
    found += [record("explicit-small", seed, -2.0, None if seed == 7 else seconds) for seed, seconds in slow]
    experiments, _ = rows(*found)
    rope = experiments["e0-rope"]
    assert (rope["met"], rope["in_time"]) == (True, False)
    assert (targets.time_taken(rope), targets.time_met(rope)) == ("98 to 100 s", "NOT met")
    assert (experiments["explicit"]["in_time"], experiments["explicit"]["target_time"]) == (True, "150 s of one H200")
    assert experiments["e1-rope"]["in_time"] is None  # nothing is asked of it
    assert experiments["explicit-small"]["in_time"] is None  # one run does not say


def test_shuffled_data_have_bounds_on_both_sides():
    wanted = targets.Target("nll_last", 0.504, 0.5)
    assert wanted.met_by(0.502)
    assert not wanted.met_by(0.4979)
    assert not wanted.met_by(0.51)
