"""The test helpers must themselves be able to fail."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from lab_shared.testing import assert_equivariant, assert_parity, golden


def test_parity_passes_within_tolerance_and_fails_outside():
    x = torch.arange(6.0).view(2, 3)
    assert_parity(x + 0.9e-5, x, atol=1e-5)
    assert_parity(x * (1 + 1e-6), x.numpy(), atol=0, rtol=1.1e-6)
    y = x.clone()
    y[1, 2] += 0.5
    y[0, 1] += 0.1
    with pytest.raises(AssertionError, match=r"flex: 2 of 6 elements.*\[1, 2\]: 5.5 against 5 \(difference 0.5"):
        assert_parity(y, x, atol=1e-5, name="flex")


def test_parity_compares_bf16_in_full_precision():
    x = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="3 of 3"):
        assert_parity(x, torch.full((3,), 1.001), atol=1e-4)


def test_parity_of_shapes_infinities_and_nan():
    with pytest.raises(AssertionError, match=r"shape \(3, 1\), the reference has \(3,\)"):
        assert_parity(torch.zeros(3, 1), torch.zeros(3), atol=1)
    inf = torch.tensor([math.inf, -math.inf])
    assert_parity(inf, inf, atol=0)
    for other in (-inf, torch.zeros(2), torch.full((2,), math.nan)):
        with pytest.raises(AssertionError, match="2 of 2"):
            assert_parity(other, inf, atol=1e9, rtol=1.0)
        with pytest.raises(AssertionError, match="2 of 2"):
            assert_parity(inf, other, atol=1e9)
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_parity(math.nan, math.nan, atol=1)
    assert_parity(torch.zeros(0), np.zeros(0), atol=0)


def test_equivariance():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    x = torch.randn(5, 2)
    assert_equivariant(lambda x: 2 * x, x, lambda x: x @ turn, lambda y: y @ turn, atol=1e-6)
    with pytest.raises(AssertionError, match=r"abs\(transformed input\) against transformed abs\(input\)"):
        assert_equivariant(torch.abs, x, lambda x: x @ turn, lambda y: y @ turn, atol=1e-6, name="abs")


def test_golden(tmp_path, monkeypatch):
    path, values = tmp_path / "golden" / "x.json", [0.1, 1 / 3, 2.0]
    monkeypatch.delenv("LAB_UPDATE_GOLDEN", raising=False)
    with pytest.raises(AssertionError, match="LAB_UPDATE_GOLDEN=1"):
        golden(path, values)
    assert not path.exists()
    monkeypatch.setenv("LAB_UPDATE_GOLDEN", "1")
    golden(path, values)
    monkeypatch.delenv("LAB_UPDATE_GOLDEN")
    assert json.loads(path.read_text()) == values
    golden(path, values)
    golden(path, [0.1 * (1 + 5e-8), 1 / 3, 2.0])
    monkeypatch.setenv("LAB_UPDATE_GOLDEN", "1")
    golden(path, [0.1 * (1 + 5e-8), 1 / 3, 2.0])
    assert json.loads(path.read_text()) == values, "what has not moved is not rewritten"
    monkeypatch.delenv("LAB_UPDATE_GOLDEN")
    with pytest.raises(AssertionError, match=r"value 1 is 0.3334, golden 0.333333.*relative change 0.0002"):
        golden(path, [0.1, 0.3334, 2.0])
    with pytest.raises(AssertionError, match="3 golden values, 2 measured"):
        golden(path, values[:2])
    with pytest.raises(AssertionError, match="finite"):
        golden(path, [math.nan])
