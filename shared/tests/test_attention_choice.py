"""Which back end attention takes, what each refuses, and dropout."""

import pytest
import torch
from lab_shared.attention import Mask, attend, choose_backend
from lab_shared.testing import assert_parity

TOTAL = 210
SEGMENTS = Mask.segments(torch.tensor([0, 5, 70, 200]), TOTAL)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def qkv():
    return [torch.randn(1, heads, TOTAL, 16).requires_grad_() for heads in (4, 2, 2)]


def unchanged(score, *_):
    return score


def test_different_numbers_of_queries_and_keys():
    q, (k, v) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 9, 8)
    mask = Mask.dense(torch.rand(2, 1, 1, 9) > 0.5)
    assert_parity(attend(q, k, v, mask, backend="sdpa"), attend(q, k, v, mask, backend="reference"), atol=1e-5)


def test_the_policy():
    q, k, v = qkv()
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    assert choose_backend(q, k, v, Mask.causal()) == "sdpa"
    assert choose_backend(*packed, SEGMENTS) == "sdpa"
    assert choose_backend(*packed, SEGMENTS, score_mod=unchanged) == "sdpa"
    assert choose_backend(q, k, v, Mask.full(), return_lse=True) == "reference"
    assert choose_backend(q, k, v, Mask.full(), return_weights=True) == "reference"


def test_impossible_choices_say_why_and_what_instead():
    q, k, v = qkv()
    for options, message in [
        ({"backend": "sdpa", "return_lse": True}, "no log-sum-exp; use backend='flex'"),
        ({"backend": "sdpa", "score_mod": unchanged}, "no score_mod; pass an additive bias="),
        ({"backend": "sdpa", "return_weights": True}, "use backend='reference'"),
        ({"backend": "flex"}, "no backward on CPU; use backend='sdpa'"),
        ({"backend": "flex", "return_lse": True}, "no log-sum-exp; use backend='reference'"),
        ({"backend": "varlen"}, "varlen runs packed segments"),
        ({"backend": "varlen", "mask": SEGMENTS}, "float16 or bfloat16 on CUDA"),
        ({"backend": "flash"}, "use one of reference, sdpa, flex, varlen"),
        ({"mask": Mask.segments(torch.tensor([0, 4]), 9)}, "of 9 tokens needs as many queries as keys"),
        ({"mask": Mask.dense(torch.ones(3, 1, 1, TOTAL, dtype=torch.bool))}, "does not broadcast"),
        ({"bias": torch.zeros(5, 1)}, "does not broadcast"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, **options)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attend(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))
    with pytest.raises(ValueError, match="one dtype"):
        attend(q, k.half(), v)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("mask", [Mask.full(), Mask.causal()])
def test_dropout_drops_weights_and_keeps_their_mean(backend, mask):
    """With values of one the output is the sum of the weights: 1 on average, and 0 or more than 1 for the first query,
    which under the causal mask sees one key."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, 4, 16, 8)
    v = torch.ones(64, 4, 16, 8)
    out = attend(q, k, v, mask, dropout=0.25, backend=backend)
    assert abs(float(out.mean()) - 1) < 0.02
    if mask.kind == "causal":
        first = out[:, :, 0, 0]
        assert sorted(set(first.flatten().tolist())) == pytest.approx([0.0, 1 / 0.75])
        assert abs(float((first == 0).float().mean()) - 0.25) < 0.1


def test_back_ends_without_dropout_refuse_it():
    q = torch.randn(8, 2, 4)
    segments = Mask.segments(torch.tensor([0, 3, 8]), 8)
    assert choose_backend(q, q, q, segments, dropout=0.1) == "reference"
    for backend in ("sdpa", "flex", "varlen"):
        with pytest.raises(ValueError, match="dropout"):
            attend(q, q, q, segments, dropout=0.1, backend=backend)
