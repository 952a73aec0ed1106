"""Which keys a query may see. A Mask is built once per batch and handed to every layer.

Shape suffixes: T tokens, S segments, N blocks of 64 or 128 tokens, R groups of memory slots.

Every structured mask is, for each query, one interval of keys (two for grouped memory slots), so two integers
a token describe it and nothing of size T x T is needed. A query that may see no key gets output 0,
log-sum-exp -inf and zero gradients, on every back end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab_shared.attention.blocks import FINE_MAX_DIM, Blocks, blocks_from_spans
from lab_shared.attention.packing import Buckets, plan_buckets

PADDING_CHUNK = 512
"""varlen kernels cannot skip tokens, so padding is cut into segments of this many: long enough to be few,
short enough that an almost empty batch does not cost T^2."""


class Spans(NamedTuple):
    """Per token the half-open interval [lo, hi) of its partners and, where given, a second one; int32.

    A token with no partner has lo = total and hi = 0, which leaves minima and maxima over blocks unchanged.
    """

    lo_T: Tensor
    hi_T: Tensor
    lo2_T: Tensor | None = None
    hi2_T: Tensor | None = None

    def intervals(self) -> list[tuple[Tensor, Tensor]]:
        """[(lo, hi)] or [(lo, hi), (lo2, hi2)]."""
        first = [(self.lo_T, self.hi_T)]
        return first if self.lo2_T is None or self.hi2_T is None else [*first, (self.lo2_T, self.hi2_T)]

    def contains(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether each key is in its query's intervals; bool, broadcast over the two index tensors."""
        inside = [(key >= lo_T[query]) & (key < hi_T[query]) for lo_T, hi_T in self.intervals()]
        return inside[0] if len(inside) == 1 else inside[0] | inside[1]


@dataclass(frozen=True, eq=False)
class Mask:
    """Make one with `full`, `causal`, `segments`, `memory_prefix`, `memory_postfix` or `dense`.

    What a back end needs (block lists, length buckets, cu_seqlens) is built on first use and kept. Building
    does not synchronise with the GPU, except where `segments` says so. Passed to a compiled function, a new
    Mask of the same sizes causes no recompilation: only tensor shapes and the Python numbers here are
    guarded.
    """

    kind: Literal["full", "causal", "segments", "memory", "dense"]
    total: int | None = None
    spans: Spans | None = None
    """Keys that each query sees."""
    spans_by_key: Spans | None = None
    """Queries that see each key, where these are intervals too."""
    allowed: Tensor | None = None
    """dense only: bool, broadcastable to (B, H, Tq, Tk)."""
    is_causal: bool = False
    max_len: int | None = None
    offsets_S1: Tensor | None = None
    offsets_host: np.ndarray | None = None
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What the properties below have built. (functools.cached_property has a lock that cannot be traced.)"""

    @staticmethod
    def full() -> Mask:
        """Every query sees every key."""
        return Mask("full")

    @staticmethod
    def causal() -> Mask:
        """Query t sees keys 0..t. Queries and keys must be equally many."""
        return Mask("causal", is_causal=True)

    @staticmethod
    def segments(
        offsets_S1: Tensor,
        total: int,
        *,
        causal: bool = False,
        max_len: int | None = None,
        offsets_host: np.ndarray | Tensor | Sequence[int] | None = None,
    ) -> Mask:
        """Packed sequences: token t of segment s, offsets[s] <= t < offsets[s + 1], sees its own segment
        only.

        offsets_S1: integers, not decreasing, starting at 0; repeated values (empty segments) are legal, so
        that S can be a fixed capacity. total: T, also a capacity: tokens at or past offsets[-1] are padding,
        see nothing and get zeros. max_len: an upper bound of the segment lengths; varlen needs it, and flex then
        builds shorter lists.
        offsets_host: the same offsets in host memory. Without it varlen (if max_len is missing too) and sdpa
        copy CUDA offsets to the host once per Mask, which synchronises; flex and reference never do.

        Raises ValueError for offsets in host memory that break these rules; CUDA offsets are not looked at.
        """
        host = offsets_S1 if offsets_host is None and offsets_S1.device.type == "cpu" else offsets_host
        if host is not None:
            host = _checked_offsets(np.asarray(host), total, max_len)
        offsets_S1 = offsets_S1.to(torch.int32)
        token_T = torch.arange(total, dtype=torch.int32, device=offsets_S1.device)
        # right=True puts a token behind all empty segments that start at it.
        after_T = torch.searchsorted(offsets_S1, token_T, right=True, out_int32=True)
        used_T = after_T < offsets_S1.numel()
        last = offsets_S1.numel() - 1
        lo_T = torch.where(used_T, offsets_S1[(after_T - 1).clamp_(0, last)], total)
        end_T = torch.where(used_T, offsets_S1[after_T.clamp(max=last)], 0)
        if causal:
            spans = Spans(lo_T, torch.where(used_T, token_T + 1, 0))
            by_key = Spans(torch.where(used_T, token_T, total), end_T)
        else:
            spans = by_key = Spans(lo_T, end_T)
        return Mask(
            "segments",
            total,
            spans,
            spans_by_key=by_key,
            is_causal=causal,
            max_len=max_len,
            offsets_S1=offsets_S1,
            offsets_host=host,
        )

    @staticmethod
    def memory_prefix(
        n_memory: int, n_data: int, *, causal_slots: bool = True, device: torch.device | str = "cpu"
    ) -> Mask:
        """[memory, data]: data sees all memory and earlier data; memory sees memory, never data.

        causal_slots: a slot sees itself and earlier slots (then the mask is plain causal); False: all slots.
        """
        total = n_memory + n_data
        if causal_slots:
            return Mask("causal", total, is_causal=True)
        token_T = torch.arange(total, dtype=torch.int32, device=device)
        spans = Spans(torch.zeros_like(token_T), (token_T + 1).clamp_(min=n_memory))
        by_key = Spans(torch.where(token_T < n_memory, 0, token_T), torch.full_like(token_T, total))
        return Mask("memory", total, spans, by_key)

    @staticmethod
    def memory_postfix(
        n_data: int,
        n_memory: int,
        *,
        positions: Sequence[int] | Tensor | None = None,
        causal_slots: bool = True,
        device: torch.device | str = "cpu",
    ) -> Mask:
        """[data, R groups of n_memory slots]: data is causal and never sees memory; a slot of group r sees
        the first positions[r] data tokens and its own group.

        positions: R counts in 0..n_data, in any order; a tensor (R,) may change from step to step without
        recompilation. None: one group that sees all data. causal_slots: within its group a slot sees itself
        and earlier slots; False: the whole group. Raises ValueError for counts in host memory out of range.
        """
        if positions is None:
            if causal_slots:
                return Mask("causal", n_data + n_memory, is_causal=True)
            positions = [n_data]
        if not isinstance(positions, Tensor):
            if bad := [p for p in positions if not 0 <= p <= n_data]:
                raise ValueError(f"positions {bad} lie outside 0..{n_data}: a group sees the first p data tokens")
            positions = torch.tensor(positions, device=device)
        position_R = positions.to(device=device, dtype=torch.int32).clamp(0, n_data)
        n_groups = position_R.numel()
        total = n_data + n_groups * n_memory
        data_N = torch.arange(n_data, dtype=torch.int32, device=device)
        slot_M = torch.arange(n_data, total, dtype=torch.int32, device=device)
        start_M = slot_M - (slot_M - n_data) % n_memory
        group_end_M = slot_M + 1 if causal_slots else start_M + n_memory
        spans = Spans(
            torch.zeros(total, dtype=torch.int32, device=device),
            torch.cat([data_N + 1, position_R[:, None].expand(-1, n_memory).flatten()]),
            torch.cat([torch.full_like(data_N, total), start_M]),
            torch.cat([torch.zeros_like(data_N), group_end_M]),
        )
        return Mask("memory", total, spans)

    @staticmethod
    def dense(allowed: Tensor) -> Mask:
        """Any bool tensor broadcastable to (B, H, Tq, Tk): True where the query may see the key."""
        if allowed.dtype != torch.bool:
            raise ValueError(f"a dense mask is bool (True = may see), got {allowed.dtype}; use bias= for scores")
        if not 2 <= allowed.dim() <= 4:
            raise ValueError(f"a dense mask broadcasts to (B, H, Tq, Tk), got shape {tuple(allowed.shape)}")
        return Mask("dense", allowed=allowed.reshape((1,) * (4 - allowed.dim()) + allowed.shape))

    def prepare(self, backend: Literal["reference", "sdpa", "flex", "varlen"]) -> Mask:
        """Build now what `backend` needs, e.g. in a data thread or before a compiled region. Returns self."""
        if self.kind == "segments" and backend == "sdpa":
            _ = self.buckets
        elif self.kind == "segments" and backend == "varlen":
            _ = self.cu_seqlens
        elif self.spans is not None:
            _ = self.blocks if backend == "flex" else self.allowed_dense
        return self

    @property
    def blocks(self) -> Blocks:
        """FlexAttention's block lists for `spans`, by arithmetic on the device; fine ones for packed segments."""
        return self._blocks(fine=self.kind == "segments")

    def _blocks(self, *, fine: bool) -> Blocks:
        key = "fine blocks" if fine else "blocks"
        if key not in self._kept:
            spans, total = self._sized()
            max_span = self.max_len if self.kind == "segments" else None
            self._kept[key] = blocks_from_spans(spans, self.spans_by_key, total, fine=fine, max_span=max_span)
        return self._kept[key]

    @property
    def allowed_dense(self) -> Tensor:
        """`spans` written out, bool (T, T). For the reference and for sdpa with memory slots."""
        if "allowed_dense" not in self._kept:
            spans, total = self._sized()
            token_T = torch.arange(total, device=spans.lo_T.device)
            self._kept["allowed_dense"] = spans.contains(token_T[:, None], token_T)
        return self._kept["allowed_dense"]

    @property
    def buckets(self) -> Buckets:
        """Segments grouped by length, for padded batches. Reads the offsets on the host."""
        if "buckets" not in self._kept:
            spans, total = self._sized()
            self._kept["buckets"] = plan_buckets(self._host_offsets(), total, spans.lo_T.device)
        return self._kept["buckets"]

    @property
    def cu_seqlens(self) -> tuple[Tensor, int]:
        """For varlen: the offsets followed by chunks of padding up to T (int32, static length), and an upper
        bound of the segment lengths."""
        if "cu_seqlens" not in self._kept:
            offsets_S1 = self._offsets()
            _, total = self._sized()
            chunk = torch.arange(1, -(-total // PADDING_CHUNK) + 1, dtype=torch.int32, device=offsets_S1.device)
            padding = (offsets_S1[-1] + PADDING_CHUNK * chunk).clamp_(max=total)
            longest = self.max_len
            if longest is None:
                longest = int(np.diff(self._host_offsets()).max(initial=0))
            self._kept["cu_seqlens"] = torch.cat([offsets_S1, padding]), max(longest, PADDING_CHUNK)
        return self._kept["cu_seqlens"]

    @property
    def padding_T(self) -> Tensor:
        """bool (T,), True for tokens past the last segment."""
        return self._sized()[0].hi_T == 0

    def _sized(self) -> tuple[Spans, int]:
        if self.spans is None or self.total is None:
            raise ValueError(f"a {self.kind} mask has no spans of its own; use sized_spans(n_tokens, device)")
        return self.spans, self.total

    def _offsets(self) -> Tensor:
        if self.offsets_S1 is None:
            raise ValueError(f"a {self.kind} mask has no segments; use Mask.segments")
        return self.offsets_S1

    def _host_offsets(self) -> np.ndarray:
        if self.offsets_host is not None:
            return self.offsets_host
        return _checked_offsets(self._offsets().cpu().numpy(), self._sized()[1], self.max_len)

    def sized_spans(self, n_tokens: int, head_dim: int, device: torch.device) -> tuple[Spans | None, Blocks | None]:
        """Spans and block lists for this many tokens; (None, None) where intervals do not describe the
        mask."""
        if self.kind in ("full", "dense"):
            return None, None
        if self.spans is not None:
            return self.spans, self._blocks(fine=self.kind == "segments" and head_dim < FINE_MAX_DIM)
        token_T = torch.arange(n_tokens, dtype=torch.int32, device=device)
        spans = Spans(torch.zeros_like(token_T), token_T + 1)
        return spans, blocks_from_spans(spans, Spans(token_T, torch.full_like(token_T, n_tokens)), n_tokens)


def _checked_offsets(offsets: np.ndarray, total: int, max_len: int | None) -> np.ndarray:
    offsets = offsets.astype(np.int64)
    if offsets.ndim != 1 or offsets.size == 0 or offsets[0] != 0:
        raise ValueError(f"offsets are one-dimensional and start at 0, got shape {offsets.shape}: {offsets[:3]}...")
    lengths = np.diff(offsets)
    if offsets.size > 1 and lengths.min() < 0:
        at = int(lengths.argmin())
        raise ValueError(f"offsets must not decrease, got {offsets[at]} then {offsets[at + 1]} at index {at}")
    if offsets[-1] > total:
        raise ValueError(f"the last offset {offsets[-1]} lies past total={total}; total is the length of q")
    if max_len is not None and lengths.max(initial=0) > max_len:
        raise ValueError(f"a segment of {lengths.max()} tokens is longer than max_len={max_len}; raise max_len")
    return offsets
