"""Does a head look back at an earlier, non-adjacent segment because it has the same topic?

Shape suffixes: N held-out sequences, P pairs of probing sequences, B pairs of one batch, H heads, T positions, S keys.

A probing sequence has four segments of m tokens, cut from held-out text. Two sequences form a pair:

    recurring  A  B  A' C'
    control    C  B  A' C'

They differ in the first segment alone, token by token: the third returns to the first segment's topic in one, the
fourth in the other. A score is attention to the first segment where its topic is the query's minus where it is not, so
that positions, lags, queries and all other keys are equal. Attention that does not look at content scores exactly 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from lab_shared.errors import UserError
from torch import Tensor


class ProbePairs(NamedTuple):
    recurring_PT: Tensor
    control_PT: Tensor
    segment: int
    """Tokens in a segment, m; T = 4 m."""

    def tokens(self, rows: slice) -> Tensor:
        """(2 B, T): the recurring sequences of these pairs, then their controls."""
        return torch.cat([self.recurring_PT[rows], self.control_PT[rows]])


def probe_pairs(tokens_NT: Tensor, topics_NT: Tensor, segment: int, n_pairs: int, seed: int = 0) -> ProbePairs:
    """Cut windows of one topic from held-out sequences and put them together, topics A, B, C drawn at random.

    Raises UserError when fewer than three topics have two windows of `segment` tokens.
    """
    tokens, topics = tokens_NT.cpu().numpy(), topics_NT.cpu().numpy()
    n, start = _single_topic_windows(topics, segment)
    topic_of_window = topics[n, start]
    windows = {k: np.flatnonzero(topic_of_window == k) for k in np.unique(topic_of_window)}
    windows = {k: index for k, index in windows.items() if len(index) >= 2}
    if len(windows) < 3:
        raise UserError(
            f"{len(windows)} topics have two stretches of {segment} tokens: the A-B-A-C probe needs three; "
            "train on data with more held-out sequences (val_sequences)"
        )
    rng = np.random.default_rng(seed)
    names = np.array(sorted(windows))
    picked = np.empty((n_pairs, 5), dtype=np.int64)  # A, B, A', C', and the control's C
    for row in picked:
        a, b, c = rng.choice(names, 3, replace=False)
        (row[0], row[2]), row[1] = rng.choice(windows[a], 2, replace=False), rng.choice(windows[b])
        row[3], row[4] = rng.choice(windows[c], 2, replace=False)
    cut = tokens[n[picked][..., None], start[picked][..., None] + np.arange(segment)].astype(np.int64)
    recurring = torch.from_numpy(cut[:, [0, 1, 2, 3]].reshape(n_pairs, -1))
    control = torch.from_numpy(cut[:, [4, 1, 2, 3]].reshape(n_pairs, -1))
    return ProbePairs(recurring.to(tokens_NT.device), control.to(tokens_NT.device), segment)


def _single_topic_windows(topics_NT: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(sequence, start) of non-overlapping windows of `length` positions with one topic."""
    position = np.arange(topics_NT.shape[1])
    new = np.ones_like(topics_NT, dtype=bool)
    new[:, 1:] = topics_NT[:, 1:] != topics_NT[:, :-1]
    run_start = np.maximum.accumulate(np.where(new, position, 0), axis=1)
    within = (position - run_start) % length == 0
    fits = within[:, : topics_NT.shape[1] - length + 1]
    fits = fits & (run_start[:, length - 1 :] == run_start[:, : fits.shape[1]])
    sequence, start = np.nonzero(fits)
    return sequence, start


def first_segment_mass(pattern_2BHTS: Tensor, segment: int) -> Tensor:
    """(B, H, 2, 2) mean attention to the first segment: [lag of two or three segments, topic differs or recurs].

    pattern_2BHTS: attention on `ProbePairs.tokens`.
    """
    recurring, control = (x.float()[..., :segment].sum(-1) for x in pattern_2BHTS.chunk(2))
    third, fourth = slice(2 * segment, 3 * segment), slice(3 * segment, 4 * segment)
    two = [control[..., third].mean(-1), recurring[..., third].mean(-1)]
    three = [recurring[..., fourth].mean(-1), control[..., fourth].mean(-1)]
    return torch.stack([torch.stack(two, -1), torch.stack(three, -1)], -2)


def recurrence_score(mass_PLH22: Tensor) -> dict[str, Tensor]:
    """Attention mass gained by a recurring topic, averaged over pairs and both lags.

    recurrence (L, H), recurrence_by_pair (P, L, H), recurrence_mass (L, H, 2, 2): the masses the score is made of.
    """
    by_pair = (mass_PLH22[..., 1] - mass_PLH22[..., 0]).mean(-1)
    return {
        "recurrence": by_pair.mean(0).cpu(),
        "recurrence_by_pair": by_pair.cpu(),
        "recurrence_mass": mass_PLH22.mean(0).cpu(),
    }
