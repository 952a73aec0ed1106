"""The flat models as they are built: sizes, initial values, optimizers, mistakes."""

import math
from dataclasses import replace

import pytest
from iceaggr.config import ModelConfig
from iceaggr.models.flat import build_model, not_hidden
from lab_shared.optim import split_params
from lab_shared.testing import assert_parity

ARCHS = ("v2", "v1")
pytestmark = pytest.mark.usefixtures("one_thread")


def v2_parameters(c):
    width, d, h, head = 4 + 3 * c.slots, c.d_model, c.d_hidden, c.head_hidden
    projection = {"none": 0, "linear": width * d + d, "mlp": width * d + d + d * d + d}[c.input]
    return projection + d + 2 * c.layers + c.layers * (4 * d * d + 2 * d * h) + d * head + head + 3 * head + 3


SMALL = ModelConfig()
LARGE = ModelConfig(slots=41, input="none", d_model=256, d_hidden=1024, layers=6, head_hidden=1024)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SMALL, 548_107),
        (LARGE, 4_985_103),
        (replace(LARGE, input="linear", d_model=384, d_hidden=1280), 9_884_047),
        (replace(SMALL, slots=41, head_hidden=512), 608_000),
        (replace(SMALL, slots=41, head_hidden=512, input="none"), 592_000),
        (replace(SMALL, input="mlp"), 565_000),
        (replace(LARGE, layers=8), 6_560_000),
        (replace(LARGE, d_model=320, d_hidden=1280, input="linear"), 7_750_000),
        (replace(LARGE, layers=12), 9_700_000),
        (replace(SMALL, arch="v1"), 553_987),
    ],
    ids=["small", "5M", "10M", "linear-K41", "none-K41", "mlp-K16", "7M", "8M", "10M-deep", "v1"],
)
def test_parameter_counts(config, parameters):
    """Exact where the source gives every digit, to the last digit it gives otherwise."""
    count = sum(p.numel() for p in build_model(config, 4 + 3 * config.slots).parameters())
    if config.arch == "v2":
        assert count == v2_parameters(config)
    if parameters % 1000:
        assert count == parameters
    else:
        step = 1000 if parameters < 1_000_000 else 10_000
        assert abs(count - parameters) <= step / 2 + 1


def test_initial_values(random_events, pack, tiny):
    model = tiny("v2", d_model=64, d_hidden=96, heads=4)
    bound = math.sqrt(3 / 64)
    for block in model.blocks:
        assert block.scale_x.item() == 1
        assert block.scale_x0.item() == pytest.approx(0.1)
        assert not block.attention.c_proj.weight.any()
        assert not block.c_proj.weight.any()
        for layer in (block.attention.q, block.attention.k, block.attention.v, block.c_fc):
            assert layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert model.cls_D.std().item() == pytest.approx(0.02, rel=0.5)
    assert not model.head.fc1.bias.any()
    assert model.head.fc1.weight.abs().max() <= math.sqrt(6 / (64 + 16))
    # no block adds anything yet: every event gets the same answer
    v_E3 = model(*pack(random_events([3, 9, 5])))
    assert_parity(v_E3, v_E3[:1].expand(3, 3), atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", ["none", "linear", "mlp"])
def test_every_parameter_has_one_kind_of_optimizer(arch, mode, tiny):
    model = tiny(arch, input=mode)
    split = split_params(model, not_hidden=not_hidden(model))
    names = [*split.muon, *split.decay, *split.no_decay]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(split.muon) == 6 * len(model.blocks)  # q, k, v, c_proj; c_fc, c_proj
    assert all(name.startswith("blocks.") for name in split.muon)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "none", "d_model": 8}, "10 features are wider than d_model = 8"),
        ({"heads": 5}, "d_model = 32 is not a multiple of model.heads = 5"),
        ({"layers": 0}, "model.layers is 0"),
        ({"input": "conv"}, "model.input is 'conv'"),
        ({"checkpoint": True}, "model.checkpoint is an option of arch = hierarchical"),
        ({"max_batch_size": 64}, "model.max_batch_size is an option of arch = hierarchical"),
    ],
)
def test_impossible_models_are_refused(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
