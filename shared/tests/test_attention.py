"""Every back end against a slow loop over single queries, and masks against their written definition."""

import functools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.attention import Mask, attend
from lab_shared.testing import assert_parity

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OFFSETS = [0, 5, 5, 70, 71, 200, 200]  # empty segments, one of a single token, tokens 200.. are padding
TOTAL = 210


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def may_see(kind, query, key):
    """The definition of each mask used below, on single indices."""
    if kind in ("segments", "causal segments"):
        own = [s for s in range(len(OFFSETS) - 1) if OFFSETS[s] <= query < OFFSETS[s + 1]]
        return bool(own) and OFFSETS[own[0]] <= key < OFFSETS[own[0] + 1] and (kind == "segments" or key <= query)
    if kind in ("prefix", "symmetric prefix"):  # 7 slots, then data
        return key <= query or (kind == "symmetric prefix" and key < 7)
    if kind in ("postfix", "symmetric postfix"):  # 195 data, three groups of 5 slots seeing 195, 0 and 130 data
        if query < 195:
            return key <= query
        group = (query - 195) // 5
        if key < 195:
            return key < (195, 0, 130)[group]
        return (key - 195) // 5 == group and (key <= query or kind == "symmetric postfix")
    if kind == "plain postfix":  # one group that sees everything before it
        return key <= query
    return {"full": True, "causal": key <= query, "dense": (query * 7 + key * 3) % 5 < 2 and query != 11}[kind]


KINDS = [
    "full",
    "causal",
    "segments",
    "causal segments",
    "prefix",
    "symmetric prefix",
    "postfix",
    "symmetric postfix",
    "plain postfix",
    "dense",
]


@functools.cache
def allowed_matrix(kind):
    return torch.tensor([[may_see(kind, i, j) for j in range(TOTAL)] for i in range(TOTAL)])


def build(kind, device="cpu"):
    if "segments" in kind:
        return Mask.segments(torch.tensor(OFFSETS, device=device), TOTAL, causal=kind.startswith("causal"))
    if "prefix" in kind:
        return Mask.memory_prefix(7, TOTAL - 7, causal_slots=kind == "prefix", device=device)
    if kind == "plain postfix":
        return Mask.memory_postfix(TOTAL - 8, 8, device=device)
    if "postfix" in kind:
        return Mask.memory_postfix(195, 5, positions=[195, 0, 130], causal_slots=kind == "postfix", device=device)
    if kind == "dense":
        return Mask.dense(allowed_matrix(kind).to(device))
    return {"full": Mask.full, "causal": Mask.causal}[kind]()


def naive(q, k, v, allowed, scale=None, score=None):
    """Attention of (B, H, T, D) in float64, one query at a time. Returns out and log-sum-exp."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    n_batch, n_heads, n_query, dim = q.shape
    out = np.zeros((n_batch, n_heads, n_query, v.shape[-1]))
    lse = np.full((n_batch, n_heads, n_query), -np.inf)
    group = n_heads // k.shape[1]
    for b, h, i in np.ndindex(n_batch, n_heads, n_query):
        keys = np.arange(k.shape[2]) if allowed is None else np.flatnonzero(allowed[i])
        if not len(keys):
            continue
        s = k[b, h // group, keys] @ q[b, h, i] * (scale or dim**-0.5)
        if score is not None:
            s = np.array([score(x, b, h, i, j) for x, j in zip(s, keys, strict=True)])
        weight = np.exp(s - s.max())
        out[b, h, i] = weight @ v[b, h // group, keys] / weight.sum()
        lse[b, h, i] = np.log(weight.sum()) + s.max()
    return torch.from_numpy(out), torch.from_numpy(lse)


def qkv(n_tokens=TOTAL, n_batch=1, heads=(4, 2), dim=16, dtype=torch.float32, device="cpu"):
    shapes = [(n_batch, h, n_tokens, dim) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


def rows(x):
    """(1, H, T, D) to packed (T, H, D)."""
    return x[0].transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_a_loop_over_queries(kind):
    with torch.no_grad():
        q, k, v = qkv(heads=(2, 1), dim=4)
        out, lse, weights = attend(
            q, k, v, build(kind), scale=0.7, backend="reference", return_lse=True, return_weights=True
        )
    expected, expected_lse = naive(q, k, v, allowed_matrix(kind), 0.7)
    assert_parity(out, expected, atol=1e-5)
    assert_parity(lse, expected_lse, atol=1e-5)
    assert_parity(weights @ v, out, atol=1e-5)
    assert (weights[..., ~allowed_matrix(kind)] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("flex", marks=pytest.mark.gpu), "varlen"])
def test_forward_and_backward_equal_the_reference(backend, kind, dtype, packed, device):
    if backend == "flex" and device == "cpu":
        pytest.skip("FlexAttention has no backward on CPU")
    if backend == "varlen" and (device == "cpu" or dtype == torch.float32 or "segments" not in kind):
        pytest.skip("varlen runs packed segments in half precision on CUDA")
    inputs = qkv(dtype=dtype, device=device)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    mask = build(kind, device)
    if packed:
        out = attend(*(rows(x) for x in inputs), mask, backend=backend).transpose(0, 1)[None]
    else:
        out = attend(*inputs, mask, backend=backend)
    expected = attend(*wide, mask, backend="reference")
    grad = torch.randn_like(expected)
    out.backward(grad.to(dtype))
    expected.backward(grad)
    atol = 1e-5 if dtype == torch.float32 else 0.03
    assert out.dtype == dtype
    assert_parity(out.float(), expected, atol=atol, name="output")
    for name, x, y in zip("qkv", inputs, wide, strict=True):
        scale = y.grad.abs().max().item()
        assert_parity(x.grad.float() / scale, y.grad / scale, atol=atol, name=f"gradient of {name}")


def distance_penalty(slope):
    """A score_mod over a tensor, as a model would make it."""

    def score_mod(score, b, h, q, k):
        return score - slope[h] * (q - k).abs()

    return score_mod


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, "sdpa", "flex"])
@pytest.mark.parametrize("kind", ["segments", "causal segments"])
@pytest.mark.parametrize("shape", [(4, TOTAL, TOTAL), (1, 1, 1, TOTAL)])
def test_bias_score_mod_and_lse_on_packed_segments(backend, kind, shape, device):
    if backend == "flex" and device == "cpu":
        pytest.skip("FlexAttention has no backward on CPU")
    inputs = [rows(x).detach().requires_grad_() for x in qkv(device=device)]
    bias = torch.randn(shape, device=device, requires_grad=True)
    slope = torch.tensor([0.1, 0.0, 0.02, 0.3], device=device)
    mask = build(kind, device)
    results = []
    for name in (backend, "reference"):
        asked = {"bias": bias, "score_mod": distance_penalty(slope), "return_lse": True, "backend": name}
        out, lse = attend(*inputs, mask, **asked)
        used = lse[: OFFSETS[-1]]
        assert out.shape == (TOTAL, 4, 16)
        assert torch.isneginf(lse[OFFSETS[-1] :]).all()
        gradients = torch.autograd.grad(out.square().sum() + used.sum(), [*inputs, bias])
        results.append([out, used, *gradients])
    for x, y in zip(*results, strict=True):
        assert_parity(x, y, atol=1e-5 * max(1.0, y.abs().max().item()))


@pytest.mark.parametrize("kind", ["full", "causal", "symmetric postfix", "dense"])
def test_sdpa_takes_a_learned_bias(kind):
    inputs = [x.detach().requires_grad_() for x in qkv(n_batch=2)]
    bias = torch.randn(4, 1, TOTAL, requires_grad=True)
    results = []
    for backend in ("sdpa", "reference"):
        out = attend(*inputs, build(kind), bias=bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, bias])])
    for x, y in zip(*results, strict=True):
        assert_parity(x, y, atol=1e-5 * max(1.0, y.abs().max().item()))


def test_score_mod_of_the_reference_is_the_definition():
    with torch.no_grad():
        q, k, v = qkv(n_tokens=9, n_batch=2, heads=(2, 2), dim=4)
        bias, slope = torch.randn(2, 2, 9, 9), torch.tensor([0.3, 1.0])
        out = attend(q, k, v, bias=bias, score_mod=distance_penalty(slope), backend="reference")
    expected, _ = naive(
        q, k, v, None, score=lambda s, b, h, i, j: s + bias[b, h, i, j].item() - slope[h].item() * abs(i - j)
    )
    assert_parity(out, expected, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex", "varlen"])
def test_a_segment_never_sees_another(backend, device):
    if device == "cpu" and backend in ("flex", "varlen"):
        pytest.skip("no backward on CPU")
    dtype = torch.bfloat16 if backend == "varlen" else torch.float32
    inputs = [rows(x).detach().requires_grad_() for x in qkv(dtype=dtype, device=device)]
    out = attend(*inputs, build("segments", device), backend=backend)
    out[5:70].float().square().sum().backward()
    for x in inputs:
        assert (x.grad[:5] == 0).all()
        assert (x.grad[70:] == 0).all()
        assert (x.grad[5:70] != 0).any()
    assert (out[OFFSETS[-1] :] == 0).all()


segment_lengths = st.lists(st.integers(0, 60), max_size=12)


@settings(max_examples=30, deadline=None)
@given(segment_lengths, st.integers(0, 40), st.booleans(), st.integers(0, 2**16))
def test_packed_sdpa_equals_the_reference_for_any_offsets(lengths, padding, causal, seed):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1]) + padding
    if total == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(total, 2, 3, generator=generator, requires_grad=True) for _ in range(3)]
    mask = Mask.segments(torch.from_numpy(offsets), total, causal=causal)
    results = []
    for backend in ("sdpa", "reference"):
        out = attend(*inputs, mask, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for x, y in zip(*results, strict=True):
        assert_parity(x, y, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from torch's own inductor
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["segments", "causal", "postfix", "dense"])
def test_compiled_flex_forward_on_cpu(kind):
    torch._dynamo.reset()
    slope = torch.tensor([0.1, 0.0, 0.02, 0.3])
    with torch.no_grad():
        inputs = qkv(dim=8 if kind == "segments" else 16)
        out, expected = (
            attend(*inputs, build(kind), backend=backend, score_mod=distance_penalty(slope))
            for backend in ("flex", "reference")
        )
    assert_parity(out, expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "biased"), [("causal", False), ("causal", True), ("segments", False)])
def test_a_cpu_trains_bfloat16_attention_in_float32(kind, biased):
    inputs = qkv(heads=(2, 2), dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    bias = torch.randn(1, 2, TOTAL, TOTAL).bfloat16() if biased else None
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, build(kind), bias=bias, backend="sdpa")
    expected = attend(*wide, build(kind), bias=None if bias is None else bias.float(), backend="sdpa")
    grad = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, inputs, grad)]
    want = [expected, *torch.autograd.grad(expected, wide, grad.float())]
    for narrow, x in zip(got, want, strict=True):
        assert torch.equal(narrow, x.bfloat16())  # rounded once, at the end


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 32, 48, 64, 128])
def test_flex_on_packed_segments_of_every_head_size(dim, dtype):
    torch._dynamo.reset()
    offsets = torch.tensor([0, 60, 61, 61, 300, 777, 1000], device="cuda")
    mask = Mask.segments(offsets, 1024, max_len=500)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1024, 2, dim)
    inputs = [torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    seed = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    results = []
    for backend in ("flex", "reference"):
        out = attend(*inputs, mask, backend=backend)
        results.append([out, *torch.autograd.grad(out, inputs, seed)])
    for fast, slow in zip(*results, strict=True):
        assert_parity(fast.float(), slow.float(), atol=tolerance, rtol=tolerance)


def test_nothing_but_padding_has_the_shape_and_type_of_the_reference():
    q, k = (torch.full((5, 2, 8), torch.inf, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.ones(5, 2, 4, dtype=torch.float64, requires_grad=True)
    out, lse = attend(q, k, v, Mask.segments(torch.tensor([0, 0]), 5), backend="sdpa", return_lse=True)
    assert torch.equal(out, torch.zeros_like(v))
    assert torch.equal(lse, torch.full((5, 2), -torch.inf, dtype=torch.float64))
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))
