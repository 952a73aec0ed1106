import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab_shared.norms import RMSNorm, qk_norm, rms_norm
from lab_shared.testing import assert_parity


@given(st.integers(1, 40), st.floats(0.1, 100), st.integers(0, 2**16))
def test_rms_is_one_at_any_scale(dim, scale, seed):
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + scale
    mean_square = x.square().mean(-1)
    assert_parity(rms_norm(x).square().mean(-1), mean_square / (mean_square + 1e-6), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_torch_and_keeps_the_dtype(dtype):
    x = torch.randn(7, 3, 24).to(dtype)
    y = rms_norm(x)
    assert y.dtype == dtype
    expected = torch.nn.functional.rms_norm(x.double(), (24,), eps=1e-6)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_half_precision_does_not_overflow():
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x), torch.ones_like(x))


def test_zero_rows_stay_zero_with_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_gradient():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x,))


def test_module_has_one_weight_and_applies_it():
    norm = RMSNorm(6)
    assert sum(p.numel() for p in norm.parameters()) == 6
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
    x = torch.randn(4, 6)
    torch.testing.assert_close(norm(x), rms_norm(x) * torch.arange(6.0))
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_qk_norm_bounds_the_scores():
    q, k = qk_norm(torch.randn(9, 2, 16) * 50, torch.randn(9, 2, 16) * 0.3)
    scores = torch.einsum("qhd,khd->hqk", q, k)
    assert scores.abs().max() <= 16 + 1e-4
    torch.testing.assert_close(k.square().mean(-1), torch.ones(9, 2), atol=1e-3, rtol=0)
