"""Time lab_shared's attention back ends on packed segments; writes one JSON record.

    python tools/bench_attention.py --device cuda --out results.json
    python tools/bench_attention.py --device cpu

CUDA: building the block lists at T = 230,000 against create_block_mask, then forward + backward of flex,
varlen and packed sdpa at T = 2^18 in bfloat16. CPU: forward + backward at T = 4096 in float32 of packed sdpa,
a loop over segments, and one padded rectangle. Segment lengths follow the hit DOMs per IceCube event (median
50, a tail to 2257).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lab_shared.attention import Mask, attend
from lab_shared.bench import environment, measure
from lab_shared.command import positive_int, write_record
from torch import Tensor

SHAPES = [(4, 32), (4, 64), (8, 32), (8, 64)]
CPU_SHAPES = [(8, 8), (8, 16)]


def segment_offsets(total: int, seed: int = 0) -> np.ndarray:
    """Offsets of packed segments that fill `total` tokens to within one segment: 78% narrow, the rest a heavy
    tail, which gives quantiles 25/50/75/99% near 41/50/66/250 and a mean near 60."""
    rng = np.random.default_rng(seed)
    n = total // 20
    body = np.exp(rng.normal(np.log(48), 0.25, n))
    tail = 55 * (1 + rng.pareto(1.9, n))
    length = np.clip(np.where(rng.random(n) < 0.78, body, tail), 8, 2256).astype(np.int64) + 1
    offsets = np.concatenate([[0], np.cumsum(length)])
    return offsets[offsets <= total]


def step(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(attention(*inputs), inputs, grad)


def packed_inputs(total: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    q, k, v, grad = (torch.randn(total, heads, dim, dtype=dtype, device=device) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], grad


def segment_loop(offsets: np.ndarray) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for begin, end in pairwise(offsets):
            q_s, k_s, v_s = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
            outs.append(F.scaled_dot_product_attention(q_s, k_s, v_s)[0].transpose(0, 1))
        return torch.cat([*outs, torch.zeros_like(q[offsets[-1] :])])

    return attention


def one_rectangle(offsets: np.ndarray) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    length = torch.from_numpy(np.diff(offsets))
    valid = torch.arange(int(length.max())) < length[:, None]
    token = (torch.from_numpy(offsets[:-1])[:, None] + torch.arange(valid.size(1))).clamp(max=int(offsets[-1]) - 1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_r, k_r, v_r = (x[token].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_r, k_r, v_r, attn_mask=valid[:, None, None])
        out = out.transpose(1, 2)[valid]
        return torch.cat([out, torch.zeros_like(q[offsets[-1] :])])

    return attention


def bench_blocks(device: str, total: int, repeats: int) -> list[dict[str, Any]]:
    """Mask.segments(...) with its block lists, from offsets on the device, against create_block_mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    host = segment_offsets(total)
    offsets = torch.from_numpy(host).to(device)
    segment = torch.searchsorted(offsets, torch.arange(total, device=device), right=True)

    def same_segment(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return segment[q] == segment[k]

    ways: dict[str, Callable[[], object]] = {
        "from offsets": lambda: Mask.segments(offsets, total, offsets_host=host).blocks,
        "from offsets, causal": lambda: Mask.segments(offsets, total, offsets_host=host, causal=True).blocks,
        "create_block_mask": lambda: create_block_mask(
            same_segment, None, None, total, total, device=device, _compile=True
        ),
    }
    return [
        {"bench": "block mask", "way": way, "T": total, "segments": len(host) - 1}
        | measure(fn, repeats=repeats if "offsets" in way else 3, warmup=2, device=device)
        for way, fn in ways.items()
    ]


def bench_cuda(total: int, repeats: int) -> list[dict[str, Any]]:
    host = segment_offsets(total)
    max_len = int(np.diff(host).max())
    mask = Mask.segments(torch.from_numpy(host).cuda(), total, offsets_host=host, max_len=max_len)
    records = []
    for heads, dim in SHAPES:
        inputs, grad = packed_inputs(total, heads, dim, torch.bfloat16, "cuda")
        for backend in ("flex", "varlen", "sdpa"):
            mask.prepare(backend)
            attention = partial(attend, mask=mask, backend=backend)
            timing = measure(partial(step, attention, inputs, grad), repeats=repeats, device="cuda")
            shape = {"T": total, "segments": len(host) - 1, "heads": heads, "dim": dim, "dtype": "bfloat16"}
            records.append({"bench": "forward+backward", "way": backend} | shape | timing)
    return records


def bench_cpu(total: int, repeats: int) -> list[dict[str, Any]]:
    host = segment_offsets(total)
    mask = Mask.segments(torch.from_numpy(host), total)
    ways = {
        "sdpa": lambda q, k, v: attend(q, k, v, mask, backend="sdpa"),
        "loop over segments": segment_loop(host),
        "one rectangle": one_rectangle(host),
    }
    records = []
    for heads, dim in CPU_SHAPES:
        inputs, grad = packed_inputs(total, heads, dim, torch.float32, "cpu")
        for way, attention in ways.items():
            timing = measure(partial(step, attention, inputs, grad), repeats=repeats, warmup=2)
            shape = {"T": total, "segments": len(host) - 1, "heads": heads, "dim": dim, "dtype": "float32"}
            records.append({"bench": "forward+backward", "way": way} | shape | timing)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="write the JSON record here; default is stdout")
    parser.add_argument("--repeats", type=positive_int, default=20)
    args = parser.parse_args()
    if args.device == "cuda":
        records = bench_blocks("cuda", 230_000, args.repeats) + bench_cuda(2**18, args.repeats)
    else:
        records = bench_blocks("cpu", 16_384, args.repeats) + bench_cpu(4096, args.repeats)
    record = {"command": sys.argv, "environment": environment(args.device), "records": records}
    if args.device == "cuda":
        fast = next(1e3 * r["median_s"] for r in records if r["way"] == "from offsets")
        what = "milliseconds for the block lists of 230,000 tokens from offsets"
        record["requirements"] = [{"what": what, "measured": fast, "required": "< 1", "met": fast < 1}]
    if args.out is None:
        print(json.dumps(record, indent=1))
    write_record(args.out, record)
    for r in records:
        shape = " ".join(f"{key}={r[key]}" for key in ("T", "segments", "heads", "dim") if key in r)
        timing = f"{1e3 * r['median_s']:9.3f} ms (iqr {1e3 * r['iqr_s']:.3f})"
        print(f"{r['bench']:18}{r['way']:22}{timing}  {shape}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
