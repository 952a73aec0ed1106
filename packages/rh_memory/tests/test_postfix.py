"""Memory behind the data: its layout, its isolation, its groups, and every intervention the diagnostics use."""

from dataclasses import replace

import pytest
import torch
from lab_shared.attention import Mask
from lab_shared.testing import assert_parity
from rh_memory.config import ModelConfig
from rh_memory.data.windows import WindowBatch
from rh_memory.mdn import Mixture
from rh_memory.models import Context, build_model

M = 4
ORIGINAL = ModelConfig(memory="postfix", context=48, d_model=32, layers=2, heads=2, dropout=0.0, n_memory=M)
MODERN = replace(ORIGINAL, pos="rope", inputs="height", values="prime_rotary", readouts=4, seed_slots=True)
SYMMETRIC = replace(MODERN, slot_id_mode="off", slot_position=False, readout_weight="uniform", causal_slots=False)


def windows(n=3, width=49, seed=0):
    s = torch.rand(n, width, generator=torch.Generator().manual_seed(seed)) + 0.5
    gamma = (s.double().cumsum(1) - s[:, :1]) * 0.55
    return WindowBatch(s, torch.full_like(s, 11.0), gamma)


def awake(config, seed=0):
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.15 * torch.randn_like(p))
    return model.eval()


def training_pass(model, batch):
    return model(Context.of(batch), model.training_mask(batch.s_BW.size(1) - 1, torch.device("cpu")))


def cut(batch, t):
    """The same windows with only the first t spacings in view."""
    return WindowBatch(batch.s_BW[:, : t + 1], batch.log_height_BW[:, : t + 1], batch.gamma_BW[:, : t + 1])


# --- layout ---------------------------------------------------------------------------------------


def test_one_group_is_the_seed_s_layout():
    """[s_1 .. s_T, M0 .. M3] with positions 0 .. T+3 under a plain causal mask, pooled by softmax weights."""
    model, batch = awake(ORIGINAL), windows()
    x = model.backbone.embed_data(batch.s_BW[:, :-1, None])
    slots = (model.slots.content_MD + model.slots.identity_MD).expand(3, -1, -1)
    x = torch.cat([x, slots], 1) + model.backbone.position.weight
    rotary = model.backbone.rotary(torch.arange(52), torch.zeros(3, 52, dtype=torch.float64))
    for block in model.backbone.blocks:
        x, _ = block(x, rotary, Mask.causal())
    h = model.backbone.norm(x)[:, -M:]
    pooled = (h * model.readout_M.softmax(0)[:, None]).sum(1)
    assert_parity(model.predict(batch, "last").loc, model.head(pooled)[1], atol=1e-5)
    assert_parity(training_pass(model, batch).mixture[1][:, 0], model.head(pooled)[1], atol=1e-5)


@pytest.mark.parametrize(
    "config", [replace(ORIGINAL, readouts=4), MODERN, SYMMETRIC], ids=["original", "modern", "symmetric"]
)
def test_groups_equal_separate_passes(config):
    """With learned positions a group's slots stand at t_r + m, as in a model whose window ends there."""
    model, batch = awake(config), windows()
    together = training_pass(model, batch).mixture
    assert model.readout_contexts(48) == [12, 24, 36, 48]
    for r, t in enumerate(model.readout_contexts(48)):
        alone = model.predict(cut(batch, t), "last")
        assert_parity(together[1][:, r], alone.loc, atol=2e-5)
        assert_parity(together[2][:, r], alone.scale, atol=2e-5)


def test_positions_of_every_kind_agree():
    model, batch = awake(MODERN), windows()
    everywhere = model.predict(batch, "all")
    assert everywhere.batch_shape == (3, 48)
    assert_parity(model.predict(batch, "readouts").loc, everywhere.loc[:, [11, 23, 35, 47]], atol=2e-5)
    assert_parity(model.predict(batch, [7, 48]).loc, everywhere.loc[:, [6, 47]], atol=2e-5)
    assert_parity(model.predict(batch, "last").loc, everywhere.loc[:, 47], atol=2e-5)
    with pytest.raises(ValueError, match="numbers from 1 to 48"):
        model.predict(batch, [49])


# --- isolation ------------------------------------------------------------------------------------


def test_data_never_sees_memory():
    model, batch = awake(MODERN), windows()
    data = Context.of(batch)
    tokens = model.slots().detach().requires_grad_(True)
    m, t = M, 48
    position = torch.cat([torch.arange(t), torch.arange(t, t + m)])
    gamma = torch.cat([data.gamma_BT, data.gamma_BT[:, -1:].expand(-1, m)], 1)
    x = torch.cat([model.backbone.embed(data), tokens.expand(3, -1, -1)], 1)
    h = model.backbone(x, position, gamma, Mask.memory_postfix(t, m, positions=[t]))
    h[:, :t].sum().backward()
    assert torch.count_nonzero(tokens.grad) == 0


def test_groups_never_see_each_other():
    model, batch = awake(MODERN), windows()
    batch.s_BW.requires_grad_(True)
    first = training_pass(model, batch).mixture[1][:, 0]
    first.sum().backward()
    assert torch.count_nonzero(batch.s_BW.grad[:, :12]) == 3 * 12
    assert torch.count_nonzero(batch.s_BW.grad[:, 12:]) == 0


# --- identity -------------------------------------------------------------------------------------


def test_permuting_the_whole_identity_and_the_content_changes_nothing():
    """Slots are their content, identity, place and weight, and nothing else."""
    model, batch = awake(MODERN), windows()
    perm = torch.tensor([2, 0, 3, 1])
    content = model.slot_embeddings()[0][perm]
    h = model.slot_states(batch, id_perm=perm, position_perm=perm, content=content)
    assert_parity(h, model.slot_states(batch)[:, perm], atol=2e-5)
    permuted = model.readout(h, weight_perm=perm)
    assert_parity(permuted.loc, model.predict(batch, "last").loc, atol=2e-5)


@pytest.mark.parametrize("part", ["id_perm", "position_perm", "weight_perm"])
def test_each_part_of_the_identity_matters_alone(part):
    model, batch = awake(MODERN), windows()
    perm = torch.tensor([1, 2, 3, 0])
    change = (model.predict(batch, "last", **{part: perm}).loc - model.predict(batch, "last").loc).abs().max()
    assert change > 1e-3


def test_a_symmetric_memory_has_no_identity_at_all():
    model, batch = awake(SYMMETRIC), windows()
    perm = torch.tensor([3, 1, 0, 2])
    content = model.slot_embeddings()[0]
    before = model.predict(batch, "last")
    assert_parity(model.predict(batch, "last", content=content[perm]).loc, before.loc, atol=2e-5)
    for part in ("id_perm", "position_perm", "weight_perm"):
        assert_parity(model.predict(batch, "last", **{part: perm}).loc, before.loc, atol=2e-5)


def test_permuted_identities_are_seeded_outside_training():
    config = replace(MODERN, slot_id_mode="permute_per_batch")
    model, batch = awake(config), windows()
    assert_parity(model.predict(batch, "last").loc, model.predict(batch, "last").loc, atol=0)
    other = awake(replace(config, eval_perm_seed=1))
    assert (other.predict(batch, "last").loc - model.predict(batch, "last").loc).abs().max() > 1e-4
    fixed = awake(replace(config, eval_slot_id_mode="fixed"))
    identity = torch.arange(M)
    assert_parity(fixed.predict(batch, "last").loc, model.predict(batch, "last", id_perm=identity).loc, atol=1e-6)


def test_averaging_over_permutations_averages_densities():
    config = replace(MODERN, slot_id_mode="permute_per_batch", eval_perm_average=3)
    model, batch, y = awake(config), windows(), torch.full((3,), 0.9)
    generator = torch.Generator().manual_seed(config.eval_perm_seed)
    perms = [torch.randperm(M, generator=generator) for _ in range(3)]
    mean = torch.stack([model.predict(batch, "last", id_perm=p).log_prob(y).exp() for p in perms]).mean(0)
    assert_parity(model.predict(batch, "last").log_prob(y).exp(), mean, atol=1e-5)


# --- ablation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [0, 3])
def test_removing_a_slot_equals_a_model_without_it(removed):
    """In the symmetric memory, where the other slots' places do not shift; out of keys and of pooling."""
    model, batch = awake(SYMMETRIC), windows()
    left = [i for i in range(M) if i != removed]
    smaller = build_model(replace(SYMMETRIC, n_memory=M - 1)).eval()
    weights = dict(model.state_dict())
    weights["slots.content_MD"] = weights["slots.content_MD"][left]
    weights["readout_M"] = weights["readout_M"][left]
    smaller.load_state_dict(weights)
    remove = torch.zeros(M, dtype=torch.bool).index_fill(0, torch.tensor([removed]), True)
    expected = smaller.predict(batch, "last").loc
    assert_parity(model.predict(batch, "last", remove=remove).loc, expected, atol=2e-5)
    h = model.slot_states(batch, remove=remove)
    assert torch.count_nonzero(h[:, removed]) == 0
    assert_parity(model.readout(h, keep=~remove).loc, expected, atol=2e-5)


def test_removal_under_a_permutation_removes_the_slot_and_not_its_place():
    model, batch = awake(MODERN), windows()
    remove, perm = torch.tensor([False, True, False, False]), torch.tensor([2, 3, 0, 1])
    content, changed = model.slot_embeddings()[0], model.slot_embeddings()[0].clone()
    changed[1] = 9.0  # what is removed cannot matter
    with_it = model.slot_states(batch, remove=remove, position_perm=perm, content=content)
    assert_parity(with_it, model.slot_states(batch, remove=remove, position_perm=perm, content=changed), atol=1e-5)


def test_the_legacy_ablation_removes_nothing():
    """Zeroing the input embedding leaves a slot that still attends to the data and is still pooled."""
    model, batch = awake(MODERN), windows()
    off = model.predict(batch, "last", legacy_slot_off=2).loc
    really = model.predict(batch, "last", remove=torch.tensor([False, False, True, False])).loc
    assert (off - really).abs().max() > 1e-3
    h = model.slot_states(batch, legacy_slot_off=2)
    assert h[:, 2].abs().max() > 0.1


def test_readout_over_subsets():
    model, batch = awake(MODERN), windows()
    h = model.slot_states(batch)
    keep = torch.tensor([[True, False, True, False]])
    weight = model.readout_M[[0, 2]].softmax(0)
    pooled = h[:, 0] * weight[0] + h[:, 2] * weight[1]
    assert_parity(model.readout(h, keep=keep).loc, model.head(pooled)[1], atol=1e-5)
    assert isinstance(model.readout(h), Mixture)


def test_slot_dropout_pools_over_what_is_left_while_training():
    config = replace(MODERN, slot_dropout=0.9)
    model, batch = awake(config), windows(64)
    quiet = training_pass(model, batch).mixture[1]
    model.train()
    noisy = training_pass(model, batch).mixture[1]
    assert torch.isfinite(noisy).all()
    assert (noisy - quiet).abs().max() > 1e-2
    model.eval()
    assert_parity(training_pass(model, batch).mixture[1], quiet, atol=0)


def test_content_is_capped_or_zeroed():
    model = awake(replace(MODERN, norm_cap=0.5))
    content, _ = model.slot_embeddings()
    assert content.detach().norm(dim=1).max() <= 0.5 + 1e-6
    zeroed = awake(replace(MODERN, content_mode="zeroed"))
    assert torch.count_nonzero(zeroed.slot_embeddings()[0]) == 0
    assert "slots.content_MD" not in dict(zeroed.named_parameters())


def test_attention_profile_is_of_the_slots_and_normalised():
    model = awake(MODERN)
    profile = model.attention_profile(windows())
    assert profile.shape == (2, 2, M, 48)
    total = profile.sum(-1)  # the rest is what slots pay to themselves and to earlier slots
    assert 0.3 < float(total.min()) <= float(total.max()) < 1
    assert (total[:, :, 0] > total[:, :, 3]).any()


# --- many changes at once -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ORIGINAL,
        replace(MODERN, slot_id_mode="permute_per_batch", eval_perm_average=2),
        replace(MODERN, causal_slots=False, slot_position=False),
    ],
)
def test_changes_side_by_side_equal_predictions_one_by_one(config):
    model, batch = awake(config), windows()
    perm, content = torch.tensor([2, 0, 3, 1]), torch.randn(M, 32)
    remove = torch.tensor([False, True, False, True])
    changes = [
        {},
        {"remove": remove},
        {"id_perm": perm},
        {"position_perm": perm, "remove": remove},
        {"id_perm": perm, "position_perm": perm, "weight_perm": perm.flip(0), "content": content},
        {"legacy_slot_off": 1},
    ] * 7  # more groups than one pass takes
    y = batch.s_BW[:, -1]
    together = model.compare(batch, changes).log_prob(y[:, None])
    assert together.shape == (3, 42)
    for change, found in zip(changes[:6], together.unbind(1), strict=False):
        assert_parity(found, model.predict(batch, "last", **change).log_prob(y), atol=5e-5)
    assert_parity(together[:, 36:], together[:, :6], atol=5e-5)
    assert (together[:, 1:6] - together[:, :1]).abs().amax(0).min() > 1e-4


@pytest.mark.gpu
def test_changes_side_by_side_on_a_gpu():
    """float32 without compilation: complex rotations and the written-out mask."""
    model, batch = awake(MODERN), windows(64)
    perm = torch.tensor([2, 0, 3, 1])
    changes = [{}, {"remove": torch.tensor([False, True, False, True])}, {"id_perm": perm, "position_perm": perm}]
    y = batch.s_BW[:, -1]
    expected = model.compare(batch, changes).log_prob(y[:, None])
    there = [{name: x.cuda() for name, x in change.items()} for change in changes]
    found = model.cuda().compare(batch.to("cuda"), there).log_prob(y[:, None].cuda())
    assert_parity(found.cpu(), expected, atol=1e-3)
