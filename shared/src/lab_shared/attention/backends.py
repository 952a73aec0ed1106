"""The four ways to compute attention. All take (B, H, T, D) or, where named packed, (T, H, D); `attend`
chooses.

score_mod has FlexAttention's signature (score, b, h, q_idx, kv_idx) -> score. In the explicit products it is
called once with tensors that broadcast to (B, H, Tq, Tk), so it must be elementwise (as FlexAttention's own
vmap needs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab_shared.attention.blocks import FINE_KERNEL, Blocks, all_partial
from lab_shared.attention.masks import Mask, Spans
from lab_shared.attention.packing import to_buckets, to_tokens

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

FLEX_MIN_DIM = 16
"""Triton's tl.dot needs at least this inner size; smaller heads are padded with zeros, which is exact."""


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, Hkv, T, D) to (B, n_heads, T, D): query head h uses key head h // (n_heads / Hkv)."""
    return x if x.size(1) == n_heads else x.repeat_interleave(n_heads // x.size(1), dim=1)


def with_bias(score_mod: ScoreMod | None, bias: Tensor | None) -> ScoreMod | None:
    """score_mod(score + bias[b, h, q, k]), for a bias (B or 1, H or 1, Tq or 1, Tk or 1)."""
    if bias is None:
        return score_mod
    # Broadcast dimensions are always read at 0 (a multiplication, because the indices are tensors).
    step = [int(size > 1) for size in bias.shape]

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        score = score + bias[b * step[0], h * step[1], q * step[2], k * step[3]]
        return score if score_mod is None else score_mod(score, b, h, q, k)

    return biased


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    score_mod: ScoreMod | None,
    index: tuple[Tensor, Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(score_mod(scale q k^T)) v with the scores written out, in float32 or better.

    allowed: bool, broadcastable to (B, Hq, Tq, Tk). index: (b, q, k) passed to score_mod, default 0, 1, 2,
    ... Returns the output in q's dtype, the log-sum-exp (B, Hq, Tq) and the weights (B, Hq, Tq, Tk).
    """
    n_batch, n_heads, n_query, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = repeat_heads(k, n_heads), repeat_heads(v, n_heads)
    scores = (q.to(dtype) * scale) @ k.to(dtype).mT
    if score_mod is not None:
        if index is None:
            b, i, j = (torch.arange(n, device=q.device) for n in (n_batch, n_query, k.size(2)))
            index = b[:, None, None, None], i[:, None], j
        h = torch.arange(n_heads, device=q.device)[:, None, None]
        scores = score_mod(scores, index[0], h, index[1], index[2])
    if allowed is None:
        weights = F.dropout(scores.softmax(-1), dropout)
        return (weights @ v.to(dtype)).to(q.dtype), scores.logsumexp(-1), weights
    # Rows that see nothing are computed as if they saw everything, then zeroed: no NaN in either direction.
    blind = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~(allowed | blind), -torch.inf)
    weights = F.dropout(scores.softmax(-1).masked_fill(blind, 0), dropout)
    lse = scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    return (weights @ v.to(dtype)).to(q.dtype), lse, weights


def dense_allowed(mask: Mask, n_tokens: int, device: torch.device) -> Tensor | None:
    """The mask written out, broadcastable to (B, H, Tq, Tk); None where everything is allowed."""
    if mask.kind == "full":
        return None
    if mask.allowed is not None:
        return mask.allowed
    if mask.spans is not None:
        return mask.allowed_dense
    return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, bias: Tensor | None, dropout: float
) -> Tensor:
    """F.scaled_dot_product_attention; any mask but full and causal (without bias) is written out."""
    if bias is None and mask.kind in ("full", "causal"):
        # The kernels that take a mask have no grouped heads on CUDA, nor does any on CPU: repeat them there.
        grouped = q.is_cuda and q.size(1) != k.size(1)
        if not grouped:
            k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
        causal = mask.kind == "causal"
        return _sdpa(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    allowed = dense_allowed(mask, q.size(2), q.device)
    blind = None
    if mask.kind in ("dense", "segments"):  # the others leave no query blind
        assert allowed is not None
        blind = ~allowed.any(-1, keepdim=True)
        allowed = allowed | blind
    if bias is None:
        attn_mask = allowed
    else:
        bias = bias.to(q.dtype)
        attn_mask = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
    out = _sdpa(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=scale)
    return out if blind is None else out.masked_fill(blind, 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """F.scaled_dot_product_attention, in float32 where a CPU is to train in fewer bits: there its backward pass takes
    several times as long in bfloat16 (and its forward pass half as long, which is left to prediction)."""
    if q.device.type != "cpu" or q.dtype.itemsize > 2 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        if (mask := options.get("attn_mask")) is not None and mask.is_floating_point():
            options["attn_mask"] = mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)


def sdpa_packed(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, score_mod: ScoreMod | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Packed segments (T, H, D) in padded buckets of similar length. SDPA runs each bucket; a score_mod or
    the log-sum-exp needs the scores, then a bucket's are written out. Returns out (T, H, D), lse (T, H) or
    None."""
    plan = mask.buckets
    if not plan.buckets:  # nothing but padding
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=dtype) if return_lse else None
        # Sums of no rows: zeros that autograd connects to all three, whatever the padding holds.
        return q.new_zeros(*q.shape[:2], v.size(-1)) + (q[:0].sum() + k[:0].sum() + v[:0].sum()), lse
    outs, lses, begin = [], [], 0
    rows = zip(plan.buckets, *(to_buckets(x, plan) for x in (q, k, v)), strict=True)
    for bucket, q_b, k_b, v_b in rows:
        end = begin + bucket.n * bucket.length
        if score_mod is None and not return_lse:
            k_b, v_b = repeat_heads(k_b, q_b.size(1)), repeat_heads(v_b, q_b.size(1))
            # Spare places come last in a segment: under a causal mask no token looks at them.
            key_mask = None if mask.is_causal else bucket.valid
            outs.append(_sdpa(q_b, k_b, v_b, attn_mask=key_mask, is_causal=mask.is_causal, scale=scale))
        else:
            token = plan.token_P[begin:end].view(bucket.n, 1, bucket.length)
            column = torch.arange(bucket.length, device=q.device)
            allowed = torch.ones(1, dtype=torch.bool, device=q.device) if bucket.valid is None else bucket.valid
            if mask.is_causal:
                allowed = allowed & (column <= column[:, None])
            index = torch.zeros_like(token[..., None]), token[..., None], token[:, :, None, :]
            out, lse, _ = explicit_attention(q_b, k_b, v_b, allowed, scale, score_mod, index)
            outs.append(out)
            lses.append(lse)
        begin = end
    out = to_tokens(outs, plan)
    if not return_lse:
        return out, None
    return out, to_tokens(lses, plan).masked_fill(mask.padding_T[:, None], -torch.inf)


# Bucket sizes change with every batch: a compiled region breaks here rather than recompile. This is
# torch.compiler.disable without importing dynamo (seconds) before it is needed.
sdpa_packed_uncompiled = torch._disable_dynamo(sdpa_packed)


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, score_mod: ScoreMod | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention with block lists from the mask. Compiled here, unless the caller is compiling already."""
    spans, blocks = mask.sized_spans(q.size(2), max(q.size(-1), v.size(-1)), q.device)
    if mask.allowed is not None:
        blocks = all_partial(q.size(2), k.size(2), q.device)
    if not q.is_cuda:  # FlexAttention on CPU refuses tensors that require grad even under torch.no_grad()
        q, k, v = q.detach(), k.detach(), v.detach()
    dim = v.size(-1)
    if missing := max(0, FLEX_MIN_DIM - min(q.size(-1), dim)):
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    run = _flex if torch.compiler.is_compiling() else _compiled_flex()
    out, lse = run(q, k, v, spans, mask.allowed, blocks, scale, score_mod, return_lse)
    return out[..., :dim], lse


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans | None,
    allowed: Tensor | None,
    blocks: Blocks | None,
    scale: float,
    score_mod: ScoreMod | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The part that must be traced. BlockMask and mask function are made in here from tensors that are
    ordinary inputs of the graph, so that a new mask of the same sizes meets no guard on a Python function."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    if spans is not None:

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return spans.contains(i, j)
    elif allowed is not None:
        step = [int(size > 1) for size in allowed.shape]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return allowed[b * step[0], h * step[1], i * step[2], j * step[3]]

    block_mask, kernel_options = None, None
    if blocks is not None:
        size = (blocks.size, blocks.size)
        block_mask = BlockMask((q.size(2), k.size(2)), *blocks[:8], BLOCK_SIZE=size, mask_mod=visible)
        kernel_options = FINE_KERNEL if blocks.fine and q.is_cuda else None
    aux: Any = AuxRequest(lse=True) if return_lse else None
    result: Any = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
        kernel_options=kernel_options,
        return_aux=aux,
    )
    return (result[0], result[1].lse) if return_lse else (result, None)


@functools.cache
def _compiled_flex() -> Callable[..., tuple[Tensor, Tensor | None]]:
    import torch._dynamo

    # fullgraph: without it, running out of recompilations would silently fall back to the T x T version.
    compiled = torch.compile(_flex, fullgraph=True)

    def run(*args: Any) -> tuple[Tensor, Tensor | None]:
        # Every score_mod, dtype and kind of mask is a graph of its own; the default of 8 is for one model.
        with torch._dynamo.config.patch(recompile_limit=256):
            return compiled(*args)

    return run


def varlen_packed(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Packed segments (T, H, D) by torch.nn.attention.varlen (FlashAttention). CUDA, float16 or bfloat16."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if q.size(1) != k.size(1):  # torch 2.11's varlen_attn has no enable_gqa
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    cu_seqlens, longest = mask.cu_seqlens
    result: Any = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0) if mask.is_causal else (-1, -1),
        return_aux=AuxRequest(lse=True) if return_lse else None,
    )
    out, lse = result if return_lse else (result, None)
    # The kernel let padding tokens see each other; zeroing their output zeroes their gradients too.
    padding_T = mask.padding_T
    out = out.masked_fill(padding_T[:, None, None], 0)
    # varlen returns the log-sum-exp as (H, T).
    return out, None if lse is None else lse.T.masked_fill(padding_T[:, None], -torch.inf)
