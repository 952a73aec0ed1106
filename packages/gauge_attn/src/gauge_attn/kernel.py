"""The fused softmax average behind `kl_attention`: number formats, the self-mask shift, decoding, log-sum-exp.

Shape suffixes: B batch, H heads, N tokens, F features.
"""

from __future__ import annotations

from typing import Literal

import torch
from lab_shared.attention import Mask, attend
from torch import Tensor
from torch.nn.functional import pad

Precision = Literal["fp32", "fp16", "bf16x3"]

_QUERY_CHUNK = 512


class FeatureCache:
    """Keys and values of the tokens so far, of one l, for decoding. Filled by `kl_attention(..., cache=)`.

    capacity: tokens it can hold; memory is taken when the first tokens arrive. What is in it carries no gradient.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key_BHNF: Tensor, value_BHNF: Tensor) -> tuple[Tensor, Tensor]:
        """Add N tokens; returns all keys and values so far. Raises ValueError when they do not fit."""
        end = self.length + key_BHNF.size(2)
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens cannot hold {end}: make a larger FeatureCache")
        if self._keys is None or self._values is None:
            self._keys = key_BHNF.new_empty(*key_BHNF.shape[:2], self.capacity, key_BHNF.size(3))
            self._values = value_BHNF.new_empty(*value_BHNF.shape[:2], self.capacity, value_BHNF.size(3))
        self._keys[:, :, self.length : end] = key_BHNF.detach()
        self._values[:, :, self.length : end] = value_BHNF.detach()
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kappa_H1: Tensor,
    causal: bool,
    self_mask: bool,
    precision: Precision,
    cache: FeatureCache | None,
    want_lse: bool,
    one: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """sum_j softmax_j(-query.key/(2 kappa)) value, and the log-sum-exp of these logits.

    (B, H, N, F) each, the value of any width; for fp16 the last slot of the query is 1. one: a slot of the value that
    is 1. In the low precisions the kernel rounds the weights; dividing by their sum there undoes the common part.
    """
    dtype, width = value.dtype, value.size(-1)
    query, key, value = lower(query, key, value, kappa_H1, precision)
    start = 0 if cache is None else cache.length
    if cache is not None:
        key, value = cache.append(key, value)
    n_query, n_key = query.size(2), key.size(2) - self_mask
    lse: Tensor | None
    if start and n_query > 1:
        i, j = torch.arange(n_query, device=query.device), torch.arange(n_key, device=query.device)
        mask = Mask.dense(j <= start - int(self_mask) + i[:, None])
        key, value = key[:, :, :n_key], value[:, :, :n_key]
        if want_lse:
            mixed, lse = attend(query, key, value, mask, scale=1.0, backend="reference", return_lse=True)
        else:
            mixed, lse = attend(query, key, value, mask, scale=1.0, backend="sdpa"), None
    elif start or not self_mask:
        mixed, lse = fused(query, key[:, :, :n_key], value[:, :, :n_key], causal and not start, want_lse)
    else:
        mixed, lse = value[:, :, :1], (query[:, :, :1] * key[:, :, :1]).sum(-1, dtype=dtype) if want_lse else None
        if n_query > 1:
            rest, rest_lse = fused(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], True, want_lse)
            mixed = torch.cat([mixed, rest], 2)
            lse = None if lse is None or rest_lse is None else torch.cat([lse, rest_lse], 2)
    mixed = mixed.to(dtype)
    if precision == "bf16x3":
        mixed = mixed[..., :width] + mixed[..., width : 2 * width]
    mixed = mixed[..., :width]
    if precision == "fp32" or one is None:
        return mixed, lse
    return mixed / mixed[..., one : one + 1], lse


def lower(
    query: Tensor, key: Tensor, value: Tensor, kappa_H1: Tensor, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with the factor -1/(2 kappa) spread over both, in the kernel's type and widths.

    All of one width, as the kernel for CPUs and the half-precision ones want; in float32 on CUDA values have their own.
    """
    root_H11 = (2 * kappa_H1).rsqrt().unsqueeze(-1)
    if precision == "fp32":
        query, key = -query * root_H11, key * root_H11
    else:
        # A power of two on the query keeps the 1 in its last slot exact.
        power_H11 = root_H11.detach().log2().round().exp2()
        query, key = -query * power_H11, key * (root_H11.square() / power_H11)
    if precision == "fp16":
        high = key[..., -1:].half().to(key.dtype)
        key = torch.cat([key[..., :-1], high, key[..., -1:] - high], -1)
        query = torch.cat([query, query[..., -1:]], -1)
        query, key, value = query.half(), key.half(), value.half()
    elif precision == "bf16x3":
        (query_head, query_tail), (key_head, key_tail) = _split(query), _split(key)
        query = torch.cat([query_head, query_head, query_tail], -1)
        key = torch.cat([key_head, key_tail, key_head], -1)
        value = torch.cat(_split(value), -1)
    if query.is_cuda and query.dtype == torch.float32:
        wide, narrow = query.size(-1), value.size(-1)
    else:
        wide = narrow = max(query.size(-1), value.size(-1))
    if query.is_cuda:  # the fused kernels want multiples of 8
        wide, narrow = wide + -wide % 8, narrow + -narrow % 8
    return _padded(query, wide), _padded(key, wide), _padded(value, narrow)


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.size(-1) == width else pad(x, (0, width - x.size(-1)))  # pad copies even where nothing is added


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    head = x.bfloat16()
    return head, (x - head.to(x.dtype)).bfloat16()


def fused(query: Tensor, key: Tensor, value: Tensor, causal: bool, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """softmax(query.key) value, of widths as `lower` makes them, and the log-sum-exp (without gradient) if wanted.

    Without log-sum-exp this is `attend`. F.scaled_dot_product_attention hides the log-sum-exp that its kernels make,
    so they are called by name for it. The memory-efficient CUDA kernel forms float32 products from three TF32 ones,
    which keeps float32 accuracy under any TF32 setting. float64 on CUDA has no kernel: chunks of queries.
    """
    if query.is_cuda and query.dtype == torch.float64:
        return _chunked(query, key, value, causal)
    if not want_lse:
        mask = Mask.causal() if causal else Mask.full()
        return attend(query, key, value, mask, scale=1.0, backend="sdpa"), None
    if query.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=1.0
        )
        return out, lse[..., : query.size(2)]  # it is padded to a multiple of 32
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=1.0)


def _chunked(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for begin in range(0, query.size(2), _QUERY_CHUNK):
        part = query[:, :, begin : begin + _QUERY_CHUNK]
        scores = part @ key.mT
        if causal:
            i = torch.arange(begin, begin + part.size(2), device=query.device)
            j = torch.arange(key.size(2), device=query.device)
            scores = scores.masked_fill(j > i[:, None], -torch.inf)
        outs.append(scores.softmax(-1) @ value)
        lses.append(scores.detach().logsumexp(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)
