import subprocess
import sys

import pytest
import torch
from gauge_attn.irreps import Irreps
from hypothesis import given, settings
from hypothesis import strategies as st

SEED = [("ℓ0", 5, 1), ("l1", 3, 3), ("ℓ2", 1, 5)]

terms = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 4), st.sampled_from("eo")).map(lambda t: f"{t[0]}x{t[1]}{t[2]}"),
    min_size=1,
    max_size=5,
)


def test_the_two_spellings_of_the_seed_layout_are_equal():
    irreps = Irreps("5x0e + 3x1e + 1x2e")
    assert irreps == Irreps(SEED) == Irreps(irreps)
    assert hash(irreps) == hash(Irreps(SEED))
    assert str(irreps) == "5x0e+3x1e+1x2e"
    assert repr(irreps) == "Irreps('5x0e+3x1e+1x2e')"
    assert (irreps.dim, irreps.n_heads, irreps.lmax, irreps.ls) == (19, 9, 2, [0, 1, 2])
    assert irreps.labels == ["ℓ0"] * 5 + ["ℓ1"] * 3 + ["ℓ2"]
    assert irreps.slices() == [slice(0, 5), slice(5, 14), slice(14, 19)]
    assert [s.stop - s.start for s in irreps.head_slices()] == [1] * 5 + [3] * 3 + [5]


def test_a_term_without_multiplicity_a_padded_label_and_an_empty_term():
    assert Irreps("1o+2x0e") == Irreps("1x1o+0x3e+2x0e")
    assert Irreps("1o") != Irreps("1e")
    assert Irreps([("ℓ0", 1, 1), ("ℓ0_pad", 2, 1)]).labels == ["ℓ0"] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("5x0e+vectors", "'vectors'"),
        ("3x1", "'3x1'"),
        ("-1x0e", "'-1x0e'"),
        ("0x1e", "no components"),
        ([("ℓ1", 3, 5)], "dimension 3, not 5"),
        ([("spin1", 3, 3)], "spin1"),
    ],
)
def test_what_cannot_be_read_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        Irreps(spec)


@given(terms)
@settings(max_examples=15, deadline=None)
def test_any_layout_prints_reads_splits_and_joins(texts):
    irreps = Irreps("+".join(texts))
    assert Irreps(str(irreps)) == irreps
    x = irreps.randn(2, 3)
    assert x.shape == (2, 3, irreps.dim)
    parts = irreps.split(x)
    assert list(parts) == irreps.ls
    assert torch.equal(irreps.join(parts), x)
    groups = irreps.by_l()
    assert sorted(h for group in groups.values() for h in group.heads) == list(range(irreps.n_heads))
    for l, group in groups.items():
        assert parts[l].shape == (2, group.multiplicity, 3, group.d)
        for i, head in enumerate(group.heads):
            assert torch.equal(parts[l][:, i], x[..., irreps.head_slices()[head]])


def test_a_wrong_number_of_components_is_named():
    with pytest.raises(ValueError, match=r"1x1e has 3 components.* 4"):
        Irreps("1x1e").split(torch.zeros(1, 1, 4))


def test_layouts_and_package_need_no_torch():
    code = "import gauge_attn, gauge_attn.irreps as i, sys; i.Irreps('1x1e'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow  # importing e3nn takes seconds
def test_the_layout_is_that_of_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    for spec in ("5x0e+3x1e+1x2e", "2x1o+1x0e+3x2e"):
        ours, theirs = Irreps(spec), o3.Irreps(spec)
        assert (ours.dim, ours.slices(), str(ours)) == (theirs.dim, theirs.slices(), str(theirs))
