"""The flat models: the function they compute, alone, in company, in bfloat16 and compiled."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.losses import angle_loss
from iceaggr.models import blocks
from lab_shared.attention import attend
from lab_shared.norms import rms_norm
from lab_shared.testing import assert_parity
from torch.nn import functional as F

WIDTH = 10
"""Features of the tiny models."""
ARCHS = ("v2", "v1")
pytestmark = pytest.mark.usefixtures("one_thread")


def stirred(model):
    """The model with its zero-initialised matrices random too: a fresh v2 ignores its DOMs."""
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.detach().abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
        if name.endswith(("scale_x", "scale_x0")):
            torch.nn.init.uniform_(p, 0.3, 1.2)
    return model


# --- the function the model computes --------------------------------------------------------------


def naive_v2(model, events):
    """The definition, one event at a time, one head at a time, with plain softmax."""

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    result = []
    for event in events:
        x = rms(model.input.layers(event))
        x0 = x = torch.cat([model.cls_D[None], x])
        for block in model.blocks:
            x = block.scale_x * x + block.scale_x0 * x0
            y, a = rms(x), block.attention
            outputs = []
            for wq, wk, wv in zip(*(layer.weight.chunk(a.heads) for layer in (a.q, a.k, a.v)), strict=True):
                q, k, v = rms(y @ wq.T), rms(y @ wk.T), y @ wv.T
                outputs.append(torch.softmax(q @ k.T / math.sqrt(q.shape[1]), -1) @ v)
            x = x + torch.cat(outputs, -1) @ a.c_proj.weight.T
            x = x + F.relu(rms(x) @ block.c_fc.weight.T) ** 2 @ block.c_proj.weight.T
        result.append(model.head(rms(x)[0]))
    return torch.stack(result)


def torch_encoder(model):
    """v1's blocks as torch's own pre-norm encoder."""
    layer = torch.nn.TransformerEncoderLayer(
        32, 2, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, len(model.blocks), norm=model.norm, enable_nested_tensor=False)
    for theirs, ours in zip(encoder.layers, model.blocks, strict=True):
        a = ours.attention
        del theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias
        theirs.self_attn.in_proj_weight = torch.cat([a.q.weight, a.k.weight, a.v.weight])
        theirs.self_attn.in_proj_bias = torch.cat([a.q.bias, a.k.bias, a.v.bias])
        theirs.self_attn.out_proj = a.c_proj
        theirs.norm1, theirs.norm2, theirs.linear1, theirs.linear2 = (
            ours.norm1,
            ours.norm2,
            ours.c_fc,
            ours.c_proj,
        )
    return encoder


def naive_v1(model, events):
    encoder = torch_encoder(model)
    tokens = (torch.cat([model.cls_D[None], model.input.layers(event)])[None] for event in events)
    return torch.cat([model.head(encoder(x)[:, 0]) for x in tokens])


@pytest.mark.parametrize(
    ("arch", "mode", "naive"),
    [("v2", "linear", naive_v2), ("v2", "mlp", naive_v2), ("v1", "linear", naive_v1)],
)
def test_forward_and_gradients_match_the_definition(arch, mode, naive, random_events, pack, tiny):
    model, events = stirred(tiny(arch, input=mode)), random_events([1, 7, 30, 2])
    v_E3, expected = model(*pack(events)), naive(model, events)
    assert_parity(v_E3, expected, atol=3e-5)
    weights = torch.randn(v_E3.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((v_E3 * weights).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert_parity(a, b, atol=1e-4 * (1 + float(b.abs().max())), name=name)


def test_mode_none_pads_with_zeros(random_events, pack, tiny):
    model = stirred(tiny(input="none"))
    features_TF, mask, _ = pack(random_events([5]))
    x0_TD = model.embed(features_TF, mask)
    assert not x0_TD[1:, WIDTH:].any()
    assert_parity(x0_TD[1:], rms_norm(F.pad(features_TF, (0, 32 - WIDTH)))[1:], atol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_block_skips_only_what_nobody_reads(arch, random_events, pack, tiny):
    """The walk through the parts that the module's docstring gives to analyses ends at the same vectors."""
    model, (features_TF, mask, cls_E) = stirred(tiny(arch)), pack(random_events([4, 11, 6]))
    x0_TD = x_TD = model.embed(features_TF, mask)
    for block in model.blocks:
        x_TD = block(x_TD, x0_TD, mask)
    assert_parity(model.head(model.norm(x_TD[cls_E])), model(features_TF, mask, cls_E), atol=1e-5)


def test_heads_are_open_to_analysis(random_events, pack, tiny):
    model, (features_TF, mask, _) = stirred(tiny()), pack(random_events([4, 11]))
    x0_TD = model.embed(features_TF, mask)
    q, k, v = model.blocks[0].attention.project(x0_TD)
    _, weights = attend(q, k, v, mask, backend="reference", return_weights=True)
    assert weights.shape[-2:] == (17, 17)
    assert_parity(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5)
    assert weights[..., :5, 5:].abs().max() == 0


# --- symmetries of packing ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_order_of_doms_and_company_do_not_matter(arch, counts, seed, random_events, pack, tiny):
    model, events = stirred(tiny(arch)), random_events(counts, seed)
    with torch.no_grad():
        v_E3 = model(*pack(events))
        generator = torch.Generator().manual_seed(seed)
        shuffled = [e[torch.randperm(len(e), generator=generator)] for e in events]
        assert_parity(model(*pack(shuffled)), v_E3, atol=3e-5, name="order")
        alone = torch.cat([model(*pack([e])) for e in events])
        assert_parity(alone, v_E3, atol=3e-5, name="alone")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("extra_rows", "extra_events"), [(0, 3), (1, 1), (50, 0), (50, 20)])
def test_unused_rows_and_events_change_nothing(arch, extra_rows, extra_events, random_events, pack, tiny):
    """Also when the batch is exactly full and the unused events point at the last DOM."""
    model, events = stirred(tiny(arch)), random_events([5, 12, 1])
    plain = model(*pack(events))
    padded = model(*pack(events, rows=21 + extra_rows, capacity=3 + extra_events))
    assert padded.shape == (3 + extra_events, 3)
    assert torch.isfinite(padded).all()
    assert_parity(padded[:3], plain, atol=1e-5)
    valid = torch.arange(3 + extra_events) < 3
    loss, count = angle_loss(padded, torch.ones_like(padded), valid)
    loss.backward()
    assert int(count) == 3
    padded_gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    angle_loss(plain, torch.ones_like(plain))[0].backward()
    for a, p in zip(padded_gradients, model.parameters(), strict=True):
        if a is not None:
            assert_parity(a, p.grad, atol=1e-5 * (1 + float(p.grad.abs().max())))


@pytest.mark.parametrize("arch", ARCHS)
def test_cls_rows_carry_no_features_and_events_do_not_mix(arch, random_events, pack, tiny):
    model, events = stirred(tiny(arch)), random_events([5, 12])
    assert torch.equal(model(*pack(events, cls_row=7.0)), model(*pack(events)))
    features_TF, mask, cls_E = pack(events)
    features_TF.requires_grad_()
    model(features_TF, mask, cls_E)[0].sum().backward()
    assert (features_TF.grad[6:] == 0).all()
    assert (features_TF.grad[0] == 0).all()
    assert (features_TF.grad[1:6].abs().sum(-1) > 0).all()


# --- bfloat16, compiled ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_autocast_bfloat16(arch, random_events, pack, tiny):
    model, batch = stirred(tiny(arch)), pack(random_events([5, 12, 30]))
    exact = model(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v_E3 = model(*batch)
        assert model.embed(batch[0], batch[1]).dtype == torch.bfloat16
    assert v_E3.dtype == torch.float32
    assert_parity(v_E3, exact, atol=0.1 * exact.abs().max().item())
    angle_loss(v_E3, torch.ones_like(v_E3))[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.fixture(scope="module")
def company(random_events):
    return [random_events(counts, seed=i) for i, counts in enumerate([[5, 60, 30], [80, 2, 9, 20], [1]])]


@pytest.mark.slow
def test_one_compiled_graph_serves_every_batch(monkeypatch, company, pack, tiny):
    """The path a GPU takes, traced on the CPU (where FlexAttention has no backward)."""
    model = stirred(tiny()).requires_grad_(False)
    expected = [model(*pack(events)) for events in company]
    monkeypatch.setattr(blocks, "attend", partial(attend, backend="flex"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for i, (events, eager) in enumerate(zip(company, expected, strict=True)):
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            v_E3 = compiled(*pack(events, rows=128, capacity=8))
        assert_parity(v_E3[: len(events)], eager, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_compiled_training_on_gpu_matches_the_cpu(arch, dtype, atol, company, pack, tiny):
    model = stirred(tiny(arch))
    expected = [model(*pack(events)).detach() for events in company]
    model.cuda()
    compiled = torch.compile(model, fullgraph=True)
    for i, (events, cpu) in enumerate(zip(company, expected, strict=True)):
        batch = pack(events, rows=128, capacity=8, device="cuda")
        valid = torch.arange(8, device="cuda") < len(events)
        model.zero_grad()
        with (
            torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"),
            torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32),
        ):
            v_E3 = compiled(*batch)
        angle_loss(v_E3, torch.ones_like(v_E3), valid)[0].backward()
        assert v_E3.dtype == torch.float32
        assert_parity(v_E3[: len(events)], cpu, atol=atol * (1 + cpu.abs().max().item()))
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
