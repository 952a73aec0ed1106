"""What is recorded of heads, held against attention matrices."""

import pytest
import torch
from gauge_attn.diagnostics import sharpness
from gauge_attn.measure import attention_maps, head_records, kl_std_per_head, matrix_sharpness
from gauge_attn.models import Practical

WINDOW = 10


@pytest.mark.parametrize("name", ["faithful", "practical"])
def test_alignment_is_the_sum_over_weights_and_divergences(name, make, tokens):
    expected = 0.0
    for m in range(2):  # per layer
        maps = [x for x in attention_maps(make(name), tokens(1)) if x["layer"] == m]
        expected += sum((x["beta"] * x["kl"]).sum() for x in maps) / len(maps) / 2
    assert make(name, "sum")(tokens(1)).alignment.item() == pytest.approx(expected, rel=1e-4)
    assert make(name, "mean")(tokens(1)).alignment.item() == pytest.approx(expected / WINDOW, rel=1e-4)
    assert make(name)(tokens(1)).alignment is None


def test_kl_std_is_that_of_the_dense_matrix(make, tokens):
    model = make("faithful", layers=1)
    stds = kl_std_per_head(model, tokens(1))[0]
    for x in attention_maps(model, tokens(1)):
        rows = [x["kl"][i, :i].std() for i in range(2, WINDOW)]
        l = int(x["label"][1:])
        index = model.irreps.by_l()[l].heads.index(x["head"])
        assert float(stds[l][index]) == pytest.approx(sum(rows) / len(rows), rel=1e-3)


@pytest.mark.parametrize("name", ["faithful", "practical", "gpt", "practical-seeing-itself"])
def test_head_records_are_those_of_the_weights(name, make, tokens):
    model = make(name)
    maps = {(x["layer"], x["head"]): x for x in attention_maps(model, tokens(1))}
    records = head_records(model, tokens(1))
    assert len(records) == len(maps) == 2 * (2 if name == "gpt" else 4)
    for r in records:
        beta = torch.from_numpy(maps[r["layer"], r["head"]]["beta"])[None, None]
        self_mask = name != "gpt" and model_self_mask(model)
        expected = matrix_sharpness(beta, self_mask=self_mask)
        for key, value in expected.items():
            assert r[key] == pytest.approx(value.item(), rel=2e-3, abs=1e-5), (key, r)
        off = beta[0, 0][~torch.eye(WINDOW, dtype=torch.bool)].view(WINDOW, WINDOW - 1)
        assert r["row_std"] == pytest.approx(off.std(1, correction=0).mean().item(), rel=2e-3)


def test_head_records_come_in_the_order_of_the_layout(make, tokens):
    model = make("faithful", spec="1x1e+2x0e+1x1e", layers=1)
    recorded = []
    model(tokens(2), record=recorded)
    records = head_records(model, tokens(2))
    assert [r["label"] for r in records] == model.irreps.labels == ["ℓ1", "ℓ0", "ℓ0", "ℓ1"]
    assert [r["head"] for r in records] == [0, 1, 2, 3]
    for r, i in zip(records, (0, 0, 1, 1), strict=True):
        x = recorded[0][r["l"]]
        alone = sharpness(x.mu[:, [i]], x.sigma[:, [i]], x.frames, x.kappa_H[[i]], self_mask=model.config.self_mask)
        assert r["row_std"] == pytest.approx(alone.row_std.item(), rel=1e-9)
        assert r["kappa"] == pytest.approx(x.kappa_H[i].item())


def model_self_mask(model):
    return model.blocks[0].heads["0"].self_mask if isinstance(model, Practical) else model.config.self_mask
