"""Linear probes for the topic of a token, at the embedding and after every block.

Shape suffixes: G probed places (the embedding, then after each block), S sequences, T positions, P probed positions,
D features, K topics.

Sequences, not tokens, are split into training, validation and test: neighbours in a sequence share their topic, and a
probe that has seen one has all but seen the other. The L2 penalty is chosen per place by validation cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lab_shared.errors import UserError
from torch import Tensor

from attn_clustering.analysis.regression import fit

L2_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Split(NamedTuple):
    train: slice
    validation: slice
    test: slice


def split_sequences(n_sequences: int) -> Split:
    """70 / 10 / 20 percent in order: held-out sequences are independent draws.

    Raises UserError for fewer than 10 sequences.
    """
    if n_sequences < 10:
        raise UserError(
            f"{n_sequences} held-out sequences cannot be split: probes need at least 10; train on data with more "
            "(val_sequences)"
        )
    first, second = n_sequences * 7 // 10, n_sequences * 8 // 10
    return Split(slice(0, first), slice(first, second), slice(second, n_sequences))


@dataclass(frozen=True)
class ProbeResult:
    """Everything about test sequences."""

    weight_GDK: Tensor
    bias_GK: Tensor
    l2_G: Tensor
    correct_SPG: Tensor
    """bool, on the test sequences."""
    permuted_accuracy_G: Tensor
    """Test accuracy of probes trained and tested on labels that belong to other sequences."""
    iterations: int
    gradient: float


def train_probes(features_GSPD: Tensor, topics_SP: Tensor, n_topics: int, seed: int = 0) -> ProbeResult:
    """Fit the probes of all places at once, on the device of the features.

    The labels of the permuted baseline are those of other sequences of the same split, so that runs of topics stay.
    """
    split = split_sequences(len(topics_SP))
    n_grid = len(L2_GRID)
    generator = torch.Generator().manual_seed(seed)
    strangers = torch.cat([s.start + _derangement(s.stop - s.start, generator) for s in split]).to(topics_SP.device)
    permuted_SP = topics_SP[strangers]

    l2_P = torch.tensor([*L2_GRID, 1e-2], device=features_GSPD.device)
    labels_PN = torch.stack([topics_SP[split.train].flatten()] * n_grid + [permuted_SP[split.train].flatten()])
    fitted = fit(features_GSPD[:, split.train].flatten(1, 2).float(), labels_PN, l2_P, n_topics)

    z_GNPK = fitted.logits(features_GSPD[:, split.validation].flatten(1, 2).float())[:, :, :n_grid]
    truth = topics_SP[split.validation].flatten().long()
    nats_GP = z_GNPK.logsumexp(-1).mean(1) - z_GNPK[:, torch.arange(len(truth), device=truth.device), :, truth].mean(0)
    best_G = nats_GP.argmin(1)

    places = torch.arange(len(features_GSPD), device=features_GSPD.device)
    weight_GDK, bias_GK = fitted.weight_GDPK[places, :, best_G], fitted.bias_GPK[places, best_G]
    test_GSPD = features_GSPD[:, split.test].float()
    permuted = fitted.logits(test_GSPD.flatten(1, 2))[:, :, -1].argmax(-1) == permuted_SP[split.test].flatten()
    return ProbeResult(
        weight_GDK=weight_GDK,
        bias_GK=bias_GK,
        l2_G=l2_P[best_G],
        correct_SPG=probe_correct(test_GSPD, weight_GDK, bias_GK, topics_SP[split.test]),
        permuted_accuracy_G=permuted.float().mean(1),
        iterations=fitted.iterations,
        gradient=fitted.gradient,
    )


def probe_correct(features_GSPD: Tensor, weight_GDK: Tensor, bias_GK: Tensor, topics_SP: Tensor) -> Tensor:
    """(S, P, G) bool: whether probes trained elsewhere name the topic."""
    g, s, p, _ = features_GSPD.shape
    logits = features_GSPD.flatten(1, 2).float() @ weight_GDK + bias_GK[:, None]
    return logits.argmax(-1).view(g, s, p).permute(1, 2, 0) == topics_SP[..., None]


def token_baseline(tokens_ST: Tensor, topics_ST: Tensor, vocab: int, n_topics: int, positions: Tensor) -> Tensor:
    """(S, P) bool on the test sequences: the topic most often seen with this very token in the training sequences.

    What a probe can know from a token alone. Unseen tokens get the most frequent topic.
    """
    split = split_sequences(len(tokens_ST))
    pair = tokens_ST[split.train].long() * n_topics + topics_ST[split.train].long()
    count_VK = torch.bincount(pair.flatten(), minlength=vocab * n_topics).view(vocab, n_topics).double()
    prior_K = count_VK.sum(0) / count_VK.sum()
    guess_V = (count_VK + prior_K).argmax(1)
    return guess_V[tokens_ST[split.test][:, positions].long()] == topics_ST[split.test][:, positions]


DISTANCE_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Bins of the boundary response: [0, 1), [1, 2), [2, 4), ... tokens since the topic changed; the last is open."""


def distance_from_change(topics_ST: Tensor) -> Tensor:
    """(S, T) tokens since the topic last changed, 0 at its first token; -1 before the first change.

    Adjacent segments of one topic are one segment.
    """
    position = torch.arange(topics_ST.size(1), device=topics_ST.device).expand(topics_ST.shape)
    changed = torch.zeros_like(topics_ST, dtype=torch.bool)
    changed[:, 1:] = topics_ST[:, 1:] != topics_ST[:, :-1]
    last = torch.where(changed, position, -1).cummax(1).values
    return torch.where(last >= 0, position - last, -1)


def boundary_response(correct_SPG: Tensor, distance_SP: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy (bins, G) by distance from the last topic change, NaN in empty bins, and counts (bins,)."""
    edges = torch.tensor(DISTANCE_EDGES, device=distance_SP.device)
    bin_SP = torch.bucketize(distance_SP, edges, right=True)  # 0 holds the tokens before any change
    member = torch.nn.functional.one_hot(bin_SP.flatten(), len(edges) + 1)[:, 1:].float()
    count = member.sum(0)
    hits = member.T @ correct_SPG.flatten(0, 1).float()
    return hits / count.where(count > 0, torch.nan)[:, None], count


def _derangement(n: int, generator: torch.Generator) -> Tensor:
    """A permutation of n that leaves nothing in place (n > 1): a shuffled cycle."""
    order = torch.randperm(n, generator=generator)
    out = torch.empty_like(order)
    out[order] = order.roll(1)
    return out


def middle_places(n_layers: int) -> range:
    """Probed places after the middle half of the blocks: 3 .. 6 of 8 blocks, 2 .. 3 of 4."""
    return range(n_layers // 4 + 1, max(n_layers // 4 + 2, 3 * n_layers // 4 + 1))


def bench_probes(device: str) -> list[dict[str, Any]]:
    """Seconds to fit probes on features of random noise around topic means, with all penalties and the permuted
    baseline, and to decompose the QK and OV circuits of 64 heads; on a GPU at the size of the first run (9 places,
    82,000 rows, width 512), on a CPU at a 300th of it."""
    from lab_shared.bench import measure

    from attn_clustering.analysis.circuits import Factored

    on_gpu = torch.device(device).type == "cuda"
    places, sequences, positions, width = (9, 1281, 64, 512) if on_gpu else (3, 200, 10, 128)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    topics_SP = torch.randint(5, (sequences, positions), generator=generator, device=device)
    features_GSPD = normal(places, 5, width)[:, topics_SP] * 0.1 + normal(places, sequences, positions, width)
    heads = Factored(normal(64, width, 64), normal(64, width, 64))
    rows = []
    for stage, call, required in (
        (
            f"probes {places} x {sequences * positions} x {width}",
            lambda: train_probes(features_GSPD, topics_SP, 5),
            5.0,
        ),
        (f"svd of 64 circuits {width} x {width}", heads.svd, 1.0),
    ):
        seconds = measure(call, repeats=3, warmup=1, device=device)
        row = {"stage": stage, "seconds": seconds["median_s"], "iqr_s": seconds["iqr_s"], "repeats": 3}
        rows.append(row | {"required": required if on_gpu else None})
    return rows
