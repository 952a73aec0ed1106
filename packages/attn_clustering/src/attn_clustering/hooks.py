"""Reading and changing activations of the model under TransformerLens' names, at no cost when off.

The forward pass takes `hooks=None`; then no hook exists, in eager mode as in compiled code. Names (L = layer):

    hook_embed                                                       (B, T, D)
    blocks.L.hook_resid_pre, hook_attn_out, hook_resid_mid, hook_mlp_out, hook_resid_post    (B, T, D)
    blocks.L.attn.hook_q, hook_k, hook_v                             (B, T, heads, C); q, k after QK-Norm, before RoPE
    blocks.L.attn.hook_rot_q, hook_rot_k                             the same as attended: after RoPE where it is on
    blocks.L.attn.hook_attn_scores, hook_pattern                     (B, H, T, T), scores -inf above the diagonal
    blocks.L.attn.hook_z                                             (B, T, H, C)
    blocks.L.mlp.hook_pre, hook_pre_linear, hook_post                (B, T, M)
    ln_final.hook_normalized                                         (B, T, D)

k and v have the key heads (G). In TransformerLens hook_q is before QK-Norm; here the norm is part of the query, because
nothing but the normalised vectors ever meets.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lab_shared.attention import Mask, attend
from lab_shared.files import atomic_write, make_folder
from torch import Tensor

if TYPE_CHECKING:
    from attn_clustering.model import Transformer

BLOCK_HOOKS = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
FINAL_HOOK = "ln_final.hook_normalized"


class HookPoint(NamedTuple):
    """Where a hook function was called."""

    name: str

    def layer(self) -> int:
        """The block's number. Raises ValueError outside the blocks."""
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{self.name} belongs to no layer")
        return int(parts[1])


HookFn = Callable[[Tensor, HookPoint], Tensor | None]
"""Gets an activation and where it is; returns its replacement, or None to leave it."""


class Hook(NamedTuple):
    """The hook functions of a model, seen from a place whose names start with `prefix`."""

    functions: Mapping[str, Sequence[HookFn]]
    prefix: str = ""

    def of_layer(self, layer: int) -> Hook:
        return Hook(self.functions, f"blocks.{layer}.")

    def wants(self, name: str) -> bool:
        return self.prefix + name in self.functions

    def run(self, name: str, x: Tensor) -> Tensor:
        point = HookPoint(self.prefix + name)
        for function in self.functions.get(point.name, ()):
            replaced = function(x, point)
            if replaced is not None:
                x = replaced
        return x


def at(hook: Hook | None, name: str, x: Tensor) -> Tensor:
    """`x` after the hook functions called `name`; x itself when hooks are off."""
    return x if hook is None else hook.run(name, x)


def observed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, hook: Hook) -> Tensor:
    """`attend(q, k, v, mask)` with hook_attn_scores and hook_pattern; the weights are written out only if asked for.

    q (B, H, T, C), k and v (B, G, T, C) -> (B, H, T, C). mask: causal.
    """
    wants_scores = hook.wants("attn.hook_attn_scores")
    if not wants_scores and not hook.wants("attn.hook_pattern"):
        return attend(q, k, v, mask)
    z, pattern = attend(q, k, v, mask, backend="reference", return_weights=True)
    observed = pattern
    if wants_scores:
        group = q.size(1) // k.size(1)
        scores = q.to(pattern.dtype) @ k.to(pattern.dtype).repeat_interleave(group, 1).mT / q.size(-1) ** 0.5
        scores = scores.masked_fill(pattern.new_ones(pattern.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        changed = hook.run("attn.hook_attn_scores", scores)
        observed = pattern if changed is scores else changed.softmax(-1)
    observed = hook.run("attn.hook_pattern", observed)
    if observed is pattern:
        return z
    return (observed @ v.to(observed.dtype).repeat_interleave(q.size(1) // v.size(1), 1)).to(q.dtype)


class Cache(dict[str, Tensor]):
    """Activations by name; cache["pattern", 3] is short for cache["blocks.3.attn.hook_pattern"].

    The short form takes any name's last part without "hook_", and a layer.
    """

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        if isinstance(key, str):
            return super().__getitem__(key)
        short, layer = key
        start, end = f"blocks.{layer}.", f"hook_{short}"
        for name in self:
            if name.startswith(start) and name.rsplit(".", 1)[-1] == end:
                return super().__getitem__(name)
        raise KeyError(f"no {start}...{end} in the cache: it holds {', '.join(self) or 'nothing'}")


def hook_names(model: Transformer) -> list[str]:
    """Every name that the model's forward pass visits, in that order."""
    blocks = [f"blocks.{i}.{name}" for i in range(model.config.layers) for name in BLOCK_HOOKS]
    return ["hook_embed", *blocks, FINAL_HOOK]


def run_with_hooks(
    model: Transformer,
    tokens_BT: Tensor,
    fwd_hooks: Sequence[tuple[str, HookFn]] = (),
    targets_BT: Tensor | None = None,
) -> Tensor:
    """Logits (or the loss, with targets) while functions see, and may replace, activations.

    fwd_hooks: (name, function) pairs; function(activation, point) returns a replacement or None. Several functions of
    one name run in the order given. Raises ValueError for a name the model does not have.
    """
    return model(tokens_BT, targets_BT, _hook(model, fwd_hooks))


def watch(model: Transformer, tokens_BT: Tensor, fwd_hooks: Sequence[tuple[str, HookFn]]) -> None:
    """`run_with_hooks` up to the last block, without logits: a quarter of the work of the model for real text.

    Raises ValueError for a name the model does not have, or has after its blocks.
    """
    hook = _hook(model, fwd_hooks)
    if hook.wants(FINAL_HOOK):
        raise ValueError(f"{FINAL_HOOK} comes after the last block: use run_with_hooks")
    model.residual(tokens_BT, hook)


def run_with_cache(
    model: Transformer,
    tokens_BT: Tensor,
    names: Sequence[str] | Callable[[str], bool] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Cache]:
    """Logits (B, T, V) and activations, detached.

    names: which, as a list or a predicate on names; None keeps all, the (B, H, T, T) ones included. device: where they
    are kept; None is where they are. Raises ValueError for a name the model does not have.
    """
    if names is None or callable(names):
        chosen = [name for name in hook_names(model) if names is None or names(name)]
    else:
        chosen = list(names)
    cache = Cache()

    def keep(x: Tensor, point: HookPoint) -> None:
        cache[point.name] = x.detach() if device is None else x.detach().to(device)

    return run_with_hooks(model, tokens_BT, [(name, keep) for name in chosen]), cache


def save_activations(
    model: Transformer,
    tokens_NT: Tensor,
    out: Path,
    names: Sequence[str],
    *,
    topics_NT: Tensor | None = None,
    first_id: int = 0,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write activations of N sequences to OUT/activations-*.safetensors, one file a batch; returns OUT/index.json.

    A file holds each named activation (n, T, ...) as `dtype`, with tokens and, where given, topics (n, T). The index
    tells the names, their shapes, and for each file the ids of its sequences: first_id, first_id + 1, ... It is written
    last. Raises ValueError for unknown names, StorageError when the disk refuses.
    """
    import safetensors.torch

    _check_names(model, names)
    make_folder(out)
    device = next(model.parameters()).device
    shards: list[dict[str, Any]] = []
    shapes: dict[str, list[int]] = {}
    with torch.no_grad():
        for start in range(0, len(tokens_NT), batch):
            rows = slice(start, start + batch)
            _, cache = run_with_cache(model, tokens_NT[rows].to(device), names, "cpu")
            tensors = {name: x.to(dtype).contiguous() for name, x in cache.items()}
            shapes = {name: list(x.shape[1:]) for name, x in tensors.items()}
            tensors["tokens"] = tokens_NT[rows].to("cpu", torch.int32).contiguous()
            if topics_NT is not None:
                tensors["topics"] = topics_NT[rows].to("cpu", torch.int32).contiguous()
            file = f"activations-{len(shards):05d}.safetensors"
            atomic_write(out / file, safetensors.torch.save(tensors))
            shards.append({"file": file, "first_id": first_id + start, "sequences": len(tensors["tokens"])})
    index = {"dtype": str(dtype).removeprefix("torch."), "shapes": shapes, "rope_on": model.rope_on, "files": shards}
    atomic_write(out / "index.json", json.dumps(index, indent=1) + "\n")
    return out / "index.json"


def _hook(model: Transformer, fwd_hooks: Sequence[tuple[str, HookFn]]) -> Hook:
    functions: dict[str, list[HookFn]] = {}
    for name, function in fwd_hooks:
        functions.setdefault(name, []).append(function)
    _check_names(model, functions)
    return Hook(functions)


def _check_names(model: Transformer, names: Sequence[str] | Mapping[str, Any]) -> None:
    known = hook_names(model)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see attn_clustering.hooks for the list"
            raise ValueError(f"the model has no hook {name!r}: {hint}")
