"""Scores of a trained run: the loss on a whole split beside what counting reaches, and what each head is and costs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.arrays import save_arrays
from lab_shared.checkpoint import load_weights
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from lab_shared.progress import Counter
from lab_shared.runs import finished_run, pick_device
from torch.nn import functional as F

from gauge_attn.checks import checked_run
from gauge_attn.config import TrainConfig
from gauge_attn.data import IGNORED, Corpus, Windows, load_corpus, same_text, windows
from gauge_attn.data.induction import vocabulary
from gauge_attn.data.tokenizers import Tokenizer
from gauge_attn.measure import attention_maps, diversity_of, head_records, kl_std_per_head, lines
from gauge_attn.models import GPT, Model, build_model
from gauge_attn.printed import perplexity_text

TOKENIZER = "tokenizer.json"
DIAGNOSED = 8  # windows that sharpness is averaged over
_ABLATED = 1280  # heads x windows that ablations are scored on: many heads are a mean over fewer windows each
_MOST_ABLATED = 64  # windows
_MAPPED = 64  # tokens of the window whose attention the report draws


def autocast(config: TrainConfig, device: torch.device, *, cache: bool = True) -> AbstractContextManager[Any]:
    """The number format of projections and readout; KL features and logits stay in float32. cache: of weights."""
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=cache)


def load_run(run_dir: Path, device: torch.device) -> tuple[TrainConfig, Model, Tokenizer | None]:
    """Configuration, trained model in evaluation mode, and tokenizer (None for the generated language) of a run."""
    run_dir = Path(run_dir)
    config, weights = finished_run(run_dir, TrainConfig, "gauge-attn")
    checked_run(run_dir, config)
    tokenizer = None
    if config.data.data != "induction":
        tokenizer = Tokenizer.read(run_dir / TOKENIZER)
    vocab = tokenizer.vocab if tokenizer else vocabulary(config.data.keys)
    model = build_model(config.model, vocab, config.data.window, config.optim)
    load_weights(weights, model)
    return config, model.to(device).eval(), tokenizer


@torch.no_grad()
def mean_loss(model: Model, data: Windows, config: TrainConfig) -> float:
    """Cross-entropy in nats per target of all windows."""
    device = data.input_WN.device
    at_once = 8 if config.model.route == "dense" else 64 if device.type == "cpu" else 256
    total = torch.zeros((), dtype=torch.float64, device=device)
    for x_BN, y_BN in zip(data.input_WN.split(at_once), data.target_WN.split(at_once), strict=True):
        with autocast(config, device):
            logits_BNV = model(x_BN).logits_BNV
        total += F.cross_entropy(
            logits_BNV.float().flatten(0, 1), y_BN.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return float(total) / int((data.target_WN != IGNORED).sum())


@contextmanager
def ablated(model: Model, layer: int, l: int, index: int, how: str) -> Iterator[None]:
    """The model (not a GPT) with one head "uniform" (kappa infinite for float32) or "removed" (gives zero)."""
    assert not isinstance(model, GPT)
    temperature = model.heads(layer)[l].temperature
    buffer, value = (temperature.scale_H, 1e9) if how == "uniform" else (temperature.gain_H, 0.0)
    buffer[index] = value
    try:
        yield
    finally:
        buffer[index] = 1.0


def ablation_costs(model: Model, data: Windows, config: TrainConfig) -> list[dict[str, Any]]:
    """Per layer and head, what the loss (nats per token) rises by if its attention is made uniform, or it is removed.

    On the first windows only, 64 of them up to 20 heads.
    """
    if isinstance(model, GPT):
        return []
    total = config.model.layers * model.irreps.n_heads
    n_windows = min(_MOST_ABLATED, -(-_ABLATED // total))
    part = Windows(data.input_WN[:n_windows], data.target_WN[:n_windows])
    base = mean_loss(model, part, config)
    groups = model.irreps.by_l()
    costs = []
    with Counter("ablating", total, "heads") as counter:
        for layer in range(config.model.layers):
            for l, group in groups.items():
                for index, head in enumerate(group.heads):
                    cost: dict[str, Any] = {"layer": layer, "head": head, "l": l}
                    for how in ("uniform", "removed"):
                        with ablated(model, layer, l, index, how):
                            cost[how] = mean_loss(model, part, config) - base
                    costs.append(cost)
                    counter.show(len(costs))
    return sorted(costs, key=lambda c: (c["layer"], c["head"]))


def score(model: Model, corpus: Corpus, data: Windows, config: TrainConfig, split: str) -> dict[str, Any]:
    """Loss, perplexity (None beyond the largest float) and bits on a split, each beside its yardsticks.

    Raises UserError for a loss that is not finite.
    """
    loss = mean_loss(model, data, config)
    if not math.isfinite(loss):
        raise UserError(
            f"the loss on the {split} split is {loss}: training went astray; start a new run with a lower learning rate"
        )
    losses = {"model": loss} | corpus.yardsticks(split)
    per_token = corpus.bytes_per_token(split)
    rows = {
        name: {
            "loss": nats,
            "perplexity": _perplexity(nats),
            "bits_per_byte": None if per_token is None else nats / math.log(2) / per_token,
        }
        for name, nats in losses.items()
    }
    return {
        "label": corpus.label,
        "split": split,
        "generated": corpus.generated,
        "n_tokens": int((data.target_WN != IGNORED).sum()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "perplexity": _perplexity(loss),
        "predictors": rows,
    }


def _perplexity(nats: float) -> float | None:
    """exp(nats); None where no float is as large."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else None


def diagnose(model: Model, data: Windows) -> dict[str, Any]:
    """Heads and diversity on the first windows of a split: {"window", "heads", "diversity", "lines"}."""
    tokens_BN = data.input_WN[:DIAGNOSED]
    records = head_records(model, tokens_BN)
    values = None
    if not isinstance(model, GPT):
        values = diversity_of(model, tokens_BN)
        groups = model.irreps.by_l()
        stds = kl_std_per_head(model, tokens_BN[:2])
        for r in records:
            index = groups[r["l"]].heads.index(r["head"])
            r["logit_std"] = float(stds[r["layer"]][r["l"]][index]) / r["kappa"]
    n = tokens_BN.size(1)
    return {"window": n, "heads": records, "diversity": values, "lines": lines(model, records, values, n)}


def write_evaluation(run_dir: Path, model: Model, corpus: Corpus, data: Windows, config: TrainConfig) -> dict[str, Any]:
    """Score and diagnose the validation split; save evaluation.json and maps.npz in the run folder for its report."""
    result = score(model, corpus, data, config, "valid")
    result |= {"diagnosis": diagnose(model, data), "ablation": ablation_costs(model, data, config)}
    maps = attention_maps(model, data.input_WN[:1, :_MAPPED])
    names = [f"layer {m['layer']} head {m['head']} ({m['label']})" for m in maps]
    save_arrays(
        run_dir / "maps.npz",
        names=np.array(names),
        beta=np.stack([m["beta"] for m in maps]).astype(np.float32),
        kl=np.stack([m["kl"] for m in maps]).astype(np.float32),
    )
    atomic_write(run_dir / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def evaluate_run(run_dir: Path, *, split: str, device: str | None = None, ablation: bool = True) -> dict[str, Any]:
    """The same for a run folder, without writing anything; the result carries its table under "text".

    Raises UserError for no finished run, and where its text has changed since it was trained.
    """
    config, model, corpus, data = _load(run_dir, split, device)
    result = score(model, corpus, data, config, split) | {"diagnosis": diagnose(model, data)}
    result["ablation"] = ablation_costs(model, data, config) if ablation else []
    return result | {"text": table(result)}


def diagnose_run(run_dir: Path, *, device: str | None = None) -> dict[str, Any]:
    """`diagnose` for a run folder on its validation split; what is printed stands under "text"."""
    _, model, _, data = _load(run_dir, "valid", device)
    result = diagnose(model, data)
    return result | {"text": "\n".join(result["lines"])}


def _load(run_dir: Path, split: str, device: str | None) -> tuple[TrainConfig, Model, Corpus, Windows]:
    where = pick_device(device)
    config, model, tokenizer = load_run(run_dir, where)
    corpus = load_corpus(config.data, tokenizer)
    same_text(run_dir, corpus)
    return config, model, corpus, windows(corpus, split, where, seed=config.seed)


def table(result: dict[str, Any]) -> str:
    """The result of a run as text: predictors on the same split, then the heads."""
    text = [
        f"{result['n_tokens']:,} {result['split']} tokens, {result['label']}; {result['parameters']:,} parameters",
        f"{'':10}{'nats/token':>12}{'perplexity':>12}{'bits/byte':>12}",
    ]
    for name, row in result["predictors"].items():
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        text.append(f"{name:10}{row['loss']:12.4f}{perplexity_text(row['perplexity']):>12}{bits:>12}")
    text += ["", *result["diagnosis"]["lines"]]
    if result["ablation"]:
        text += ["", "cost of a head in nats per token if its attention is made uniform, or it is removed:"]
        text += [
            f"  layer {c['layer']} head {c['head']} (ℓ{c['l']}): "
            f"uniform {c['uniform']:+.4f}  removed {c['removed']:+.4f}"
            for c in result["ablation"]
        ]
    return "\n".join(text)
