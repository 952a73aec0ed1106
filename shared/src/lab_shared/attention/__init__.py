"""Attention with one import surface: `attend(q, k, v, mask)`.

Back ends, chosen by `choose_backend` unless forced:
- reference: the scores written out in float32; the only one that returns weights; T x T memory.
- sdpa: F.scaled_dot_product_attention; packed segments in padded buckets of similar length (the CPU path).
  There, a bias, a score_mod or the log-sum-exp makes it write out the scores of one bucket at a time.
- flex: compiled FlexAttention, block lists by arithmetic from the mask. CUDA; on CPU forward only.
- varlen: torch.nn.attention.varlen for packed segments. CUDA, float16 or bfloat16.

In a `torch.compile`d model all but packed sdpa trace into the graph; that one breaks it (and so refuses
fullgraph=True). Shapes stay static as long as the capacities (T, number of offsets) do;
`mask.prepare(backend)` before the compiled region keeps the building of block lists out of the graph.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lab_shared.attention import backends
from lab_shared.attention.backends import ScoreMod
from lab_shared.attention.masks import Mask

__all__ = ["Backend", "Mask", "ScoreMod", "attend", "choose_backend"]

Backend = Literal["reference", "sdpa", "flex", "varlen"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    dropout: float = 0.0,
    backend: Backend | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Any:
    """softmax(score_mod(scale * q k^T + bias) where the mask allows) v.

    q (B, Hq, Tq, D), k and v (B, Hkv, Tk, D), or packed q (T, Hq, D), k and v (T, Hkv, D). Hkv divides Hq:
    query head h uses key head h // (Hq / Hkv). mask: None is Mask.full(). scale: None is 1 / sqrt(D). bias:
    broadcastable to (B, Hq, Tq, Tk), B = 1 when packed. score_mod: FlexAttention's elementwise (score, b, h,
    q_idx, kv_idx) -> score; make it with a module-level factory, so that compiled code recognises it.
    dropout: probability with which each weight is dropped (and the others divided by 1 - dropout); pass 0 outside
    training. From reference and, for rectangular batches, sdpa.
    backend: None lets `choose_backend` pick.

    Returns the output, shaped as q with v's last dimension and in q's dtype. With return_lse also the
    log-sum-exp of the allowed scores, float32 (float64 for float64), (B, Hq, Tq) or (T, Hq): from reference,
    flex, varlen and packed sdpa. With return_weights also the weights (B, Hq, Tq, Tk) or (Hq, T, T): from
    reference. In this order, as a tuple. A query that may see nothing (padding) gets output 0, log-sum-exp
    -inf and no gradient.

    Raises ValueError for shapes that do not fit and for a back end that cannot do what was asked.
    """
    mask = Mask.full() if mask is None else mask
    _check_inputs(q, k, v, mask, bias)
    asked: dict[str, Any] = {
        "bias": bias,
        "score_mod": score_mod,
        "dropout": dropout,
        "return_lse": return_lse,
        "return_weights": return_weights,
    }
    if backend is None:
        backend = choose_backend(q, k, v, mask, **asked)
    elif reason := _refusal(backend, q, k, v, mask, **asked):
        raise ValueError(f"backend={backend!r}: {reason}")
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    packed = q.dim() == 3
    q, k, v = (x.transpose(0, 1)[None] if packed else x for x in (q, k, v))

    lse = weights = None
    if backend == "varlen" or (backend == "sdpa" and _in_rows(q, mask)):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        if backend == "varlen":
            out, lse = backends.varlen_packed(q, k, v, mask, scale, return_lse)
        else:
            compiling = torch.compiler.is_compiling()
            run = backends.sdpa_packed_uncompiled if compiling else backends.sdpa_packed
            out, lse = run(q, k, v, mask, scale, backends.with_bias(score_mod, bias), return_lse)
        out = out.transpose(0, 1)[None]
        lse = None if lse is None else lse.T[None]
    elif backend == "sdpa":
        out = backends.sdpa_attention(q, k, v, mask, scale, bias, dropout)
    elif backend == "flex":
        score_mod = backends.with_bias(score_mod, bias)
        out, lse = backends.flex_attention(q, k, v, mask, scale, score_mod, return_lse)
    else:
        allowed = backends.dense_allowed(mask, q.size(2), q.device)
        score_mod = backends.with_bias(score_mod, bias)
        out, lse, weights = backends.explicit_attention(q, k, v, allowed, scale, score_mod, dropout=dropout)

    if packed:
        out = out[0].transpose(0, 1)
        lse = None if lse is None else lse[0].T
        weights = None if weights is None else weights[0]
    extra = ([lse] if return_lse else []) + ([weights] if return_weights else [])
    return (out, *extra) if extra else out


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    bias: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Backend:
    """The policy: the first back end that can, flex before sdpa for masks with structure on CUDA.

    On one H200 flex was faster than varlen for packed segments (329k against 285k events/s of a 5M model's
    inference); for full, causal and dense masks SDPA's own kernels are as good and need no compilation.
    """
    order: tuple[Backend, ...] = ("sdpa", "reference")
    if q.is_cuda:
        structured = mask.spans is not None
        order = ("flex", "sdpa", "reference") if structured else ("sdpa", "flex", "reference")
    asked: dict[str, Any] = {
        "bias": bias,
        "score_mod": score_mod,
        "dropout": dropout,
        "return_lse": return_lse,
        "return_weights": return_weights,
    }
    return next(name for name in order if _refusal(name, q, k, v, mask, **asked) is None)


def _in_rows(q: Tensor, mask: Mask) -> bool:
    """Whether the tokens are one packed row that can be cut into segments."""
    return mask.kind == "segments" and (q.dim() == 3 or q.size(0) == 1)


def _refusal(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    bias: Tensor | None,
    score_mod: ScoreMod | None,
    dropout: float,
    return_lse: bool,
    return_weights: bool,
) -> str | None:
    """Why a back end cannot do this and what can; None if it can."""
    if backend not in get_args(Backend):
        return f"unknown; use one of {', '.join(get_args(Backend))} or None"
    if backend == "reference":
        return None
    if dropout and (backend != "sdpa" or _in_rows(q, mask)):
        return "it drops no weights; for dropout use backend='reference', or 'sdpa' with a batch (B, H, T, D)"
    if return_weights:
        return "it never forms the weights; use backend='reference' for return_weights"
    if backend == "sdpa":
        if _in_rows(q, mask):
            return None
        if score_mod is not None:
            return "it takes no score_mod; pass an additive bias=, or use backend='flex' (CUDA) or 'reference'"
        return "it returns no log-sum-exp; use backend='flex' (CUDA) or 'reference'" if return_lse else None
    if backend == "flex":
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"FlexAttention takes float32, float16 or bfloat16, not {q.dtype}; use backend='reference'"
        if not q.is_cuda and return_lse:
            return "FlexAttention on CPU returns no log-sum-exp; use backend='reference'"
        tensors = (q, k, v) if bias is None else (q, k, v, bias)
        if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return "FlexAttention has no backward on CPU; use backend='sdpa' or 'reference', or torch.no_grad()"
        return None
    if not _in_rows(q, mask):
        return f"varlen runs packed segments, not a {mask.kind} mask on {tuple(q.shape)}; use Mask.segments"
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return f"varlen needs float16 or bfloat16 on CUDA, got {q.dtype} on {q.device}; use 'flex' or 'sdpa'"
    if bias is not None or score_mod is not None:
        return "varlen takes neither bias nor score_mod; use backend='flex'"
    if q.size(-1) != v.size(-1) or q.size(-1) % 8 or q.size(-1) > 256:
        return f"varlen needs one head size, a multiple of 8 up to 256, got {q.size(-1)}; use backend='flex'"
    return None


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None) -> None:
    if q.dim() not in (3, 4) or k.dim() != q.dim() or v.dim() != q.dim():
        raise ValueError(
            "q, k and v are all (B, H, T, D) or all packed (T, H, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v need one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them first")
    head, token = (1, 0) if q.dim() == 3 else (1, 2)
    if k.shape[:-1] != v.shape[:-1] or q.size(-1) != k.size(-1) or (q.dim() == 4 and q.size(0) != k.size(0)):
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.size(head) % k.size(head):
        raise ValueError(f"{q.size(head)} query heads cannot share {k.size(head)} key heads evenly")
    n_query, n_key = q.size(token), k.size(token)
    if mask.kind not in ("full", "dense") and (n_query != n_key or mask.total not in (None, n_query)):
        size = "" if mask.total is None else f" of {mask.total} tokens"
        raise ValueError(
            f"a {mask.kind} mask{size} needs as many queries as keys, got {n_query} and {n_key}; "
            "use Mask.dense for other shapes"
        )
    shape = (q.size(0) if q.dim() == 4 else 1, q.size(head), n_query, n_key)
    for name, x in (("a dense mask", mask.allowed), ("bias", bias)):
        if x is not None and any(
            size not in (1, full) for size, full in zip(reversed(x.shape), reversed(shape), strict=False)
        ):
            raise ValueError(f"{name} of shape {tuple(x.shape)} does not broadcast to (B, Hq, Tq, Tk) = {shape}")
    for x in (mask.allowed, None if mask.spans is None else mask.spans.lo_T, bias):
        if x is not None and x.device != q.device:
            raise ValueError(f"mask and bias must be on {q.device} like q, got {x.device}; build them there")
