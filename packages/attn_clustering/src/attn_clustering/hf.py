"""Exchange with Hugging Face: runs as Qwen3ForCausalLM folders, and back.

A model without positions (DroPE, NoPE) needs no patched code: its export asks for linearly scaled rotary positions with
a factor of 1e30, so that every angle is below 1e-27, where in float32 cosines are 1 and sines too small to matter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from lab_shared.config import from_json, to_json
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from torch import Tensor

from attn_clustering.config import ModelConfig, RunConfig
from attn_clustering.data.settings import BOS, EOS, PAD
from attn_clustering.folders import check_new_folder
from attn_clustering.model import Transformer, n_parameters
from attn_clustering.runs import load_run, load_sequences

NO_ROTATION = 1e30
_TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.o_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def weight_names(layers: int) -> dict[str, str]:
    """Our name of every parameter -> Qwen3's."""
    blocks = {
        f"blocks.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(layers)
        for ours, theirs in _BLOCK.items()
    }
    return {**_TOP, **blocks}


def qwen3_config(config: ModelConfig, *, rope_on: bool, max_len: int) -> dict[str, Any]:
    """config.json of the equal Qwen3ForCausalLM; `max_len` is the longest context it was trained on."""
    scaling = {"rope_type": "default"} if rope_on else {"rope_type": "linear", "factor": NO_ROTATION}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        # transformers 5 reads rope_parameters, version 4 the other two.
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope_on else scaling,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def export_model(model: Transformer, out: Path, *, max_len: int) -> Path:
    """Write OUT/config.json and OUT/model.safetensors (float32); returns OUT. Raises StorageError."""
    import safetensors.torch

    make_folder(out)
    state = model.state_dict()
    names = weight_names(model.config.layers)
    tensors = {theirs: state[ours].detach().to("cpu", torch.float32).contiguous() for ours, theirs in names.items()}
    atomic_write(out / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    text = json.dumps(qwen3_config(model.config, rope_on=model.rope_on, max_len=max_len), indent=2)
    atomic_write(out / "config.json", text + "\n")
    return out


def export_hf(run: Path, out: Path) -> Path:
    """A finished run as a folder for `Qwen3ForCausalLM.from_pretrained`, with its tokenizer if it has one.

    README.md in it says where the model comes from and, for one without positions, how that is expressed. Raises
    UserError when `run` is not finished or `out` is not empty, StorageError when the disk refuses.
    """
    check_new_folder(out)  # config.json is what runs and exports both have: an export into a run would end the run
    model, config = load_run(run)
    language, corpus = config.data.language, config.data.corpus
    tokenizer = Path(corpus, "tokenizer.json") if language is None and corpus else None
    longest = load_sequences(config.data, "val", "cpu", 0, 1).tokens_NT.size(1)
    if tokenizer is not None and not tokenizer.is_file():
        raise UserError(f"{tokenizer} is missing: the corpus of this run was moved or deleted")
    export_model(model, out, max_len=longest)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, out / "tokenizer.json")
    atomic_write(out / "README.md", _card(model, config))
    return out


def import_hf(folder: Path) -> Transformer:
    """The model of a Qwen3ForCausalLM folder (one of ours, or any with tied embeddings and without biases).

    Raises UserError for another architecture, missing or misshapen weights, or a kind of rotary positions that
    Mini-Qwen3 does not have.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is no Hugging Face model folder")
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, rope_on = _model_config(theirs, folder)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / 'config.json'} is not the configuration of a Qwen3 model ({reason})") from error
    weights = _read_weights(folder)
    held = sum(x.numel() for name, x in weights.items() if name != "lm_head.weight")
    if min(vars(config).values()) <= 0 or config.layers > len(weights) or n_parameters(config) > 2 * held:
        raise UserError(f"{folder}: its config.json asks for {n_parameters(config):,} parameters, there are {held:,}")
    model = Transformer(config)
    model.rope_on = rope_on
    state = model.state_dict()
    for ours, name in weight_names(config.layers).items():
        if name not in weights or weights[name].shape != state[ours].shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise UserError(f"{folder}: {name} should have shape {tuple(state[ours].shape)}, found {found}")
        state[ours].copy_(weights.pop(name))
    weights.pop("lm_head.weight", None)  # tied: some writers repeat it
    if weights:
        raise UserError(f"{folder}: {next(iter(weights))} has no place in a Mini-Qwen3")
    return model


def import_run(folder: Path, out: Path, like: RunConfig) -> Path:
    """A Hugging Face folder as a finished run in `out`, for `analyze`; `like` says on which data to look at it.

    Raises UserError as `import_hf`, or when `out` is not empty.
    """
    from dataclasses import replace

    from lab_shared.checkpoint import save_weights

    check_new_folder(out)
    model = import_hf(folder)
    if like.data.language is not None and like.data.language.vocab > model.config.vocab:
        raise UserError(
            f"{folder} knows {model.config.vocab} tokens, {like.experiment} has {like.data.language.vocab}: "
            "choose another --experiment"
        )
    make_folder(out)
    config = replace(
        like,
        attention="gqa" if model.config.kv_heads < model.config.heads else "mha",
        model=replace(model.config, rope=model.rope_on),
        phase="rope" if model.rope_on else "nope",
    )
    save_weights(out / "weights.safetensors", model)
    atomic_write(out / "config.json", to_json(config))
    atomic_write(out / "DONE.json", json.dumps({"summary": {"name": config.name, "imported": str(folder)}}) + "\n")
    return out


def _model_config(theirs: dict[str, Any], folder: Path) -> tuple[ModelConfig, bool]:
    wanted = {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "silu"}
    for key, value in wanted.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{folder}: {key} is {theirs[key]!r:.100}, a Mini-Qwen3 has {value!r}")
    rope = theirs.get("rope_parameters") or {**(theirs.get("rope_scaling") or {}), "rope_theta": theirs["rope_theta"]}
    kind = (rope.get("rope_type", "default"), rope.get("factor"))
    if kind[0] != "default" and kind != ("linear", NO_ROTATION):
        raise UserError(f"{folder}: rotary positions of kind {kind[0]!r:.100} are not supported, only 'default'")
    fields = {
        "vocab": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "layers": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "kv_heads": theirs["num_key_value_heads"],
        "head_dim": theirs["head_dim"],
        "mlp": theirs["intermediate_size"],
        "rope_theta": rope["rope_theta"],
        "norm_eps": theirs["rms_norm_eps"],
    }
    return from_json(ModelConfig, json.dumps(fields)), kind[0] == "default"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    import safetensors.torch

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no safetensors file")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is damaged or no safetensors file: {error}") from error
    return weights


def _card(model: Transformer, config: RunConfig) -> str:
    lines = [f"# {config.name}", "", f"Mini-Qwen3 of the experiment {config.experiment}, exported by attn-clustering."]
    lines += ["Load it with `transformers.Qwen3ForCausalLM.from_pretrained(FOLDER)`.", ""]
    if not model.rope_on:
        lines += [
            "This model has **no positional encoding**. transformers has no such setting, so config.json asks for",
            f"linearly scaled rotary positions with factor {NO_ROTATION:g}: every angle is practically zero, every",
            "rotation the identity. Keep that entry; with ordinary rotary positions it is another model.",
            "",
        ]
    return "\n".join(lines)
