"""What `make fuzz` feeds: every reader of files that a user may bring, with valid files, and what a right answer is."""

from __future__ import annotations

from collections.abc import Callable

from readers import attn_clustering, gauge_attn, iceaggr, lab, rh_memory
from readers.base import Reader

READERS: dict[str, Callable[[], Reader]] = {
    "kaggle-parquet": iceaggr.kaggle,
    "geometry-csv": iceaggr.geometry,
    "event-cache": iceaggr.cache,
    "checkpoint": lab.checkpoint,
    "weights": lab.weights,
    "config-json": lab.config,
    "run-folder": lab.run_folder,
    "zeros-npy": rh_memory.zeros_file,
    "zeros-tables": rh_memory.zero_tables,
    "gauge-text": gauge_attn.gauge_text,
    "attn-text": attn_clustering.attn_text,
    "prepared-corpus": attn_clustering.prepared_corpus,
    "plan-npz": attn_clustering.plan,
    "gauge-tokenizer": gauge_attn.tokenizer,
    "hugging-face": attn_clustering.hugging_face,
}

ABORTING = {iceaggr.kaggle, attn_clustering.attn_text}
"""Readers of parquet: for some damaged pages polars asks for exabytes, and Rust ends the process (SIGABRT, with a line
on stderr). Nothing in Python can turn that into an error; such cases are counted and listed in the record."""
