"""Topics of paragraphs: given labels, or clusters of embeddings with a report on how stable they are.

Suffix legend: N paragraphs, D embedding dimensions, K topics.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lab_shared.errors import UserError, needs
from torch import Tensor

from attn_clustering.data import counter
from attn_clustering.data.settings import CorpusConfig

NO_TOPIC = 255
"""Topic id of paragraphs that belong to none of the topics kept."""
RESTARTS = 10


@dataclass(frozen=True)
class Topics:
    topic_N: np.ndarray  # uint8
    names: list[str]
    stability: float | None
    """Adjusted Rand index between the clusterings of two independent sets of restarts; None for given labels."""


def assign_topics(
    config: CorpusConfig, texts: Sequence[str], given: Sequence[str | None], is_train: np.ndarray
) -> Topics:
    """A topic for every paragraph. What is fitted sees training paragraphs only; held-out ones join the nearest topic.

    Raises UserError when the labels name fewer topics than `clusters`, or a needed package is missing.
    """
    if config.embedder == "given":
        return _given(config, texts, given, is_train)
    embed = _lsa if config.embedder == "lsa" else _sentence_transformers
    x_ND = torch.from_numpy(embed(config, texts, is_train))
    train_ND = x_ND[torch.from_numpy(is_train)]
    if len(train_ND) < config.clusters:
        raise UserError(f"{len(train_ND)} training paragraphs cannot form clusters={config.clusters}: add text")
    centres_KD = spherical_kmeans(train_ND, config.clusters, seed=config.seed)
    others_KD = spherical_kmeans(train_ND, config.clusters, seed=config.seed, first_restart=RESTARTS)
    topic_N = (x_ND @ centres_KD.T).argmax(dim=1).numpy().astype(np.uint8)

    from sklearn.metrics import adjusted_rand_score

    other_N = (train_ND @ others_KD.T).argmax(dim=1).numpy()
    stability = float(adjusted_rand_score(topic_N[is_train], other_N))
    return Topics(topic_N, [f"cluster {k}" for k in range(config.clusters)], stability)


def spherical_kmeans(
    x_ND: Tensor, clusters: int, *, seed: int, restarts: int = RESTARTS, first_restart: int = 0, iterations: int = 100
) -> Tensor:
    """Unit centres (K, D) that maximise the sum of cosines of unit vectors x to their nearest centre.

    The best of `restarts` runs of Lloyd's iteration from k-means++ starts (Arthur and Vassilvitskii 2007), with
    1 - cosine as the squared distance. The same seed gives the same centres on the same device.
    """
    best_KD, best_score = x_ND[:clusters], -float("inf")
    for restart in range(first_restart, first_restart + restarts):
        rng = np.random.default_rng(counter.key(seed, restart) & (2**63 - 1))
        centres_KD = _plus_plus(x_ND, clusters, rng)
        nearest_N = (x_ND @ centres_KD.T).argmax(dim=1)
        for _ in range(iterations):
            sums_KD = torch.zeros_like(centres_KD).index_add_(0, nearest_N, x_ND)
            # An empty cluster keeps its centre.
            norms_K1 = sums_KD.norm(dim=1, keepdim=True)
            centres_KD = torch.where(norms_K1 > 0, sums_KD / norms_K1.clamp(min=1e-12), centres_KD)
            before_N, nearest_N = nearest_N, (x_ND @ centres_KD.T).argmax(dim=1)
            if torch.equal(nearest_N, before_N):
                break
        score = float((x_ND @ centres_KD.T).max(dim=1).values.double().sum())
        if score > best_score:
            best_KD, best_score = centres_KD, score
    return best_KD


def _plus_plus(x_ND: Tensor, clusters: int, rng: np.random.Generator) -> Tensor:
    chosen = [int(rng.integers(len(x_ND)))]
    distance_N = 1.0 - x_ND @ x_ND[chosen[0]]
    while len(chosen) < clusters:
        weight_N = distance_N.clamp(min=0).double().cumsum(0)
        target = rng.random() * float(weight_N[-1])
        chosen.append(min(int(torch.searchsorted(weight_N, target)), len(x_ND) - 1))
        distance_N = torch.minimum(distance_N, 1.0 - x_ND @ x_ND[chosen[-1]])
    return x_ND[chosen].clone()


def _given(config: CorpusConfig, texts: Sequence[str], given: Sequence[str | None], is_train: np.ndarray) -> Topics:
    words: Tally[str] = Tally()
    for text, topic, train in zip(texts, given, is_train, strict=True):
        if topic and train:
            words[topic] += text.count(" ") + 1
    if len(words) < config.clusters:
        raise UserError(
            f"{config.topic_field!r} names {len(words)} topics with training text, clusters={config.clusters}: "
            "lower clusters"
        )
    names = sorted(sorted(words, key=lambda topic: (-words[topic], topic))[: config.clusters])
    number = {name: k for k, name in enumerate(names)}
    topic_N = np.array([number.get(topic, NO_TOPIC) if topic else NO_TOPIC for topic in given], dtype=np.uint8)
    return Topics(topic_N, names, None)


def _lsa(config: CorpusConfig, texts: Sequence[str], is_train: np.ndarray) -> np.ndarray:
    """TF-IDF of the 30,000 most frequent words, projected on the 128 leading singular vectors; unit length, float32."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    train = [text for text, keep in zip(texts, is_train, strict=True) if keep]
    vectorizer = TfidfVectorizer(max_features=30_000, sublinear_tf=True, stop_words="english", dtype=np.float32)
    try:
        tfidf = vectorizer.fit_transform(train)
    except ValueError as error:  # nothing but stop words
        raise UserError(
            f"the training text has no words to cluster by ({error}): give labels (embedder=given)"
        ) from error
    if min(tfidf.shape) < 2:
        raise UserError(f"{tfidf.shape[0]} training paragraphs of {tfidf.shape[1]} words cannot be clustered: add text")
    svd = TruncatedSVD(min(128, *(n - 1 for n in tfidf.shape)), random_state=config.seed).fit(tfidf)
    return _unit(svd.transform(vectorizer.transform(texts)))


def _sentence_transformers(config: CorpusConfig, texts: Sequence[str], is_train: np.ndarray) -> np.ndarray:
    with needs("embedder=sentence-transformers", "use embedder=lsa, which downloads nothing"):
        from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(config.embedding_model)
    return _unit(model.encode(list(texts), batch_size=256, convert_to_numpy=True, show_progress_bar=True))


def _unit(x_ND: np.ndarray) -> np.ndarray:
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)
