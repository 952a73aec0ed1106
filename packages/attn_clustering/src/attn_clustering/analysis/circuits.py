"""QK and OV circuits of every head from folded factors.

Shape suffixes: L layers, H query heads, G key heads, D model width, C head width, K topics.

What a head compares is x^T QK x' with  QK = A B^T,  A = diag(g) W_Q^T diag(g_q),  B = diag(g) W_K^T diag(g_k)  (D x C),
g the gain of the block's norm and g_q, g_k those of QK-Norm; what it writes is  OV x = W_O W_V diag(g) x.  The norms
also divide by root mean squares: positive numbers per token and head that change scores but not directions, so with
RoPE off

    q . k = x^T QK x' / (rms(q before its gain) rms(k before its gain)),   x normalised without gain.

No D x D matrix is formed: singular values and vectors come from QR factors of A and B and a C x C decomposition.
Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factored(NamedTuple):
    """Matrices left right^T of rank C, as their factors; both (..., D, C)."""

    left: Tensor
    right: Tensor

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., D, C), descending s (..., C) and V (..., D, C) with left right^T = U diag(s) V^T."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right)
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
        return q_left @ u, s, q_right @ vh.mT


class Circuits(NamedTuple):
    """Every head's circuits, factors (L, H, D, C) in float32: scores are x^T qk x', outputs ov x."""

    qk: Factored
    ov: Factored


def circuits(model: Any, rope_lags: int = 0) -> Circuits:
    """The circuits of all heads.

    rope_lags: 0 leaves positions out (RoPE off, DroPE, or content at lag 0); n replaces the rotation between query and
    key by its mean over the lags 0 .. n - 1, what a head with RoPE compares on average.
    """
    config = model.config
    rotation = (
        torch.eye(config.head_dim) if rope_lags == 0 else mean_rotation(config.head_dim, config.rope_theta, rope_lags)
    )
    parts: list[list[Tensor]] = [[], [], [], []]
    for block in model.blocks:
        attn, gain = block.attn, block.attn_norm.weight.detach().float()

        def read(weight: Tensor, gain: Tensor = gain) -> Tensor:
            """(heads C, D) -> (heads, D, C), the norm's gain folded in."""
            return (weight.detach().float() * gain).unflatten(0, (-1, config.head_dim)).mT

        a = read(attn.q_proj.weight) * attn.q_norm.weight.detach().float()
        b = read(attn.k_proj.weight) * attn.k_norm.weight.detach().float()
        v = read(attn.v_proj.weight)
        o = attn.o_proj.weight.detach().float().unflatten(1, (-1, config.head_dim)).transpose(0, 1)
        group = len(a) // len(b)
        whole = (a @ rotation.to(a), b.repeat_interleave(group, 0), o, v.repeat_interleave(group, 0))
        for part, x in zip(parts, whole, strict=True):
            part.append(x)
    qk_left, qk_right, ov_left, ov_right = (torch.stack(part) for part in parts)
    return Circuits(Factored(qk_left, qk_right), Factored(ov_left, ov_right))


def mean_rotation(head_dim: int, theta: float, lags: int) -> Tensor:
    """(C, C) mean of M with  rotate(q, t) . rotate(k, t - lag) = q M k  over lags 0 .. lags - 1."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(lags, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().mean(0).diag(), angle.sin().mean(0).diag()
    # The key is rotated back by the lag relative to the query: q_low takes k_low cos + k_high sin.
    return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)]).float()


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of the normalised squared singular values (..., C) -> (...), between 1 and C."""
    p = values.square() / values.square().sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def probe_subspace(weight_GDK: Tensor) -> Tensor:
    """(G, D, K - 1) orthonormal directions along which a probe tells topics apart (a shift of all topics does not)."""
    centred = weight_GDK - weight_GDK.mean(-1, keepdim=True)
    u, _, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[..., : weight_GDK.size(-1) - 1]


def alignment(matrix: Factored, subspace_LDK: Tensor) -> tuple[Tensor, Tensor]:
    """Fraction (L, H) of a circuit's squared Frobenius norm inside a subspace, on its left and on its right side.

    subspace_LDK: orthonormal columns for each layer. A circuit that ignores it has about columns / D.
    """
    left, right = matrix
    total = _squared_norm(left, right)
    basis = subspace_LDK[:, None]
    projected_left, projected_right = basis.mT @ left, basis.mT @ right
    return _squared_norm(projected_left, right) / total, _squared_norm(left, projected_right) / total


def _squared_norm(left: Tensor, right: Tensor) -> Tensor:
    """|left right^T|_F^2 = tr((left^T left)(right^T right)), without forming the product."""
    return ((left.mT @ left) * (right.mT @ right)).sum((-2, -1))


def circuit_statistics(model: Any, probe_weight_GDK: Tensor, rope_lags: int = 0) -> dict[str, Tensor]:
    """Spectra and alignments of all heads.

    Computed on the CPU, which is about as fast as a GPU with such small matrices, and does not wait for other jobs.

    qk_singular_values, ov_singular_values (L, H, C); qk_effective_rank, ov_effective_rank (L, H);
    qk_query_topic, qk_key_topic, ov_read_topic, ov_write_topic (L, H): fraction of the circuit inside the directions
    the probe at the block's input (for writing: at its output) uses. alignment_chance: what a random circuit has.
    """
    qk, ov = (Factored(left.cpu(), right.cpu()) for left, right in circuits(model, rope_lags))
    space_GDK = probe_subspace(probe_weight_GDK.float().cpu())
    before, after = space_GDK[:-1], space_GDK[1:]
    query_topic, key_topic = alignment(qk, before)
    out: dict[str, Tensor] = {"qk_query_topic": query_topic, "qk_key_topic": key_topic}
    out["ov_write_topic"], _ = alignment(ov, after)
    _, out["ov_read_topic"] = alignment(ov, before)
    for name, matrix in (("qk", qk), ("ov", ov)):
        _, values, _ = matrix.svd()
        out[f"{name}_singular_values"] = values
        out[f"{name}_effective_rank"] = effective_rank(values)
    out["alignment_chance"] = torch.tensor(space_GDK.size(-1) / space_GDK.size(1))
    return out
