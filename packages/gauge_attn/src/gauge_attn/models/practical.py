"""KL attention inside an equivariant transformer, invariant from the embedding's frames to the logits.

A head of angular momentum l forms two Gaussian beliefs from the stream, q_i = N(mu_i, s_i 1) for the query and
p_j = N(nu_j, t_j 1) for the key, and attends with softmax_j(-KL(q_i || Omega_i Omega_j^-1 p_j) / kappa). In its own
frame every token's mean is m = Omega^-1 mu, so that

    2 KL = (|m_i|^2 + d s_i) / t_j - 2 m_i . n_j / t_j + |n_j|^2 / t_j + d log t_j - d - d log s_i,

a dot product of u_i = [|m_i|^2 + d s_i, m_i, 1] and k_j = [1, -2 n_j, |n_j|^2 + d t_j log t_j] / t_j up to what depends
on i alone. Variances come from invariants. What a head carries is a vector of its own type, transported, and scalars.

Shapes: B windows, N tokens, M cached tokens, V symbols, S scalars, C copies, H heads of one l, d = 2l + 1, f width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_attn.attention import Prepared
from gauge_attn.config import ModelConfig
from gauge_attn.gaussians import Centre
from gauge_attn.irreps import Irreps
from gauge_attn.kernel import FeatureCache
from gauge_attn.kernel import mix as mix_features
from gauge_attn.models.layers import Output, Temperature, bounded_log_sigma, declare, matrix, normal, token_frames
from gauge_attn.models.stream import EquivariantNorm, GatedMLP, Invariants, Stream, add, mix, wide
from gauge_attn.so3 import rope_frames
from gauge_attn.tables import matmul

EMBEDDING_STD = 1.0
Cache = list[FeatureCache]
"""Per layer the keys and values so far, of all heads."""


class Practical(nn.Module):
    """Logits of the next token; invariant under any rotation g_i of the frames (and of the stream with them).

    window: the longest sequence. alignment: reduction of the alignment loss that forward returns, or "none".
    """

    def __init__(self, config: ModelConfig, vocab: int, window: int, alignment: str = "none") -> None:
        super().__init__()
        self.irreps = Irreps(config.spec)
        self.window, self.alignment = window, alignment
        groups = self.irreps.by_l()
        self.channels = {0: config.scalars} | {l: config.copies * g.multiplicity for l, g in groups.items() if l}
        self.embeddings = nn.ParameterDict(
            {
                str(l): normal(vocab, c * (2 * l + 1), std=EMBEDDING_STD, role="embedding")
                for l, c in self.channels.items()
            }
        )
        self.phi_V3 = None
        if config.frames == "learned" and self.irreps.lmax:
            self.phi_V3 = normal(vocab, 3, std=config.frame_std, role="frame")
        self.blocks = nn.ModuleList(
            _Block({l: g.multiplicity for l, g in groups.items()}, self.channels, config, window)
            for _ in range(config.layers)
        )
        self.norm = EquivariantNorm(self.channels)
        self.invariants = Invariants(self.channels)
        self.readout = matrix(vocab, self.invariants.width, role="readout", gain=0.1)
        self._regions: _Regions | None = None

    def forward(self, tokens_BN: Tensor, *, cache: Cache | None = None, record: list | None = None) -> Output:
        """tokens_BN: int64; with a cache, the tokens after those it holds (it grows by them).

        record: a list that gets, per layer, the heads' features {l: Prepared}. Raises ValueError beyond the window.
        """
        start = cache[0].length if cache else 0
        if start + tokens_BN.size(1) > self.window:
            raise ValueError(f"{start + tokens_BN.size(1)} tokens do not fit the model's window of {self.window}")
        # Other calls than training steps have shapes of their own, each of which would be compiled anew.
        training = cache is None and record is None and torch.is_grad_enabled()
        run = self._regions if training and self._regions is not None else _Regions()
        x, frames = run.embed(self, tokens_BN)
        total = tokens_BN.new_zeros((), dtype=torch.float32)
        for i, block in enumerate(self.blocks):
            entry: dict[int, Prepared] | None = None if record is None else {}
            own = None if cache is None else cache[i]
            x, kl_sum = run.block(block, x, frames, own, start, self.alignment != "none", entry)
            total = total + kl_sum
            if record is not None:
                record.append(entry)
        logits_BNV = run.read(self, x)
        if self.alignment == "none":
            return Output(logits_BNV, None)
        queries = tokens_BN.size(1) if self.alignment == "mean" else 1
        return Output(logits_BNV, total / (len(self.blocks) * self.irreps.n_heads * tokens_BN.size(0) * queries))

    def embed(self, tokens_BN: Tensor) -> tuple[Stream, dict[int, Tensor]]:
        """The stream at the start and the tokens' frames {l: (B, N, d, d)} for l > 0 (empty where frozen)."""
        x = {0: F.embedding(tokens_BN, self.embeddings["0"])}
        for l, c in self.channels.items():
            if l:
                x[l] = F.embedding(tokens_BN, self.embeddings[str(l)]).unflatten(-1, (c, 2 * l + 1)).mT
        if self.phi_V3 is None:
            return x, {}
        frames = token_frames(self.irreps, self.phi_V3, tokens_BN)
        return x, {l: frame for l, frame in frames.items() if l}

    def compile_regions(self, compiled: Callable[[Any], Any]) -> None:
        """Compile training steps in three parts, embedding, block and readout; all blocks share one compiled code."""
        self._regions = _Regions(*(compiled(part) for part in _Regions()))

    def heads(self, layer: int) -> dict[int, Heads]:
        """A layer's heads by l."""
        return cast(_Block, self.blocks[layer]).heads_by_l()

    def new_cache(self) -> Cache:
        return [FeatureCache(self.window) for _ in self.blocks]


class _Block(nn.Module):
    """x + heads(norm(x)), then x + mlp(norm(x)). multiplicity: l -> heads; channels: l -> copies in the stream."""

    def __init__(
        self, multiplicity: dict[int, int], channels: dict[int, int], config: ModelConfig, window: int
    ) -> None:
        super().__init__()
        self.attention_norm = EquivariantNorm(channels)
        self.heads = nn.ModuleDict({str(l): Heads(l, h, channels, config, window) for l, h in multiplicity.items()})
        n_heads = sum(multiplicity.values())
        self.mix_scalars = matrix(channels[0], n_heads * config.value_scalars, gain=0.1)
        self.mixers = nn.ParameterDict({str(l): matrix(channels[l], h, gain=0.1) for l, h in multiplicity.items() if l})
        self.mlp_norm = EquivariantNorm(channels)
        self.mlp = GatedMLP(channels, config.hidden)

    def forward(
        self,
        x: Stream,
        frames: dict[int, Tensor],
        cache: FeatureCache | None,
        start: int,
        align: bool,
        record: dict[int, Prepared] | None,
    ) -> tuple[Stream, Tensor]:
        """The stream after the block, and the sum over heads and queries of sum_j beta_ij KL_ij (0 unless `align`)."""
        h = self.attention_norm(x)
        scalars_BNS, vectors, kl_sum = attend_heads(self.heads_by_l(), h, frames, cache, start, align, record)
        update = {l: mix(vector_BNdH, self.mixers[str(l)]) for l, vector_BNdH in vectors.items()}
        update[0] = F.linear(scalars_BNS, self.mix_scalars)
        x = add(x, update)
        return add(x, self.mlp(self.mlp_norm(x))), kl_sum

    def heads_by_l(self) -> dict[int, Heads]:
        return {int(name): cast(Heads, heads) for name, heads in self.heads.items()}


def _embed(model: Practical, tokens_BN: Tensor) -> tuple[Stream, dict[int, Tensor]]:
    return model.embed(tokens_BN)


def _run_block(block: nn.Module, *state: Any) -> tuple[Stream, Tensor]:
    return block(*state)


def _read(model: Practical, x: Stream) -> Tensor:
    return F.linear(model.invariants(model.norm(x)), model.readout)


class _Regions(NamedTuple):
    """The parts of a forward pass, plain or compiled."""

    embed: Callable[..., tuple[Stream, dict[int, Tensor]]] = _embed
    block: Callable[..., tuple[Stream, Tensor]] = _run_block
    read: Callable[..., Tensor] = _read


def attend_heads(
    groups: dict[int, Heads],
    h: Stream,
    frames: dict[int, Tensor],
    cache: FeatureCache | None,
    start: int,
    align: bool,
    record: dict[int, Prepared] | None,
) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """Heads of any l in one attention call, their features padded to those of the largest l.

    Carried scalars (B, N, H S') of all heads, vectors {l: (B, N, d, H)} in the queries' frames, and the sum over heads
    and queries of sum_j beta_ij KL_ij (0 unless `align`).
    """
    weights = [torch.cat(heads.reads()) for heads in groups.values()]
    read = wide(F.linear(h[0], torch.cat(weights))).split([len(weight) for weight in weights], -1)
    projected = {l: heads.project(h, own, frames.get(l)) for (l, heads), own in zip(groups.items(), read, strict=True)}
    with torch.autocast(h[0].device.type, enabled=False):
        prepared, values, slots = {}, {}, {}
        for l, heads in groups.items():
            log_sigma, scalars_BHNS, means_BHNd = projected[l]
            n_heads = heads.n_heads
            f = prepared[l] = heads.features(log_sigma, means_BHNd[:, : 2 * n_heads], frames.get(l), start)
            parts = [scalars_BHNS, *((means_BHNd[:, 2 * n_heads :],) if l else ()), *((f.key,) if align else ())]
            values[l] = torch.cat(parts, -1)
            slots[l] = heads.value_scalars + (heads.d if l else 0)
        if record is not None:
            record.update(prepared)
        query = _side_by_side([f.query for f in prepared.values()])
        key = _side_by_side([f.biased_key for f in prepared.values()])
        value = _side_by_side(list(values.values()))
        kappa_H1 = torch.cat([f.kappa_H1 for f in prepared.values()])
        first = next(iter(groups.values()))
        out, _ = mix_features(query, key, value, kappa_H1, True, first.self_mask, first.precision, cache, False)
        kl_sum = out.new_zeros(())
        every = dict(zip(groups, out.split([heads.n_heads for heads in groups.values()], 1), strict=True))
        if align:
            for l, f in prepared.items():
                kl_sum = kl_sum + f.divergence(every[l][..., slots[l] : slots[l] + f.key.size(-1)]).sum()
        scalars, vectors = [], {}
        for l, heads in groups.items():
            given = every[l][..., : slots[l]] * heads.temperature.gain_H[:, None, None]
            scalars.append(given[..., : heads.value_scalars])
            if l:
                vector_BNdH = given[..., heads.value_scalars :].permute(0, 2, 3, 1)
                vectors[l] = vector_BNdH if frames.get(l) is None else matmul(frames[l], vector_BNdH)
    return torch.cat(scalars, 1).transpose(1, 2).flatten(2), vectors, kl_sum


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """(B, H, N, F) of several l as one, with zeros up to the widest."""
    width = max(x.size(-1) for x in parts)
    return torch.cat([F.pad(x, (0, width - x.size(-1))) for x in parts], 1)


class Heads(nn.Module):
    """What the heads of one l in one layer read from the stream, and their features."""

    def __init__(self, l: int, n_heads: int, channels: dict[int, int], config: ModelConfig, window: int) -> None:
        super().__init__()
        self.l, self.d, self.n_heads = l, 2 * l + 1, n_heads
        self.value_scalars, self.self_mask, self.precision = config.value_scalars, config.self_mask, config.precision
        copies, scalars = channels[l], channels[0]
        self.query_HC = matrix(n_heads, copies)
        self.key_HC = matrix(n_heads, copies)
        self.log_sigma = matrix(2 * n_heads, scalars, gain=0.0)
        self.value_scalar = matrix(n_heads * self.value_scalars, scalars)
        if l:
            self.value_HC = matrix(n_heads, copies)
        self.temperature = Temperature([self.d] * n_heads, config.kappa, config.kappa_mode)
        position_N = torch.arange(window)
        order_H = (torch.arange(n_heads) + 0.5) / n_heads
        self.rope, self.alibi = bool(l and config.rope), config.alibi
        self.along_HNd: Tensor
        self.across_HNd: Tensor
        self.position_N: Tensor
        if self.rope:  # radians per position from about 1 to about 1/100
            rope_HNdd = rope_frames(l, position_N, 100.0**-order_H)
            # Around y only the pairs (m, -m) mix, which stand mirrored: x R is two products, not a matrix each.
            across_HNd = rope_HNdd.flip(-2).diagonal(dim1=-2, dim2=-1).clone()
            across_HNd[..., l] = 0
            self.register_buffer("along_HNd", rope_HNdd.diagonal(dim1=-2, dim2=-1).clone(), persistent=False)
            self.register_buffer("across_HNd", across_HNd, persistent=False)
        if self.alibi:  # nats per position, from about 2 to about 1/32 at the start
            self.log_slope_H = declare(nn.Parameter((1 - 6 * order_H) * math.log(2)), "log_kappa")
            self.register_buffer("position_N", position_N.float(), persistent=False)

    def reads(self) -> list[Tensor]:
        """The matrices from scalars of the stream to log variances, carried scalars and, for l = 0, means."""
        return [self.log_sigma, self.value_scalar, *(() if self.l else (self.query_HC, self.key_HC))]

    def project(self, h: Stream, read_BNR: Tensor, frame_BNdd: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log variances (B, N, 2 H), carried scalars (B, H, N, S'), and means in each token's own frame (B, 3 H or
        for scalars 2 H, N, d): query, key, value. read_BNR: what `reads` gives, side by side."""
        parts = read_BNR.split([len(weight) for weight in self.reads()], -1)
        log_sigma, value = bounded_log_sigma(parts[0]), parts[1].unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        if not self.l:
            return log_sigma, value, torch.cat(parts[2:], -1).transpose(1, 2)[..., None]
        means_BNdH = wide(mix(h[self.l], torch.cat([self.query_HC, self.key_HC, self.value_HC])))
        if frame_BNdd is not None:
            with torch.autocast(frame_BNdd.device.type, enabled=False):
                means_BNdH = matmul(frame_BNdd.mT, means_BNdH)
        return log_sigma, value, means_BNdH.permute(0, 3, 1, 2)

    def features(self, log_sigma: Tensor, means_BHNd: Tensor, frame_BNdd: Tensor | None, start: int) -> Prepared:
        """Query and key features, in float32, of the beliefs whose means are side by side, queries' before keys'."""
        stop = start + means_BHNd.size(2)
        log_s, log_t = log_sigma.transpose(1, 2)[..., None].chunk(2, 1)
        kappa_H1 = self.temperature()[:, None]
        means = means_BHNd.unflatten(1, (2, self.n_heads))
        if self.rope:
            means = means * self.along_HNd[:, start:stop] + means.flip(-1) * self.across_HNd[:, start:stop]
        q_BHNd, p_BHNd = means.unbind(1)
        q_square, p_square = means.square().sum(-1, keepdim=True).unbind(1)
        precision = torch.exp(-log_t)
        last = p_square * precision + self.d * log_t
        query = torch.cat([q_square + self.d * log_s.exp(), q_BHNd, torch.ones_like(log_s)], -1)
        body = torch.cat([precision, -2 * precision * p_BHNd], -1)
        key = biased = torch.cat([body, last], -1)
        if self.alibi:  # the logit gains slope * j
            own_kappa_H = kappa_H1[:, 0] / self.temperature.scale_H  # a head made uniform loses its slope too
            gain_H1 = (2 * self.log_slope_H.exp() * own_kappa_H)[:, None]
            biased = torch.cat([body, last - (gain_H1 * self.position_N[start:stop])[..., None]], -1)
        row_term = -0.5 * self.d * (1 + log_s[..., 0])
        return Prepared(query, key, biased, row_term, row_term / kappa_H1, kappa_H1, frame_BNdd, Centre())
