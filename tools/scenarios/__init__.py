"""What `make faults` kills: trainings, checkpoints, caches, downloads and generators, each as work that can be redone.

Everything is tiny and on one CPU thread. Packages are imported by the scenario that needs them, before the processes
that get killed are forked.
"""

from __future__ import annotations

from collections.abc import Callable

from scenarios import making, training
from scenarios.base import Scenario

SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "train-iceaggr": training.train_iceaggr,
    "train-attn-clustering": training.train_attn_clustering,
    "train-gauge-attn": training.train_gauge_attn,
    "train-rh-memory": training.train_rh_memory,
    "checkpointing": training.checkpointing,
    "iceaggr-simulate": making.simulate,
    "iceaggr-cache": making.cache,
    "rh-memory-zeros": making.zeros,
    "rh-memory-gue": making.gue,
    "attn-clustering-corpus": making.corpus,
    "gauge-attn-download": making.download,
}
