"""What the heads of any of the models do on one batch: sharpness per head, diversity, dense maps for figures.

Shapes: B windows, N tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gauge_attn.attention import Prepared, prepare
from gauge_attn.diagnostics import (
    KLStatistics,
    diversity,
    kl_statistics,
    row_std_onehot,
    row_std_uniform,
    sharpness,
    sharpness_of,
)
from gauge_attn.gaussians import Centre
from gauge_attn.models import GPT, Faithful, Model, Practical
from gauge_attn.models.faithful import Attending, dense_heads
from gauge_attn.printed import averaged_line, baselines, diversity_line, head_line

HeadRecord = dict[str, Any]


@torch.no_grad()
def head_records(model: Model, tokens_BN: Tensor) -> list[HeadRecord]:
    """One record per head and layer: {"layer", "head", "label", "l", "kappa", "row_std", ...}, see `Sharpness`.

    Heads are numbered within their layer, in the order of the layout. The matrix is formed by the dense route only.
    """
    records = []
    for layer, l, x in _recorded(model, tokens_BN):
        values = {name: value.tolist() for name, value in _figures(model, l, x).items()}
        label, heads = _group(model, l)
        for i, head in enumerate(heads):
            numbers = {name: value[i] for name, value in values.items()}
            records.append({"layer": layer, "head": head, "label": label, "l": l, **numbers})
    return sorted(records, key=lambda r: (r["layer"], r["head"]))


def _recorded(model: Model, tokens_BN: Tensor) -> Iterator[tuple[int, int, Any]]:
    """(layer, l, what attends there) of one pass; the heads of a GPT, which have no l, stand under -1."""
    recorded: list[Any] = []
    model(tokens_BN, record=recorded)
    for layer, entry in enumerate(recorded):
        parts = {-1: entry} if isinstance(model, GPT) else entry
        for l, x in parts.items():
            yield layer, l, x


def _group(model: Model, l: int) -> tuple[str, tuple[int, ...]]:
    """The label of the heads of one l, and their places in the layout."""
    if isinstance(model, GPT):
        return "dot", tuple(range(model.heads))
    return f"ℓ{l}", model.irreps.by_l()[l].heads


def _figures(model: Model, l: int, x: Any) -> dict[str, Tensor]:
    if isinstance(model, GPT):
        return feature_sharpness(_dot_product(*x), self_mask=False)
    if isinstance(model, Practical):
        return feature_sharpness(x, self_mask=model.heads(0)[l].self_mask)
    if model.config.route == "dense":
        dense = dense_heads(model.config, x)
        kappa_H = x.kappa_H.double()
        return matrix_sharpness(dense.beta.double(), self_mask=model.config.self_mask) | {
            "kappa": kappa_H,
            "attended_kl": dense.kl.double().mean((0, 2)),
        }
    figures = sharpness(x.mu, x.sigma, x.frames, x.kappa_H, self_mask=model.config.self_mask)
    return {"kappa": x.kappa_H.double(), **vars(figures)}


def feature_sharpness(p: Prepared, *, self_mask: bool) -> dict[str, Tensor]:
    """`diagnostics.sharpness_of` as a dictionary, with the temperatures."""
    kappa_H = p.kappa_H1[:, 0].double().expand(p.query.size(1))
    return {"kappa": kappa_H, **vars(sharpness_of(p, self_mask=self_mask))}


def matrix_sharpness(beta_BHNN: Tensor, *, self_mask: bool) -> dict[str, Tensor]:
    """The same figures from the weights themselves."""
    participation = beta_BHNN.square().sum(-1)
    entropy = -torch.special.xlogy(beta_BHNN, beta_BHNN).sum(-1)
    itself = beta_BHNN.diagonal(dim1=-2, dim2=-1)
    n = participation.size(-1)
    square = (participation - itself.square()) / (n - 1)
    row_std = (square - ((1 - itself) / (n - 1)).square()).clamp_min(0).sqrt().mean((0, 2))
    uniform, onehot = row_std_uniform(n, self_mask), row_std_onehot(n)
    first = 2 if self_mask else 1  # the first query with a choice
    n_keys_N = torch.arange(1 - self_mask, n + 1 - self_mask, dtype=torch.float64, device=participation.device)[first:]
    return {
        "row_std": row_std,
        "row_std_rescaled": (row_std - uniform) / (onehot - uniform),
        "entropy_ratio": (entropy[..., first:] / n_keys_N.log()).mean((0, 2)),
        "effective_keys": (1 / participation).mean((0, 2)),
        "participation": participation.mean((0, 2)),
        "relative_participation": (participation[..., first:] * n_keys_N).mean((0, 2)),
    }


def matrix_kl_statistics(kl_NN: Tensor) -> KLStatistics:
    """`diagnostics.kl_statistics` of a matrix of divergences that is there."""
    others = kl_NN[~torch.eye(len(kl_NN), dtype=torch.bool, device=kl_NN.device)].double()
    return KLStatistics(float(others.mean()), float(others.std()), float(others.min()), float(others.max()))


def _dot_product(query: Tensor, key: Tensor) -> Prepared:
    """Features whose logits -u.k / 2 are query . key / sqrt(E)."""
    u = -2 * query.double() / query.size(-1) ** 0.5
    zero, one = u.new_zeros(u.shape[:-1]), u.new_ones(u.size(1), 1)
    return Prepared(u, key.double(), key.double(), zero, zero, one, None, Centre())


@torch.no_grad()
def kl_std_per_head(model: Faithful | Practical, tokens_BN: Tensor) -> list[dict[int, Tensor]]:
    """Per layer {l: (H,)}: the std over keys j < i of KL_ij, averaged over queries with at least two and the batch."""
    recorded: list[Any] = []
    model(tokens_BN, record=recorded)
    result = []
    for entry in recorded:
        stds = {}
        for l, x in entry.items():
            if isinstance(model, Faithful) and model.config.route == "dense":
                kl = dense_heads(model.config, x).divergence
            else:
                p = prepare(x.mu, x.sigma, x.frames, 1.0) if isinstance(x, Attending) else x
                kl = 0.5 * p.query @ p.key.mT  # up to a term of the query, which no std over keys sees
            n = kl.size(-1)
            before = torch.ones(n, n, dtype=torch.bool, device=kl.device).tril(-1)
            count_N1 = before.sum(-1, keepdim=True).clamp(min=1)
            mean = (kl * before).sum(-1, keepdim=True) / count_N1
            variance = ((kl - mean).square() * before).sum(-1, keepdim=True) / count_N1
            stds[l] = variance[..., 2:, 0].sqrt().mean((0, 2))
        result.append(stds)
    return result


@torch.no_grad()
def calibrate(model: Model, tokens_BN: Tensor) -> None:
    """Give every head of a standardised model the temperature that its KL on this batch asks for, layer by layer."""
    if isinstance(model, GPT):
        return
    n_layers = len(model.layers if isinstance(model, Faithful) else model.blocks)
    for layer in range(n_layers):
        for l, heads in model.heads(layer).items():
            if heads.temperature.mode == "standardised":
                heads.temperature.calibrate(kl_std_per_head(model, tokens_BN)[layer][l])


@torch.no_grad()
def diversity_of(model: Faithful | Practical, tokens_BN: Tensor) -> dict[str, float]:
    """The numbers of the [DIVERSITY] line for the first window.

    faithful: of the raw embeddings, as the original. practical: mu is the stream at the start, scalars included; the
    variances are those of the last layer's keys. KL is the last layer's, averaged over its heads.
    """
    tokens_1N = tokens_BN[:1]
    recorded: list[Any] = []
    model(tokens_1N, record=recorded)
    last = recorded[-1]
    if isinstance(model, Faithful):
        beliefs, phi_BN3 = model.embed(tokens_1N)
        mu_NK = model.irreps.join({l: mu for l, (mu, _) in beliefs.items()})[0]
        sigma_NK = model.irreps.join({l: sigma for l, (_, sigma) in beliefs.items()})[0]
        if model.config.route == "dense":
            kl = torch.cat([dense_heads(model.config, x).divergence[0] for x in last.values()]).double().mean(0)
            statistics = matrix_kl_statistics(kl)
        else:
            parts = [prepare(x.mu.double(), x.sigma.double(), x.frames, 1.0) for x in last.values()]
            statistics = kl_statistics(parts)
    else:
        stream, _ = model.embed(tokens_1N)
        mu_NK = torch.cat([x.flatten(2) for x in stream.values()], -1)[0]
        sigma_NK = torch.cat([1 / p.key[0, :, :, 0].T for p in last.values()], -1)
        parts = [
            p._replace(query=p.query.double(), key=p.key.double(), to_reference_BHN=p.to_reference_BHN.double())
            for p in last.values()
        ]
        statistics = kl_statistics(parts)
        phi_BN3 = None if model.phi_V3 is None else torch.nn.functional.embedding(tokens_1N, model.phi_V3)
    phi_N3 = mu_NK.new_zeros(mu_NK.size(0), 3) if phi_BN3 is None else phi_BN3[0]
    return diversity(mu_NK, sigma_NK, phi_N3, statistics)


def lines(model: Model, records: list[HeadRecord], diversity_values: dict[str, float] | None, n: int) -> list[str]:
    """What is printed: the [DIVERSITY] block, then a line per head of the last layer, their mean and the baselines."""
    text = [] if diversity_values is None else diversity_line(diversity_values).splitlines()
    last = max(r["layer"] for r in records)
    for layer in range(last + 1):
        if last:
            text.append(f"layer {layer}")
        of_layer = [r for r in records if r["layer"] == layer]
        text += [
            f"{head_line(r['head'], r['label'], r['row_std'])}  H/log n={r['entropy_ratio']:.3f}" for r in of_layer
        ]
        text.append(f"{averaged_line([r['row_std'] for r in of_layer])}  {baselines(n)}")
    return text


@torch.no_grad()
def attention_maps(model: Model, tokens_1N: Tensor) -> list[dict[str, Any]]:
    """Weights (N, N), and divergences where there are any, of every head for one window; for figures, so N is small."""
    maps = []
    for layer, l, x in _recorded(model, tokens_1N):
        beta, divergence = _maps(model, layer, l, x)
        label, heads = _group(model, l)
        for i, head in enumerate(heads):
            maps.append(
                {
                    "layer": layer,
                    "head": head,
                    "label": label,
                    "beta": beta[0, i].double().cpu().numpy(),
                    "kl": divergence[0, i].double().cpu().numpy(),
                }
            )
    return sorted(maps, key=lambda m: (m["layer"], m["head"]))


def _maps(model: Model, layer: int, l: int, x: Any) -> tuple[Tensor, Tensor]:
    if isinstance(model, GPT):
        return _weights(_dot_product(*x), False)
    if isinstance(model, Practical):
        return _weights(x, model.heads(layer)[l].self_mask)
    dense = dense_heads(model.config, x)
    return dense.beta, dense.divergence


def _weights(p: Prepared, self_mask: bool) -> tuple[Tensor, Tensor]:
    n = p.query.size(2)
    allowed = torch.ones(n, n, dtype=torch.bool, device=p.query.device).tril(-int(self_mask))
    allowed[0, 0] = True
    logits = -0.5 * p.query @ p.biased_key.mT / p.kappa_H1[..., None]
    beta = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return beta, 0.5 * p.query @ p.key.mT + p.to_reference_BHN[..., None]
