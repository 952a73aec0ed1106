"""Block lists against create_block_mask's, the bucket plan, and what compiling and bad offsets do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.attention import Mask, attend
from lab_shared.attention.blocks import all_partial
from lab_shared.attention.packing import ALIGN, RATIO, plan_buckets, to_buckets, to_tokens
from lab_shared.testing import assert_parity
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def offsets_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


def dense_blocks(number, index):
    """Counts and index lists as a bool matrix of blocks, entry by entry."""
    number, index = number[0, 0].tolist(), index[0, 0].tolist()
    matrix = torch.zeros(len(number), len(number), dtype=torch.bool)
    for row, count in enumerate(number):
        assert count <= len(index[row]), "the list is too short for its count"
        assert len(set(index[row][:count])) == count, "a block is listed twice"
        assert all(0 <= column < len(number) for column in index[row])
        matrix[row, index[row][:count]] = True
    return matrix


def assert_blocks_equal(mask, *, exact=True):
    """mask.blocks against what create_block_mask finds by looking at every pair of tokens. Not exact: partial
    blocks may be more, full ones fewer."""
    spans, total = mask.spans, mask.total
    ours = mask.blocks
    oracle = create_block_mask(
        lambda b, h, q, k: spans.contains(q, k), None, None, total, total, device="cpu", BLOCK_SIZE=ours.size
    )
    for view in ("kv", "q"):
        partial, full = (
            dense_blocks(getattr(ours, f"{kind}{view}_num"), getattr(ours, f"{kind}{view}_index"))
            for kind in ("", "full_")
        )
        oracle_partial = dense_blocks(getattr(oracle, f"{view}_num_blocks"), getattr(oracle, f"{view}_indices"))
        oracle_full = dense_blocks(getattr(oracle, f"full_{view}_num_blocks"), getattr(oracle, f"full_{view}_indices"))
        assert not (partial & full).any()
        if exact:
            assert (partial == oracle_partial).all()
            assert (full == oracle_full).all()
        assert (full <= oracle_full).all()
        assert ((partial | full) >= (oracle_partial | oracle_full)).all()


lengths_and_padding = st.tuples(
    st.lists(st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 256, 300])), max_size=9),
    st.integers(0, 300),
)


@settings(max_examples=20, deadline=None)
@given(lengths_and_padding, st.booleans())
def test_segment_blocks_equal_create_block_mask(case, causal):
    lengths, padding = case
    if total := sum(lengths) + padding:
        assert_blocks_equal(Mask.segments(offsets_of(lengths), total, causal=causal))
        longest = max(lengths, default=1)
        assert_blocks_equal(Mask.segments(offsets_of(lengths), total, causal=causal, max_len=longest))


def test_block_lists_are_only_as_long_as_the_longest_segment_needs():
    mask = Mask.segments(offsets_of([60] * 400), 24_000, max_len=60)
    assert mask.blocks.kv_index.shape == (1, 1, 375, 3)


@pytest.mark.parametrize("lengths", [[128, 128, 384], [1] * 256, [0, 0, 640, 0], [100, 500, 40]])
def test_segment_blocks_on_block_borders(lengths):
    assert_blocks_equal(Mask.segments(offsets_of(lengths), sum(lengths)))


@pytest.mark.parametrize("n_data", [120, 249, 500])
def test_memory_blocks_equal_create_block_mask(n_data):
    assert_blocks_equal(Mask.memory_prefix(9, n_data, causal_slots=False))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans())
def test_grouped_slot_blocks_cover_what_is_seen(n_data, n_memory, fractions, causal_slots):
    positions = [round(f * n_data) for f in fractions]
    mask = Mask.memory_postfix(n_data, n_memory, positions=positions, causal_slots=causal_slots)
    assert_blocks_equal(mask, exact=False)


def test_blocks_make_a_valid_block_mask():
    mask = Mask.segments(offsets_of([100, 500, 40]), 640)
    size = mask.blocks.size
    block_mask = BlockMask((640, 640), *mask.blocks[:8], BLOCK_SIZE=(size, size), mask_mod=None)
    seen = mask.allowed_dense.view(640 // size, size, 640 // size, size).any(3).any(1)
    assert (block_mask.to_dense()[0, 0].bool() == seen).all()
    everything = all_partial(300, 129, torch.device("cpu"))
    assert everything.kv_num.tolist() == [[[2, 2, 2]]]
    assert everything.q_index.shape == (1, 1, 2, 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=30), st.integers(0, 50))
def test_buckets_hold_every_token_once_and_waste_little(lengths, padding):
    offsets = offsets_of(lengths).numpy()
    used = int(offsets[-1])
    plan = plan_buckets(offsets, used + padding, torch.device("cpu"))
    assert sum(plan.sizes) == plan.token_P.numel() == used + plan.spare_P.numel()
    assert sum(plan.sizes) <= RATIO * sum(n + ALIGN - 1 for n in lengths if n)
    assert (plan.token_P[plan.place_U] == torch.arange(used)).all()
    if not plan.buckets:
        return
    x = torch.randn(used + padding, 2, 3, dtype=torch.float64, requires_grad=True)
    back = to_tokens(to_buckets(x, plan), plan)
    expected = x.detach().clone()
    expected[used:] = 0
    assert (back == expected).all()
    for part, bucket in zip(to_buckets(x, plan), plan.buckets, strict=True):
        if bucket.valid is not None:
            assert (part.transpose(1, 2)[~bucket.valid[:, 0, 0]] == 0).all()


def test_moving_to_buckets_and_back_has_the_right_gradients():
    plan = plan_buckets(np.array([0, 3, 3, 7, 9]), 11, torch.device("cpu"))
    x = torch.randn(11, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: tuple(p.sin() for p in to_buckets(y, plan)), (x,))
    assert torch.autograd.gradcheck(lambda y: to_tokens([p.sin() for p in to_buckets(y, plan)], plan), (x,))
    assert torch.autograd.gradgradcheck(lambda y: to_tokens([p.sin() for p in to_buckets(y, plan)], plan), (x,))


def test_cu_seqlens_cover_all_tokens_in_static_shape():
    shapes = set()
    for lengths in ([600, 0, 90], [1, 1, 1], [0, 0, 3000]):
        mask = Mask.segments(offsets_of(lengths), 3000, max_len=3000)
        cu_seqlens, longest = mask.cu_seqlens
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == 3000
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.diff().min() >= 0
        assert cu_seqlens.diff().max() <= longest
        shapes.add(cu_seqlens.shape)
    assert len(shapes) == 1
    assert Mask.segments(offsets_of([700, 3]), 800).cu_seqlens[1] == 700


@pytest.mark.parametrize(
    ("offsets", "options", "message"),
    [
        ([0, 5, 3], {}, "must not decrease, got 5 then 3"),
        ([1, 5], {}, "start at 0"),
        ([0, 12], {}, "past total=10"),
        ([0, 8], {"max_len": 4}, "longer than max_len=4"),
    ],
)
def test_bad_offsets_are_named(offsets, options, message):
    with pytest.raises(ValueError, match=message):
        Mask.segments(torch.tensor(offsets), 10, **options)


def test_bad_masks_are_named():
    with pytest.raises(ValueError, match=r"positions \[9\] lie outside 0..8"):
        Mask.memory_postfix(8, 2, positions=[3, 9])
    with pytest.raises(ValueError, match="use bias= for scores"):
        Mask.dense(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="has no segments"):
        _ = Mask.memory_prefix(2, 3, causal_slots=False).cu_seqlens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's look at tensors where a graph breaks
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
def test_a_new_mask_of_the_same_sizes_does_not_recompile(backend, prepared):
    """Two layers in one compiled function; flex without gradients, as on CPU it must be."""
    torch._dynamo.reset()

    def model(q, k, v, mask):
        return attend(attend(q, k, v, mask, backend=backend), k, v, mask, backend=backend)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=backend != "sdpa")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            offsets = torch.from_numpy(np.sort(np.append(rng.integers(1, 380, 12), 0)))
            mask = Mask.segments(offsets, 384)
            if prepared:
                mask.prepare(backend)
            q, k, v = (torch.randn(384, 2, 16, requires_grad=backend != "flex") for _ in range(3))
            out = compiled(q, k, v, mask)
            expected = attend(attend(q, k, v, mask, backend="reference"), k, v, mask, backend="reference")
            assert_parity(out, expected, atol=1e-5)
            if backend != "flex":
                out.sum().backward()
                assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_building_segment_blocks_does_not_synchronise(causal):
    offsets = offsets_of([60] * 100).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = Mask.segments(offsets, 6400, causal=causal, max_len=60)
        _ = mask.blocks, mask.cu_seqlens
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = Mask.segments(offsets.cpu(), 6400, causal=causal, max_len=60)
    assert all((x.cpu() == y).all() for x, y in zip(mask.blocks[:8], on_cpu.blocks[:8], strict=True))


@pytest.mark.gpu
def test_flex_compiled_in_a_model_on_cuda():
    """Training through torch.compile with a new mask each step: no recompilation, gradients of the
    reference."""
    torch._dynamo.reset()

    def model(q, k, v, mask):
        return attend(attend(q, k, v, mask), k, v, mask).square().mean()

    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            offsets = torch.from_numpy(np.sort(np.append(rng.integers(1, 1000, 12), 0))).cuda()
            mask = Mask.segments(offsets, 1024).prepare("flex")
            inputs = [torch.randn(1024, 2, 32, device="cuda", requires_grad=True) for _ in range(3)]
            gradients = torch.autograd.grad(compiled(*inputs, mask), inputs)
            layer = attend(*inputs, mask, backend="reference")
            expected = attend(layer, *inputs[1:], mask, backend="reference").square().mean()
            for x, y in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
                scale = y.abs().max().item()
                assert_parity(x / scale, y / scale, atol=1e-5)
