"""Continuing a prompt, one token at a time with cached features: the same forward as in training."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from lab_shared.errors import UserError
from lab_shared.runs import pick_device
from torch import Tensor

from gauge_attn.data.tokenizers import Tokenizer
from gauge_attn.evaluate import autocast, load_run
from gauge_attn.models import Faithful, Model

_COLDEST = 1e-6  # below, float32 logits overflow


@torch.no_grad()
def generate(
    model: Model, tokens_N: Tensor, n_tokens: int, *, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """`tokens_N` and n_tokens more. temperature 0 takes the likeliest token.

    When the window is full, the last half of it is read again and decoding goes on from there.
    """
    cached = not (isinstance(model, Faithful) and model.config.route == "dense")
    tokens_N = tokens_N.clone()
    start = max(0, len(tokens_N) - model.window)
    cache = model.new_cache() if cached else None
    new_N = tokens_N[start:]
    for _ in range(n_tokens):
        logits_V = model(new_N[None], cache=cache).logits_BNV[0, -1].float()
        if temperature == 0:
            next_token = logits_V.argmax(keepdim=True)
        else:
            next_token = torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator)
        tokens_N = torch.cat([tokens_N, next_token])
        new_N = next_token if cached else tokens_N[start:]
        if len(tokens_N) - start > model.window:
            start = len(tokens_N) - model.window // 2
            cache = model.new_cache() if cached else None
            new_N = tokens_N[start:]
    return tokens_N


def generate_text(
    run_dir: Path, prompt: str, *, n_tokens: int, temperature: float, seed: int = 0, device: str | None = None
) -> str:
    """The prompt and its continuation as text.

    Raises UserError for an empty prompt, one that the generated language does not have, and a temperature or a seed
    that cannot be drawn with.
    """
    if temperature != 0 and not _COLDEST <= temperature < math.inf:
        raise UserError(f"--temperature {temperature:g}: give 0 (the likeliest token) or a number from {_COLDEST:g} up")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: give a whole number from 0 to {2**63 - 1}")
    where = pick_device(device)
    config, model, tokenizer = load_run(run_dir, where)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8
        raise UserError(f"--prompt {prompt!r} is no UTF-8 text: {error.reason}") from error
    tokens = _read_pairs(prompt, config.data.keys) if tokenizer is None else tokenizer.encode(prompt).tolist()
    if not tokens:
        raise UserError("--prompt is empty: give at least one token to go on from")
    generator = torch.Generator(where).manual_seed(seed)
    with autocast(config, where):
        tokens_N = generate(
            model, torch.tensor(tokens, device=where), n_tokens, temperature=temperature, generator=generator
        )
    return _write(tokens_N.tolist(), tokenizer, config.data.keys)


def _read_pairs(prompt: str, keys: int) -> list[int]:
    """`k3 v7 k5` of the generated language to symbols."""
    names = {f"k{i}": i for i in range(keys)} | {f"v{i}": keys + i for i in range(keys)}
    words = prompt.split()
    if unknown := [word for word in words if word not in names]:
        raise UserError(
            f"--prompt has {unknown[0]!r}: this run's language is k0 ... k{keys - 1} and v0 ... v{keys - 1}, "
            "a value after every key, such as 'k3 v7 k5 v1 k3'"
        )
    return [names[word] for word in words]


def _write(tokens: list[int], tokenizer: Tokenizer | None, keys: int) -> str:
    if tokenizer is None:
        return " ".join(f"k{t}" if t < keys else f"v{t - keys}" for t in tokens)
    return tokenizer.decode(tokens)
