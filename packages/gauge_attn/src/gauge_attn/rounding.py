"""Rounding errors of KL attention's number formats, against the pairwise definition in float64 (generated data)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gauge_attn.attention import kl_attention, prepare
from gauge_attn.kernel import Precision, fused, lower
from gauge_attn.reference import dense_kl_attention
from gauge_attn.so3 import frames

HEADS = 4
REGIMES = (
    ("seed-like", 0.081, 0.05, 2, 0.43),
    ("seed-like", 0.081, 0.05, 2, 0.0086),
    ("seed-like", 0.081, 0.05, 0, 0.0086),
    ("spread", 0.5, 0.3, 0, 0.0086),
    ("spread", 0.5, 0.3, 2, 0.43),
    ("wide", 1.0, 1.0, 1, 0.43),
)
"""(name, standard deviation of mu, of log sigma, l, kappa)"""


Row = dict[str, Any]


@torch.no_grad()
def precision_table(device: torch.device | str, *, n_tokens: int = 256) -> list[Row]:
    """Errors of each number format against float64: mean total variation 1/2 sum_j |beta' - beta| per query, and the
    largest error of the mean, in units of the means' standard deviation."""
    rows = []
    for name, mu_std, log_sigma_std, l, kappa in REGIMES:
        generator = torch.Generator().manual_seed(0)
        mu = mu_std * torch.randn(1, HEADS, n_tokens, 2 * l + 1, generator=generator, dtype=torch.float64)
        sigma = (log_sigma_std * torch.randn(mu.shape, generator=generator, dtype=torch.float64)).exp()
        omega = frames(0.4827 * torch.randn(1, n_tokens, 3, generator=generator, dtype=torch.float64), l)
        exact = dense_kl_attention(mu, sigma, omega, kappa)
        m, s, f = (x.float().to(device) for x in (mu, sigma, omega))
        row: Row = {"section": "precision", "name": f"{name}, l={l}, kappa={kappa:g}", "n": n_tokens}
        formats: tuple[Precision, ...] = ("fp32", "fp16", "bf16x3")
        for precision in formats:
            beta = _weights(m, s, f, kappa, precision)
            mean = kl_attention(m, s, f, kappa, precision=precision).mean.double().cpu()
            row[f"{precision} TV"] = float((beta - exact.beta).abs().sum(-1).mean() / 2)
            row[f"{precision} mean"] = float((mean - exact.mean).abs().max() / mu_std)
        rows.append(row)
    return rows


def _weights(mu: Tensor, sigma: Tensor, omega: Tensor, kappa: float, precision: Precision) -> Tensor:
    """beta (1, H, N, N) in float64, read out of the kernel with columns of the identity as values."""
    p = prepare(mu, sigma, omega, kappa)
    query, key, _ = lower(p.query, p.key, p.query, p.kappa_H1, precision)
    n, width = query.size(2), query.size(-1)
    identity = torch.eye(n, dtype=query.dtype, device=query.device)
    columns = []
    for begin in range(0, n, width):
        value = torch.nn.functional.pad(identity[:, begin : begin + width], (0, max(0, begin + width - n)))
        value = value.expand(*query.shape[:2], n, width).contiguous()
        columns.append(fused(query, key, value, True, False)[0])
    beta = torch.cat(columns, -1)[..., :n].double().cpu()
    return beta / beta.sum(-1, keepdim=True)
