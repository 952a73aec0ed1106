"""Configuration fields that say which numbers make sense."""

import json
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_shared.config import ConfigError, from_json, preset_cli, to_json
from lab_shared.ranges import Count, Decay, NonNegative, Positive, Range, Seed, Share, Whole


@dataclass(frozen=True)
class Optim:
    lr: Positive = 1e-3
    beta: Decay = 0.9
    weights: tuple[NonNegative, NonNegative] = (0.0, 1.0)


@dataclass(frozen=True)
class Config:
    steps: Count = 3
    warmup: Whole = 0
    cap: Count | None = None
    seed: Seed = 0
    share: Share = 0.5
    optim: Optim = field(default_factory=Optim)


def test_the_ends_of_every_range_are_what_they_say():
    largest = Config(10**30, 10**30, 10**30, 2**63 - 1, 1.0, Optim(1e308, math.nextafter(1, 0), (1e308, 1e308)))
    smallest = Config(1, 0, 1, 0, 0.0, Optim(5e-324, 0.0, (0.0, 0.0)))
    for config in (Config(), largest, smallest):
        assert from_json(Config, to_json(config)) == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Config(steps=0), r"^steps: expected a whole number of at least 1, found 0$"),
        (Config(warmup=-1), r"^warmup: expected a whole number of at least 0, found -1$"),
        (Config(cap=0), r"^cap: expected a whole number of at least 1, found 0$"),
        (Config(seed=-1), r"^seed: expected a whole number from 0 to 9223372036854775807, found -1$"),
        (Config(seed=2**63), r"^seed: .*, found 9223372036854775808$"),
        (Config(share=1.5), r"^share: expected a finite number from 0 to 1, found 1.5$"),
        (Config(optim=Optim(lr=0.0)), r"^optim\.lr: expected a finite number above 0, found 0.0$"),
        (Config(optim=Optim(lr=math.nan)), r'^optim\.lr: .*, found "nan"$'),
        (Config(optim=Optim(lr=math.inf)), r'^optim\.lr: .*, found "inf"$'),
        (Config(optim=Optim(beta=1.0)), r"^optim\.beta: expected a finite number from 0 to below 1, found 1.0$"),
        (Config(optim=Optim(weights=(0.0, -1.0))), r"^optim\.weights\[1\]: .* of at least 0, found -1.0$"),
    ],
)
def test_a_number_outside_is_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        to_json(wrong)


def test_types_are_still_checked():
    with pytest.raises(ConfigError, match=r"steps: expected int, found 2\.0"):
        from_json(Config, json.dumps({"steps": 2.0}))
    assert preset_cli({"one": ("", Config())}, ["one", "--optim.lr", "2", "--cap", "4"], "tool").cap == 4


@given(st.floats(-2, 2) | st.just(math.nan), st.booleans(), st.booleans())
def test_a_range_is_its_comparisons(x, open_low, open_high):
    inside = (x > 0 if open_low else x >= 0) and (x < 1 if open_high else x <= 1)
    assert (x in Range(0, 1, open_low, open_high)) == inside
