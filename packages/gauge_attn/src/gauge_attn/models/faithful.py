"""The model as it was proposed: token beliefs attend to each other by KL, nothing is projected, logits are linear.

A token is a Gaussian per head, mean mu and diagonal variances sigma, with one frame phi for all its heads. Attention
replaces (or with `residual` adds to) its means by the mixture of the beliefs before it, moved into its frame. The
readout is a plain matrix on the means, so that logits depend on the gauge: invariance ends at attention's weights.

Options that only the pairwise reference has (`route="dense"`): transported covariances cut to their diagonal, frames
by four terms of the exponential's series, and curved transport between i and j.

Shapes: B windows, N tokens, K components, V symbols, H heads of one l, d = 2l + 1.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from lab_shared.errors import UserError
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_attn.attention import Attended, kl_attention
from gauge_attn.config import ModelConfig
from gauge_attn.gaussians import Centre, features, rotate, unsvec
from gauge_attn.irreps import Irreps
from gauge_attn.kernel import FeatureCache
from gauge_attn.kernel import mix as mix_features
from gauge_attn.models.layers import Output, Temperature, bounded_log_sigma, constant, normal, token_frames
from gauge_attn.pairwise import pairwise_kl_attention
from gauge_attn.reference import DenseAttended, dense_kl_attention, taylor4_frames
from gauge_attn.so3 import frames_for

Cache = list[dict[int, FeatureCache]]
"""By l, two per layer: of the attention and of the free-energy step."""
Beliefs = tuple[Tensor, Tensor]
"""Means (B, H, N, d) and variances (B, H, N, d) or covariances (B, H, N, d, d)."""

READOUT_STD = 0.02
VFE_RATE = 0.1


class Attending(NamedTuple):
    """Beliefs of one l on their way into attention."""

    mu: Tensor
    sigma: Tensor
    frames: Tensor | None
    """F (B, N, d, d); None is the identity."""
    between: Tensor | None
    """M (B, N, N, d, d) of curved transport F_i M_ij F_j^T; None is the identity."""
    kappa_H: Tensor


class Faithful(nn.Module):
    """Logits of the next token.

    window: the longest sequence. alignment: reduction of the alignment loss that forward returns, or "none".

    Raises UserError for options of the dense route without it, and for those that exclude each other.
    """

    def __init__(self, config: ModelConfig, vocab: int, window: int, alignment: str = "none") -> None:
        super().__init__()
        _check(config)
        self.config, self.irreps = config, Irreps(config.spec)
        self.window, self.alignment = window, alignment
        width = self.irreps.dim
        std = config.kappa**0.5 if config.mean_std is None else config.mean_std
        beliefs = 1 if config.gauge_fixed else vocab
        self.mean_VK = normal(beliefs, width, std=std, role="mean")
        self.log_sigma_VK = constant(beliefs, width, value=0.0, role="log_sigma")
        self.phi_V3 = None
        if config.frames == "learned" and self.irreps.lmax:  # scalars have nothing to turn
            self.phi_V3 = normal(vocab, 3, std=config.frame_std, role="frame")
        self.position_NK = None
        if config.positions == "learned" and not config.gauge_fixed:
            self.position_NK = normal(window, width, std=std, role="mean")
        groups = self.irreps.by_l()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {str(l): Heads(g.d, g.multiplicity, config, last=i == config.layers - 1) for l, g in groups.items()}
            )
            for i in range(config.layers)
        )
        self.readout_VK = normal(vocab, width, std=READOUT_STD, role="readout")

    def forward(self, tokens_BN: Tensor, *, cache: Cache | None = None, record: list | None = None) -> Output:
        """tokens_BN: int64; with a cache, the tokens after those it holds (it grows by them).

        record: a list that gets, per layer, what attends {l: Attending}. Raises ValueError beyond the window.
        """
        start = next(iter(cache[0].values())).length if cache else 0
        if start + tokens_BN.size(1) > self.window:
            raise ValueError(f"{start + tokens_BN.size(1)} tokens do not fit the model's window of {self.window}")
        align = self.alignment != "none"
        beliefs, phi_BN3 = self.embed(tokens_BN, start)
        prior = dict(beliefs)
        frame_of, between = self.transport(tokens_BN, phi_BN3)
        if self.config.gauge_fixed:
            beliefs = {l: turned(belief, frame_of.get(l)) for l, belief in beliefs.items()}
        total = tokens_BN.new_zeros((), dtype=torch.float32)
        for i in range(len(self.layers)):
            entry = {}
            for l, heads in self.heads(i).items():
                entry[l] = Attending(*beliefs[l], frame_of.get(l), between.get(l), heads.temperature())
                own = (None, None) if cache is None else (cache[2 * i][l], cache[2 * i + 1][l])
                attended = heads(entry[l], align, own[0])
                beliefs[l] = heads.update(beliefs[l], prior[l], attended, frame_of.get(l), own[1])
                if attended.kl is not None:
                    total = total + attended.kl.sum()
            if record is not None:
                record.append(entry)
        mean_BNK = self.irreps.join({l: mean for l, (mean, _) in beliefs.items()})
        logits_BNV = F.linear(mean_BNK, self.readout_VK)
        if not align:
            return Output(logits_BNV, None)
        queries = tokens_BN.size(1) if self.alignment == "mean" else 1
        return Output(logits_BNV, total / (len(self.layers) * self.irreps.n_heads * tokens_BN.size(0) * queries))

    def embed(self, tokens_BN: Tensor, start: int = 0) -> tuple[dict[int, Beliefs], Tensor | None]:
        """The tokens' beliefs by l, and phi (B, N, 3) or None if frozen. Gauge-fixed beliefs are not turned yet."""
        index_BN = torch.zeros_like(tokens_BN) if self.config.gauge_fixed else tokens_BN
        mean_BNK = F.embedding(index_BN, self.mean_VK)
        if self.position_NK is not None:
            mean_BNK = mean_BNK + self.position_NK[start : start + tokens_BN.size(1)]
        sigma_BNK = bounded_log_sigma(F.embedding(index_BN, self.log_sigma_VK)).exp()
        means, sigmas = self.irreps.split(mean_BNK), self.irreps.split(sigma_BNK)
        phi_BN3 = None if self.phi_V3 is None else F.embedding(tokens_BN, self.phi_V3)
        return {l: (means[l], sigmas[l]) for l in means}, phi_BN3

    def transport(self, tokens_BN: Tensor, phi_BN3: Tensor | None) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """F {l: (B, N, d, d)} and M {l: (B, N, N, d, d)} of Omega_ij = F_i M_ij F_j^T; what is missing is the identity.

        Curved transport has M_ij = exp(c (phi_i x phi_j).X): the cross product is odd, so that Omega_ji is the inverse
        of Omega_ij, and it is what the commutator of the two rotations begins with.
        """
        if self.phi_V3 is None or phi_BN3 is None:
            return {}, {}
        ls = [l for l in self.irreps.ls if l]
        if self.config.exponential == "taylor4":
            frame_of = {l: taylor4_frames(phi_BN3, l) for l in ls}
        else:
            every = token_frames(self.irreps, self.phi_V3, tokens_BN)
            frame_of = {l: every[l] for l in ls}
        if not self.config.curvature:
            return frame_of, {}
        i_BNN3, j_BNN3 = torch.broadcast_tensors(phi_BN3[:, :, None], phi_BN3[:, None])
        curved = frames_for(self.irreps, self.config.curvature * torch.linalg.cross(i_BNN3, j_BNN3))
        return frame_of, {l: curved[l] for l in ls}

    def heads(self, layer: int) -> dict[int, Heads]:
        """A layer's heads by l."""
        modules = cast(nn.ModuleDict, self.layers[layer])
        return {int(name): cast(Heads, heads) for name, heads in modules.items()}

    def new_cache(self) -> Cache:
        return [{l: FeatureCache(self.window) for l in self.irreps.ls} for _ in range(2 * len(self.layers))]


class Heads(nn.Module):
    """All heads of one l in one layer. last: no layer follows, so that nobody reads the mixture's covariance."""

    def __init__(self, d: int, n_heads: int, config: ModelConfig, *, last: bool) -> None:
        super().__init__()
        self.config, self.self_mask = config, config.self_mask
        self.mean_only = last or not config.evolve_sigma
        self.temperature = Temperature([d] * n_heads, config.kappa, config.kappa_mode)
        self.rate = constant(1, value=VFE_RATE, role="vector") if config.vfe_step else None

    def forward(self, x: Attending, align: bool, cache: FeatureCache | None) -> Attended:
        config = self.config
        flat = x.frames is None and cache is None  # nothing is transported, so nothing is approximated
        if config.route == "exact" or flat:
            return kl_attention(
                x.mu, x.sigma, x.frames, x.kappa_H, self_mask=config.self_mask, cache=cache,
                mean_only=self.mean_only, return_kl=align,
            )  # fmt: skip
        if cache is not None:
            raise UserError("the dense route has no cached decoding: generate with a model of the exact route")
        dense = dense_heads(config, x, mean_only=self.mean_only)
        return Attended(dense.mean, dense.covariance, dense.lse, dense.kl)

    def update(
        self,
        beliefs: Beliefs,
        prior: Beliefs,
        attended: Attended,
        frame_BNdd: Tensor | None,
        cache: FeatureCache | None,
    ) -> Beliefs:
        """The beliefs after attention (and the free-energy step)."""
        mu, sigma = beliefs
        mean = attended.mean * self.temperature.gain_H[:, None, None]
        mu = mu + mean if self.config.residual else mean
        if self.rate is not None:
            mu = vfe_step(
                mu,
                sigma,
                prior,
                frame_BNdd,
                self.temperature(),
                self.rate,
                self_mask=self.config.self_mask,
                cache=cache,
            )
        if attended.covariance is not None:
            sigma = attended.covariance
        return mu, sigma


def turned(belief: Beliefs, frame_BNdd: Tensor | None) -> Beliefs:
    """N(Omega mu, Omega diag(sigma) Omega^T): one belief as seen in every token's frame, with whole covariances."""
    mu, sigma = belief
    cov = torch.diag_embed(sigma)
    if frame_BNdd is None:
        return mu, cov
    omega = frame_BNdd[:, None]
    return (omega @ mu[..., None])[..., 0], omega @ cov @ omega.mT


def dense_heads(config: ModelConfig, x: Attending, *, mean_only: bool = True) -> DenseAttended:
    """Attention of the heads of one l pair by pair, with the configured covariance."""
    d = x.mu.size(-1)
    frame = x.frames
    if frame is None:
        frame = torch.eye(d, dtype=x.mu.dtype, device=x.mu.device).expand(x.mu.size(0), x.mu.size(2), d, d)
    if mean_only and x.sigma.dim() == 4:
        return pairwise_kl_attention(
            x.mu, x.sigma, frame, x.kappa_H, between=x.between, self_mask=config.self_mask, covariance=config.covariance
        )
    transport = None if x.between is None else frame[:, :, None] @ x.between @ frame[:, None].mT
    return dense_kl_attention(
        x.mu,
        x.sigma,
        frame,
        x.kappa_H,
        self_mask=config.self_mask,
        covariance=config.covariance,
        transport=transport,
        mean_only=mean_only,
    )


def vfe_step(
    mu: Tensor,
    sigma: Tensor,
    prior: Beliefs,
    frame_BNdd: Tensor | None,
    kappa_H: Tensor,
    rate: Tensor,
    *,
    self_mask: bool,
    cache: FeatureCache | None = None,
) -> Tensor:
    """One natural-gradient step of the means on KL(q_i || prior_i) - kappa log sum_j exp(-KL_ij / kappa).

    mu_i <- mu_i - rate sigma_i [(mu_i - mu0_i) / sigma0_i + sum_j beta_ij Sigma'_ij^-1 (mu_i - Omega_ij mu_j)], keys
    held fixed: the free energy's gradient with beta the softmax itself (the envelope theorem leaves no further term).
    The sum is attention with the key features as values. Variances stay: the original's retraction of them, its
    trust region and its step of phi are left out.
    """
    d = mu.size(-1)
    f = features(mu, sigma, frame_BNdd, Centre())
    mixed, _ = mix_features(
        f.query_BHNF, f.key_BHNF, f.key_BHNF, kappa_H[:, None], True, self_mask, "fp32", cache, False
    )
    precision = unsvec(mixed[..., : -d - 1], d) + torch.eye(d, dtype=mu.dtype, device=mu.device)  # relative to N(0, 1)
    own_mean = f.query_BHNF[..., -d - 1 : -1]
    pull = (precision @ own_mean[..., None])[..., 0] + 0.5 * mixed[..., -d - 1 : -1]
    mean0, sigma0 = prior
    gradient = (mu - mean0) / sigma0 + rotate(pull, None if frame_BNdd is None else frame_BNdd.mT)
    natural = sigma * gradient if sigma.dim() == mu.dim() else (sigma @ gradient[..., None])[..., 0]
    return mu - rate * natural


def _check(config: ModelConfig) -> None:
    dense = {"covariance": "full", "exponential": "exact", "curvature": 0.0}
    asked = [name for name, default in dense.items() if getattr(config, name) != default]
    if asked and config.route == "exact":
        raise UserError(
            f"model.{asked[0]}={getattr(config, asked[0])} needs --model.route dense: the exact one has no such option"
        )
    if config.gauge_fixed and (config.vfe_step or config.covariance == "diag_approx"):
        raise UserError("gauge_fixed beliefs have whole covariances: leave out vfe_step and diag_approx")
    if config.route == "dense" and config.vfe_step:
        raise UserError("the free-energy step is made of exact features: use --model.route exact")
    if config.route == "dense" and config.evolve_sigma and config.layers > 1 and config.covariance == "diag_approx":
        raise UserError("diag_approx keeps no whole covariance for a second layer: use --model.no-evolve-sigma")
