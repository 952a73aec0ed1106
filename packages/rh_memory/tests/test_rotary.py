"""Frequencies of the turning values and their controls, and rotations, against the written-out forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity
from rh_memory.config import ModelConfig
from rh_memory.models.rotary import composites, log_frequencies, prime_powers, rotate, rotations


def test_prime_powers_and_composites():
    assert prime_powers(12).tolist() == [2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19]
    assert composites(6).tolist() == [6, 10, 12, 14, 15, 18]
    assert prime_powers(128)[-1] == 587


@pytest.mark.parametrize("kind", ["shuffled", "random", "composite", "even"])
def test_control_frequencies_are_others_of_the_same_range(kind):
    config = replace(ModelConfig(), frequencies=kind)
    primes, control = log_frequencies(ModelConfig()), log_frequencies(config)
    assert control.shape == primes.shape == (128,)
    assert (np.diff(control) > 0).all()
    assert np.abs(np.log(primes[:, None] / control)).min(0).max() > 1e-3
    if kind != "composite":
        assert control.min() >= primes.min() - 1e-9
        assert control.max() <= primes.max() + 1e-9
    assert np.array_equal(control, log_frequencies(config))


def test_frequencies_reach_up_to_the_top_where_one_is_set():
    config = replace(ModelConfig(), frequencies="even", frequency_top=12.0)
    np.testing.assert_allclose(np.diff(log_frequencies(config)), (12 - math.log(2)) / 127)
    assert log_frequencies(replace(config, frequencies="random")).max() > 11
    for wrong in (replace(config, frequencies="prime_powers"), replace(config, frequency_top=0.5)):
        with pytest.raises(UserError, match="frequency_top"):
            log_frequencies(wrong)


@pytest.mark.parametrize("kind", ["prime_powers", "shuffled", "random", "composite", "even"])
def test_fewer_frequencies_stand_for_more_pairs_each(kind):
    config = replace(ModelConfig(), frequencies=kind)
    few, times = np.unique(log_frequencies(replace(config, frequency_count=32)), return_counts=True)
    assert few.shape == (32,)
    assert (times == 4).all()
    assert np.array_equal(log_frequencies(config), log_frequencies(replace(config, frequency_count=128)))
    if kind == "prime_powers":
        np.testing.assert_allclose(few, np.log(prime_powers(32)))
    if kind == "even":  # the range stays, so that density is the only thing that changes
        assert few[-1] == log_frequencies(config)[-1]
    with pytest.raises(UserError, match="frequency_count = 33 with 128 pairs"):
        log_frequencies(replace(config, frequency_count=33))


def test_rotations_take_whole_turns_off_in_double_precision():
    gamma = torch.tensor([0.0, 133.3, 1e6], dtype=torch.float64)
    turns = gamma * (math.log(587) / (2 * math.pi))
    expected = np.exp(1j * (gamma.numpy() * math.log(587)))
    assert_parity(rotations(turns)[..., 0], expected.real, atol=1e-6)
    assert_parity(rotations(turns)[..., 1], expected.imag, atol=1e-6)


def test_rotate_one_pass_equals_the_written_out_form(monkeypatch):
    x, angle = torch.randn(2, 5, 3, 8), torch.rand(5, 1, 4)
    rotation = rotations(angle)
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = rotation.unbind(-1)
    slow = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    assert_parity(rotate(x, rotation), slow, atol=1e-6)
    assert_parity(rotate(rotate(x, rotation), rotation, back=True), x, atol=1e-6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the form that CUDA runs
    assert torch.equal(rotations(angle), rotation)
    assert_parity(rotate(x, rotation), slow, atol=1e-6)
    assert_parity(rotate(rotate(x, rotation), rotation, back=True), x, atol=1e-6)
