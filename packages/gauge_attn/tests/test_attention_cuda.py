"""Exact KL attention on a GPU: its kernels, precision settings, compilation and memory."""

import pytest
import torch
from gauge_attn import kl_attention
from gauge_attn.kernel import fused
from gauge_attn.reference import dense_kl_attention
from gauge_attn.so3 import frames
from lab_shared.testing import assert_parity

F64 = torch.float64
FIELDS = ("mean", "covariance", "lse", "kl")


def naive_lse(q, k, causal):
    scores = q.double() @ k.double().mT
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf
        )
    return scores.logsumexp(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_kernels_give_float32_accuracy_and_the_log_sum_exp(dtype, tf32):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        for n in (1, 33, 700):
            q, k, v = (3 * torch.randn(2, 3, n, 24, device="cuda", dtype=dtype) for _ in range(3))
            for causal in (True, False):
                out, lse = fused(q, k, v, causal, True)
                assert_parity(lse, naive_lse(q, k, causal), atol=1e-3 if dtype == torch.float32 else 1e-11)
                assert_parity(fused(q, k, v, causal, False)[0], out, atol=1e-4)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["variances", "covariances", "isotropic"])
@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_matches_the_reference_whatever_the_tf32_setting(beliefs, kind, tf32):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        for l in range(4):
            x = beliefs(l, kind, n_tokens=65, spread=0.5)
            for options in ({}, {"self_mask": True}, {"alibi": 0.1}):
                dense = dense_kl_attention(*x[:3], 0.43, **options)
                low = [t.float().cuda() for t in x[:3]]
                got = kl_attention(*low, 0.43, return_lse=True, return_kl=True, **options)
                for field in FIELDS:
                    assert_parity(getattr(got, field), getattr(dense, field), atol=1e-4, rtol=1e-4, name=field)
                fine = kl_attention(*(t.cuda() for t in x[:3]), 0.43, return_lse=True, return_kl=True, **options)
                for field in FIELDS:
                    assert_parity(getattr(fine, field), getattr(dense, field), atol=1e-10, name=field)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("return_kl", [False, True])
def test_cuda_averages_means_alone_with_narrow_values(beliefs, return_kl):
    x = beliefs(2, n_tokens=65, spread=0.5)
    options = {"self_mask": True, "mean_only": True, "return_kl": return_kl}

    def run(mu, sigma, phi):
        done = kl_attention(mu, sigma, frames(phi, 2), 0.43, **options)
        total = done.mean.square().sum() + (done.kl.sum() if return_kl else 0)
        return done.mean, torch.autograd.grad(total, (mu, sigma, phi))

    leaves = [x.mu, x.sigma, x.phi]
    mean, gradients = run(*(t.clone().requires_grad_() for t in leaves))
    fast_mean, fast_gradients = run(*(t.float().cuda().requires_grad_() for t in leaves))
    assert_parity(fast_mean, mean, atol=1e-4, rtol=1e-4)
    for fast, exact in zip(fast_gradients, gradients, strict=True):
        assert_parity(fast, exact, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_compiled_on_cuda_without_graph_breaks(beliefs):
    x = beliefs(2, n_tokens=64, dtype=torch.float32)
    mu, sigma, _, phi = (t.cuda() for t in x)

    def run(mu, sigma, phi):
        return kl_attention(mu, sigma, frames(phi, 2), 0.43, self_mask=True).mean

    plain = run(mu, sigma, phi)  # also makes the constant tables
    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    assert_parity(compiled(mu, sigma, phi), plain, atol=1e-5)


@pytest.mark.gpu
def test_memory_is_linear_in_tokens_on_cuda():
    peaks = []
    for n in (2048, 4096, 8192):
        mu = torch.randn(1, 4, n, 5, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kl_attention(mu, torch.ones_like(mu), None, 0.43).mean.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.3 * peaks[0]
    assert peaks[2] < 2.3 * peaks[1]
