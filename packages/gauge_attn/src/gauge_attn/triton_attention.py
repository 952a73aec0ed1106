"""Softmax attention in float32 for narrow features, as Triton kernels: forward, log-sum-exp and backward.

Features of KL attention are 3 to 55 wide, and their logits need float32. PyTorch's float32 kernel is made for wider
heads and older tensor cores; these are for narrow ones. Products are made of three TF32 ones, which keeps float32
accuracy whatever the user's TF32 setting. The self-mask is part of the kernel: query i sees keys j < i, and token 0
itself.

Source of the scheme: FlashAttention-2 (Dao, arXiv:2307.08691): blocks of logits that are never stored, weights made
again from the log-sum-exp for the gradients.

Shapes: B batch, H heads, N tokens, D features, E values; M queries of a block, J keys of a block.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

_LOG2_E = tl.constexpr(1.4426950408889634)
_OWN, _STREAMED = 64, 32
"""Tokens whose results a program makes, and tokens that it goes through at a time: with 64 of these the gradient of the
keys does not fit into registers."""


@triton.jit
def _tile(base, rows, columns, n, width):
    """Rows of a contiguous (n, width) matrix, zero outside."""
    inside = (rows[:, None] < n) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _visible(i, j, n, CAUSAL: tl.constexpr, SELF_MASK: tl.constexpr):
    """Whether query i sees key j; i and j broadcast."""
    seen = (i < n) & (j < n)
    if SELF_MASK:
        seen = seen & ((j < i) | ((i == 0) & (j == 0)))
    elif CAUSAL:
        seen = seen & (j <= i)
    return seen


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n, d, e,
    CAUSAL: tl.constexpr, SELF_MASK: tl.constexpr, M: tl.constexpr, J: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * M, tl.program_id(1).to(tl.int64) * n
    i, of_d, of_e = first + tl.arange(0, M), tl.arange(0, D), tl.arange(0, E)
    q = _tile(q_ptr + head * d, i, of_d, n, d)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, E], tl.float32)
    stop = tl.minimum(first + M, n) if CAUSAL else n
    for begin in range(0, stop, J):
        j = begin + tl.arange(0, J)
        k = _tile(k_ptr + head * d, j, of_d, n, d)
        v = _tile(v_ptr + head * e, j, of_e, n, e)
        logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * _LOG2_E
        logits = tl.where(_visible(i[:, None], j[None, :], n, CAUSAL, SELF_MASK), logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen no key yet
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights, v, input_precision="tf32x3")
        top = higher
    total = tl.where(i < n, total, 1.0)
    inside = (i[:, None] < n) & (of_e[None, :] < e)
    tl.store(out_ptr + head * e + i[:, None] * e + of_e[None, :], mixed / total[:, None], mask=inside)
    tl.store(lse_ptr + head + i, (top + tl.log2(total)) / _LOG2_E, mask=i < n)


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, dot_ptr, dq_ptr, n, d, e,
    CAUSAL: tl.constexpr, SELF_MASK: tl.constexpr, M: tl.constexpr, J: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * M, tl.program_id(1).to(tl.int64) * n
    i, of_d, of_e = first + tl.arange(0, M), tl.arange(0, D), tl.arange(0, E)
    q, grad = _tile(q_ptr + head * d, i, of_d, n, d), _tile(grad_ptr + head * e, i, of_e, n, e)
    lse = tl.load(lse_ptr + head + i, mask=i < n, other=0.0)
    dot = tl.load(dot_ptr + head + i, mask=i < n, other=0.0)
    dq = tl.zeros([M, D], tl.float32)
    stop = tl.minimum(first + M, n) if CAUSAL else n
    for begin in range(0, stop, J):
        j = begin + tl.arange(0, J)
        k, v = _tile(k_ptr + head * d, j, of_d, n, d), _tile(v_ptr + head * e, j, of_e, n, e)
        logits = (tl.dot(q, tl.trans(k), input_precision="tf32x3") - lse[:, None]) * _LOG2_E
        weights = tl.where(_visible(i[:, None], j[None, :], n, CAUSAL, SELF_MASK), tl.exp2(logits), 0.0)
        dlogits = weights * (tl.dot(grad, tl.trans(v), input_precision="tf32x3") - dot[:, None])
        dq += tl.dot(dlogits, k, input_precision="tf32x3")
    inside = (i[:, None] < n) & (of_d[None, :] < d)
    tl.store(dq_ptr + head * d + i[:, None] * d + of_d[None, :], dq, mask=inside)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, dot_ptr, dk_ptr, dv_ptr, n, d, e,
    CAUSAL: tl.constexpr, SELF_MASK: tl.constexpr, M: tl.constexpr, J: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * J, tl.program_id(1).to(tl.int64) * n
    j, of_d, of_e = first + tl.arange(0, J), tl.arange(0, D), tl.arange(0, E)
    k, v = _tile(k_ptr + head * d, j, of_d, n, d), _tile(v_ptr + head * e, j, of_e, n, e)
    dk, dv = tl.zeros([J, D], tl.float32), tl.zeros([J, E], tl.float32)
    begin = (first // M) * M if CAUSAL else 0
    for start in range(begin, n, M):
        i = start + tl.arange(0, M)
        q, grad = _tile(q_ptr + head * d, i, of_d, n, d), _tile(grad_ptr + head * e, i, of_e, n, e)
        lse = tl.load(lse_ptr + head + i, mask=i < n, other=0.0)
        dot = tl.load(dot_ptr + head + i, mask=i < n, other=0.0)
        # Keys by queries, as products that sum over queries want them: turning a block round costs more than making it.
        logits = (tl.dot(k, tl.trans(q), input_precision="tf32x3") - lse[None, :]) * _LOG2_E
        weights = tl.where(_visible(i[None, :], j[:, None], n, CAUSAL, SELF_MASK), tl.exp2(logits), 0.0)
        dv += tl.dot(weights, grad, input_precision="tf32x3")
        dlogits = weights * (tl.dot(v, tl.trans(grad), input_precision="tf32x3") - dot[None, :])
        dk += tl.dot(dlogits, q, input_precision="tf32x3")
    inside = j[:, None] < n
    tl.store(dk_ptr + head * d + j[:, None] * d + of_d[None, :], dk, mask=inside & (of_d[None, :] < d))
    tl.store(dv_ptr + head * e + j[:, None] * e + of_e[None, :], dv, mask=inside & (of_e[None, :] < e))


def narrow_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, self_mask: bool) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v (B, H, N, E) and the log-sum-exp of the logits (B, H, N), which carries no gradient.

    q and k (B, H, N, D), v (B, H, N, E), float32 on CUDA; widths are padded to powers of two. causal: key j is
    seen by queries i >= j; self_mask: by queries i > j, and token 0 by itself. Works inside torch.compile and CUDA
    graphs.
    """
    return _attend(q, k, v, causal or self_mask, self_mask)


@library.custom_op("gauge_attn::narrow_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, self_mask: bool) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = v.new_empty(*q.shape[:-1], v.size(-1)), q.new_empty(q.shape[:-1])
    _forward[_grid(q)](q, k, v, out, lse, *_sizes(q, v), **_options(q, v, causal, self_mask), M=_OWN, J=_STREAMED)
    return out, lse


@library.custom_op("gauge_attn::narrow_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, causal: bool, self_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    dot = (grad * out).sum(-1)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shared, options = (q, k, v, grad, lse, dot), _options(q, v, causal, self_mask)
    _backward_keys[_grid(q)](*shared, dk, dv, *_sizes(q, v), **options, M=_STREAMED, J=_OWN)
    _backward_queries[_grid(q)](*shared, dq, *_sizes(q, v), **options, M=_OWN, J=_STREAMED)
    return dq, dk, dv


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, self_mask: bool) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:-1], v.size(-1)), q.new_empty(q.shape[:-1])


@_attend_backward.register_fake
def _(q, k, v, out, lse, grad, causal, self_mask):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.causal, ctx.self_mask = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    return *_attend_backward(*ctx.saved_tensors, grad, ctx.causal, ctx.self_mask), None, None


_attend.register_autograd(_gradients, setup_context=_keep)


def _grid(q: Tensor) -> tuple[int, int]:
    return triton.cdiv(q.size(2), _OWN), q.size(0) * q.size(1)


def _sizes(q: Tensor, v: Tensor) -> tuple[int, int, int]:
    return q.size(2), q.size(-1), v.size(-1)


def _options(q: Tensor, v: Tensor, causal: bool, self_mask: bool) -> dict[str, int | bool]:
    padded = {"D": q.size(-1), "E": v.size(-1)}
    widths = {name: max(16, triton.next_power_of_2(width)) for name, width in padded.items()}
    return {"CAUSAL": causal, "SELF_MASK": self_mask, **widths}
