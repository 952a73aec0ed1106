"""Exchange with transformers: the same logits, with and without positions, and back."""

import json
from dataclasses import replace

import pytest
import torch
from attn_clustering import hf, runs, train
from attn_clustering.config import ModelConfig
from attn_clustering.experiments import EXPERIMENTS, run_config, with_attention
from attn_clustering.model import build_model
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity

TINY = ModelConfig(vocab=97, d_model=48, layers=3, heads=6, kv_heads=6, head_dim=8, mlp=80)
TOKENS = torch.arange(3 * 40).reshape(3, 40) * 31 % 97


def varied(config, *, rope_on):
    """A model with attention far from uniform and gains other than one."""
    model = build_model(config, 1)
    model.rope_on = rope_on
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape, generator=generator)
            elif p is not model.embed.weight:
                p *= 5
    return model


@pytest.mark.filterwarnings("default")  # those of other people's code
@pytest.mark.parametrize("rope_on", [True, False])
@pytest.mark.parametrize("attention", ["mha", "gqa"])
def test_logits_equal_those_of_transformers(attention, rope_on, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = varied(with_attention(TINY, attention), rope_on=rope_on)
    hf.export_model(model, tmp_path, max_len=64)
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_parity(model(TOKENS), theirs(TOKENS).logits, atol=1e-5)
        model.rope_on = not rope_on
        assert (model(TOKENS) - theirs(TOKENS).logits).abs().max() > 1e-2  # the test can tell the two apart


@pytest.mark.filterwarnings("default")
def test_a_model_saved_by_transformers_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    written = hf.qwen3_config(with_attention(TINY, "gqa"), rope_on=True, max_len=64)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**written)).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_parity(hf.import_hf(tmp_path)(TOKENS), theirs(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("rope_on", [True, False])
def test_export_and_import_are_inverse(rope_on, tmp_path):
    model = varied(with_attention(TINY, "gqa"), rope_on=rope_on)
    back = hf.import_hf(hf.export_model(model, tmp_path, max_len=64))
    assert back.rope_on == rope_on
    assert torch.equal(back(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "'yarn' are not supported"),
        ({"intermediate_size": 81}, "should have shape"),
        ({"num_hidden_layers": 2}, "no place in a Mini-Qwen3"),
        ({"num_hidden_layers": 4}, "found nothing"),
    ],
)
def test_other_models_are_refused_with_the_reason(change, message, tmp_path):
    hf.export_model(build_model(TINY, 0), tmp_path, max_len=64)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        hf.import_hf(tmp_path)


def test_a_run_goes_out_and_comes_back(tmp_path):
    smoke = EXPERIMENTS["smoke"][1]
    config = run_config(
        replace(smoke, optim=replace(smoke.optim, steps=1, warmup=1, eval_sequences=16)), "gqa", "shuffled", 0
    )
    train.train(config, tmp_path / "run", device="cpu")
    out = hf.export_hf(tmp_path / "run", tmp_path / "hf")
    assert "no positional encoding" not in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 64
    back = hf.import_run(out, tmp_path / "back", config)
    a, b = runs.load_run(tmp_path / "run")[0], runs.load_run(back)[0]
    tokens = TOKENS % 128
    assert torch.equal(a(tokens), b(tokens))
    with pytest.raises(UserError, match="not empty"):
        hf.import_run(out, tmp_path / "back", config)
    with pytest.raises(UserError, match="knows 128 tokens"):
        hf.import_run(out, tmp_path / "other", run_config(EXPERIMENTS["sanity"][1], "mha", "shuffled", 0))
