"""Time a training step of a 27M-parameter transformer with AdamW alone and with each implementation of Muon.

python tools/bench_optim.py --device cuda --out optim.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lab_shared.bench import environment, measure
from lab_shared.command import positive_int, write_record
from lab_shared.norms import RMSNorm
from lab_shared.optim import make_optimizer
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, HIDDEN = 4096, 512, 8, 1376
PARAMETERS = 27_403_776  # with 8 layers
SEED = 0

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw"},
    "muon_fused": {"impl": "fused"},
    "muon_fused_eager": {"impl": "fused", "compile": False},
    "muon_torch": {"impl": "torch"},
    "muon_keller": {"impl": "keller"},
}


class Layer(nn.Module):
    """Pre-norm causal attention with QK norm and rotary positions, then SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(WIDTH // HEADS), RMSNorm(WIDTH // HEADS)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        h_BTD = self.norm_1(x_BTD)
        q, k, v = (f(h_BTD).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation)
        a_BHTd = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, is_causal=True)
        x_BTD = x_BTD + self.o(a_BHTd.transpose(1, 2).flatten(2))
        h_BTD = self.norm_2(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(h_BTD)) * self.up(h_BTD))


def rotate(x_BHTd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    a, b = x_BHTd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Transformer(nn.Module):
    """The mean cross-entropy of the next token; embedding and output head share their weight."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = RMSNorm(WIDTH)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
        half = WIDTH // HEADS // 2
        frequencies = 1e6 ** (-torch.arange(half, device=inputs.device) / half)
        angles = torch.arange(inputs.size(1), device=inputs.device)[:, None] * frequencies
        rotation = angles.cos(), angles.sin()
        x_BTD = self.embed(inputs)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation)
        logits_BTV = F.linear(self.norm(x_BTD), self.embed.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten())


def bench(device: torch.device, layers: int, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """{optimizer: {"step_s", "optimizer_s", "step_over_adamw"} or {"skipped": reason}}."""
    torch.manual_seed(SEED)
    model = Transformer(layers).to(device)
    count = sum(p.numel() for p in model.parameters())
    if layers == 8 and count != PARAMETERS:
        raise AssertionError(f"the model has {count} parameters, not {PARAMETERS}")
    forward = torch.compile(model) if device.type == "cuda" else model
    tokens = torch.randint(VOCABULARY, (batch, length + 1), device=device)

    results: dict[str, Any] = {}
    for name, options in OPTIMIZERS.items():
        if options.get("impl") == "keller" and importlib.util.find_spec("muon") is None:
            results[name] = {"skipped": "muon-optimizer is not installed"}
            continue
        if options.get("compile") is False and device.type != "cuda":
            results[name] = {"skipped": "muon_fused is eager here"}
            continue
        optimizer = make_optimizer(model, lr=3e-4, weight_decay=0.01, **options)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        whole = measure(step, repeats=repeats, warmup=3 if device.type == "cuda" else 1, device=device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        alone = measure(optimizer.step, repeats=repeats, warmup=1, device=device)
        optimizer.zero_grad(set_to_none=True)
        results[name] = {
            "step_s": whole,
            "optimizer_s": alone,
            "step_over_adamw": whole["median_s"] / results["adamw"]["step_s"]["median_s"] if results else 1.0,
        }
        print(f"{name}: step {whole['median_s']:.4g} s, optimizer {alone['median_s']:.4g} s", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the record; it goes to stdout in any case")
    parser.add_argument("--layers", type=positive_int, help="default 8, on a CPU 1")
    parser.add_argument("--batch", type=positive_int, help="sequences per step; default 64, on a CPU 1")
    parser.add_argument("--length", type=positive_int, default=512, help="tokens per sequence")
    parser.add_argument("--repeats", type=positive_int, help="timed steps; default 30, on a CPU 2")
    args = parser.parse_args()
    device = torch.device(args.device)
    layers, batch, repeats = (8, 64, 30) if device.type == "cuda" else (1, 1, 2)
    layers, batch, repeats = args.layers or layers, args.batch or batch, args.repeats or repeats
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(device),
        "model": {"layers": layers, "batch": batch, "length": args.length, "dtype": "bfloat16"},
        "results": bench(device, layers, batch, args.length, repeats),
    }
    if device.type == "cuda":
        ratio = record["results"]["muon_fused"]["step_over_adamw"]
        what = "step with fused Muon over AdamW alone"
        record["requirements"] = [{"what": what, "measured": ratio, "required": "<= 1.12", "met": ratio <= 1.12}]
    print(json.dumps(record, indent=2))
    write_record(args.out, record)


if __name__ == "__main__":
    main()
