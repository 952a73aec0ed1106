"""The package's own attention kernels: on CPUs in Triton's interpreter, in a process of its own, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from gauge_attn import kernel, kl_attention
from gauge_attn.reference import dense_kl_attention
from gauge_attn.so3 import frames
from lab_shared.testing import assert_parity

MASKS = (
    {"causal": False, "self_mask": False},
    {"causal": True, "self_mask": False},
    {"causal": True, "self_mask": True},
)
SHAPES = ((1, 3, 3), (70, 24, 8), (65, 10, 40))


def naive(q, k, v, *, causal, self_mask):
    """Output and log-sum-exp by the definition, in float64."""
    n = q.size(2)
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
    seen = (j < i) | ((i == 0) & (j == 0)) if self_mask else (j <= i) if causal else (j < n)
    logits = (q.double() @ k.double().mT).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


def compare(device, shapes=SHAPES, scale=1.0):
    from gauge_attn.triton_attention import narrow_attention

    torch.manual_seed(0)
    for n, d, e in shapes:
        for masks in MASKS:
            # Heads before tokens in memory, as features are laid out.
            q, k = (scale * torch.randn(2, n, 2, d, device=device).transpose(1, 2).requires_grad_() for _ in range(2))
            v = torch.randn(2, 2, n, e, device=device, requires_grad=True)
            out, lse = narrow_attention(q, k, v, **masks)
            assert not lse.requires_grad
            exact, exact_lse = naive(q, k, v, **masks)
            assert_parity(out, exact, atol=2e-5)
            assert_parity(lse, exact_lse, atol=2e-5)
            weights = torch.randn_like(out)
            found = torch.autograd.grad((out * weights).sum(), (q, k, v))
            wanted = torch.autograd.grad((exact * weights).sum(), (q, k, v))
            for name, ours, theirs in zip("qkv", found, wanted, strict=True):
                assert_parity(ours, theirs, atol=1e-4, rtol=1e-4, name=name)


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    folder, name = os.path.split(__file__)
    code = f"import sys; sys.path.insert(0, {folder!r}); import {name.removesuffix('.py')} as t; t.compare('cpu')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_kernels_have_float32_accuracy_whatever_the_tf32_setting(tf32):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        compare("cuda", [*SHAPES, (700, 24, 24), (257, 55, 55), (300, 36, 110)])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["variances", "covariances", "isotropic"])
def test_kl_attention_by_the_own_kernel_is_the_reference(monkeypatch, beliefs, kind):
    monkeypatch.setattr(kernel, "OWN_KERNEL", True)
    for l in range(5):
        x = beliefs(l, kind, n_tokens=65, spread=0.5)
        for options in ({}, {"self_mask": True}, {"alibi": 0.1}, {"causal": False}):
            dense = dense_kl_attention(*x[:3], 0.43, **options)
            got = kl_attention(*(t.float().cuda() for t in x[:3]), 0.43, return_lse=True, return_kl=True, **options)
            for field in ("mean", "covariance", "lse", "kl"):
                assert_parity(getattr(got, field), getattr(dense, field), atol=1e-4, rtol=1e-4, name=field)


@pytest.mark.gpu
def test_the_own_kernel_inside_compiled_code(monkeypatch, beliefs):
    monkeypatch.setattr(kernel, "OWN_KERNEL", True)
    mu, sigma, _, phi = (t.cuda() for t in beliefs(2, n_tokens=64, dtype=torch.float32))

    def run(mu, sigma, phi):
        done = kl_attention(mu, sigma, frames(phi, 2), 0.43, self_mask=True)
        return done.mean.square().sum() + done.covariance.sum()

    def gradients(function):
        leaves = [t.detach().requires_grad_() for t in (mu, sigma, phi)]
        total = function(*leaves)
        return total, torch.autograd.grad(total, leaves)

    plain, exact = gradients(run)  # also makes the constant tables
    fast, found = gradients(torch.compile(run, fullgraph=True, dynamic=False))
    assert_parity(fast, plain, atol=1e-3, rtol=1e-5)
    for ours, theirs in zip(found, exact, strict=True):
        assert_parity(ours, theirs, atol=1e-4, rtol=1e-3)
