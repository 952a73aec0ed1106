"""What is printed about heads and beliefs, in the seed's format and with its labels, beside their baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gauge_attn.diagnostics import row_std_onehot, row_std_uniform

SHARP, MEDIUM = 0.10, 0.05


def verdict(row_std: float) -> str:
    """The seed's label: SHARP above 0.10, MEDIUM above 0.05, else UNIFORM; not comparable between lengths."""
    return "✓SHARP" if row_std > SHARP else "⚠MEDIUM" if row_std > MEDIUM else "❌UNIFORM"


def head_line(head: int, label: str, row_std: float) -> str:
    """`Head 8 (ℓ2): row_std=0.0684 [⚠MEDIUM]`"""
    return f"Head {head} ({label}): row_std={row_std:.4f} [{verdict(row_std)}]"


def averaged_line(row_stds: Sequence[float]) -> str:
    """The mean over heads in the form of `head_line`."""
    mean = sum(row_stds) / len(row_stds)
    return f"Averaged: row_std={mean:.4f} [{verdict(mean)}]"


def baselines(n: int) -> str:
    """`(N=64: uniform 0.0217, one-hot 0.1230)`"""
    return f"(N={n}: uniform {row_std_uniform(n):.4f}, one-hot {row_std_onehot(n):.4f})"


def diversity_line(values: Mapping[str, float]) -> str:
    """The [DIVERSITY] block of `diversity` in the seed's three lines, and a fourth with row_std's baselines."""
    v, margin = values, " " * 12
    n = int(v["n"])
    return "\n".join(
        [
            f"[DIVERSITY] μ_dist: {v['mu_dist']:.4f} | φ_std: {v['phi_std']:.4f} | KL_std: {v['kl_std']:.4f}",
            f"{margin}KL range: [{v['kl_min']:.4f}, {v['kl_max']:.4f}] | mean: {v['kl_mean']:.4f}",
            f"{margin}σ range: [{v['sigma_min']:.6f}, {v['sigma_max']:.6f}] | mean: {v['sigma_mean']:.6f}",
            f"{margin}row_std at N={n}: uniform {row_std_uniform(n):.4f} | one-hot {row_std_onehot(n):.4f}",
        ]
    )


def perplexity_text(perplexity: float | None) -> str:
    """`7.843`; None is more than a float holds."""
    return "> 1e308" if perplexity is None else f"{perplexity:.3f}"
