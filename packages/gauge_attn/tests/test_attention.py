import pytest
import torch
from gauge_attn import Centre, FeatureCache, Irreps, kl_attention, kl_attention_irreps
from gauge_attn.reference import dense_kl_attention
from gauge_attn.so3 import frames, frames_for, rope_frames
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_equivariant, assert_parity

F64 = torch.float64
KAPPA = torch.tensor([0.43, 0.2], dtype=F64)
FIELDS = ("mean", "covariance", "lse", "kl")
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "self-mask": {"self_mask": True},
    "ALiBi": {"alibi": torch.tensor([0.1, 0.5], dtype=F64)},
    "both": {"alibi": 0.3, "self_mask": True},
}


def assert_same(ours, dense, atol):
    for field in FIELDS:
        assert_parity(getattr(ours, field), getattr(dense, field), atol=atol, name=field)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("l", "kind"),
    [(0, "variances"), (1, "variances"), (1, "covariances"), (1, "isotropic"), (2, "variances"), (2, "covariances")],
)
def test_exact_in_float64_and_float32(beliefs, l, kind, options):
    x = beliefs(l, kind)
    asked = {"return_lse": True, "return_kl": True, **options}
    dense = dense_kl_attention(x.mu, x.sigma, x.frames, KAPPA, **options)
    assert_same(kl_attention(x.mu, x.sigma, x.frames, KAPPA, **asked), dense, 1e-11)
    centre = Centre(0.5, torch.ones(2 * l + 1, dtype=F64))
    assert_same(kl_attention(x.mu, x.sigma, x.frames, KAPPA, centre=centre, **asked), dense, 1e-11)
    low = kl_attention(x.mu.float(), x.sigma.float(), x.frames.float(), KAPPA, **asked)
    assert low.mean.dtype == torch.float32
    for field in ("mean", "covariance", "kl"):
        assert_parity(getattr(low, field), getattr(dense, field), atol=1e-4, rtol=1e-4, name=field)


@pytest.mark.parametrize("l", [3, 4, 9])
def test_exact_at_higher_spin(beliefs, l):
    x = beliefs(l, n_batch=1, n_tokens=6)
    dense = dense_kl_attention(x.mu, x.sigma, x.frames, KAPPA)
    assert_same(kl_attention(x.mu, x.sigma, x.frames, KAPPA, return_lse=True, return_kl=True), dense, 1e-11)


def test_fields_not_asked_for_are_none_and_a_single_token_keeps_itself(beliefs):
    x = beliefs(1, n_tokens=1)
    for self_mask in (False, True):
        got = kl_attention(x.mu, x.sigma, x.frames, 0.4, self_mask=self_mask)
        assert (got.lse, got.kl) == (None, None)
        assert_parity(got.mean, x.mu, atol=1e-13)
        assert_parity(got.covariance, torch.diag_embed(x.sigma), atol=1e-13)
    assert kl_attention(x.mu, x.sigma, x.frames, 0.4, mean_only=True).covariance is None


@pytest.mark.parametrize(("l", "kind"), [(1, "variances"), (1, "covariances"), (2, "isotropic"), (0, "variances")])
def test_gradients(beliefs, l, kind):
    x = beliefs(l, kind, n_batch=1, n_tokens=4)

    def function(mu, sigma, phi, log_kappa):
        omega = frames(phi, l)
        if kind == "covariances":
            sigma = (sigma + sigma.mT) / 2
        got = kl_attention(mu, sigma, omega, log_kappa.exp(), self_mask=True, alibi=0.1, return_kl=True)
        return got.mean, got.covariance, got.kl

    leaves = [t.clone().requires_grad_() for t in (x.mu, x.sigma, x.phi, KAPPA.log())]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    asked = kl_attention(*leaves[:2], frames(leaves[2], l), KAPPA, return_lse=True)
    assert not asked.lse.requires_grad
    assert_parity(
        torch.autograd.grad(asked.mean.square().sum(), leaves[0])[0],
        torch.autograd.grad(kl_attention(*leaves[:2], frames(leaves[2], l), KAPPA).mean.square().sum(), leaves[0])[0],
        atol=1e-12,
    )


@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("l", [1, 2, 3])
def test_local_gauge_transformations_turn_outputs_and_leave_logits(beliefs, l, dtype, atol):
    x = beliefs(l, "covariances", dtype=dtype)
    g = frames(3 * torch.randn(2, 13, 3, dtype=dtype, generator=torch.Generator().manual_seed(7)), l)[:, None]

    def turn(y):
        mu, sigma, omega = y
        return (g @ mu[..., None])[..., 0], g @ sigma @ g.mT, g[:, 0] @ omega

    def run(y, field):
        return getattr(kl_attention(*y, 0.43, return_lse=True, return_kl=True), field)

    start = (x.mu, x.sigma, x.frames)
    for field, turned in (
        ("mean", lambda y: (g @ y[..., None])[..., 0]),
        ("covariance", lambda y: g @ y @ g.mT),
        ("lse", lambda y: y),
        ("kl", lambda y: y),
    ):
        assert_equivariant(lambda y, f=field: run(y, f), start, turn, turned, atol=atol, rtol=atol, name=field)
    h = frames(torch.tensor([0.3, -1.0, 2.0], dtype=dtype), l)
    assert_parity(run((x.mu, x.sigma, x.frames @ h), "lse"), run(start, "lse"), atol=atol, rtol=atol)


@pytest.mark.parametrize("options", [{}, {"self_mask": True}, {"alibi": 0.2}, {"return_lse": True, "return_kl": True}])
def test_the_past_does_not_depend_on_the_future_bit_by_bit(beliefs, options):
    x, y = (beliefs(2, n_tokens=70, dtype=torch.float32, seed=seed) for seed in (0, 1))
    cut = 41
    mixed = [
        torch.cat([a.narrow(dim, 0, cut), 5 * b.narrow(dim, cut, 70 - cut)], dim)
        for a, b, dim in ((x.mu, y.mu, 2), (x.sigma, y.sigma, 2), (x.frames, y.frames / 5, 1))
    ]
    first, second = (kl_attention(*z, 0.05, **options) for z in ((x.mu, x.sigma, x.frames), mixed))
    for one, other in zip(first, second, strict=True):
        if one is not None:
            assert torch.equal(one[:, :, :cut], other[:, :, :cut])
            assert not torch.equal(one[:, :, cut:], other[:, :, cut:])


@pytest.mark.parametrize("options", [{}, {"self_mask": True}, {"alibi": 0.2, "self_mask": True}])
@pytest.mark.parametrize("chunks", [[1] * 13, [5, 1, 7], [1, 12], [12, 1]])
def test_decoding_with_a_cache_is_the_whole_sequence(beliefs, options, chunks):
    x = beliefs(2)
    rope = rope_frames(2, torch.arange(13), torch.tensor(0.2, dtype=F64))
    whole = kl_attention(x.mu, x.sigma, x.frames, KAPPA, rope=rope, return_lse=True, return_kl=True, **options)
    cache, begin, parts = FeatureCache(13), 0, []
    for n in chunks:
        now = slice(begin, begin + n)
        parts.append(
            kl_attention(
                x.mu[:, :, now],
                x.sigma[:, :, now],
                x.frames[:, now],
                KAPPA,
                rope=rope[now],
                cache=cache,
                return_lse=True,
                return_kl=True,
                **options,
            )
        )
        begin += n
    for field in FIELDS:
        assert_parity(torch.cat([getattr(p, field) for p in parts], 2), getattr(whole, field), atol=1e-12, name=field)
    with pytest.raises(ValueError, match="cache of 13 tokens cannot hold 14"):
        kl_attention(x.mu[:, :, :1], x.sigma[:, :, :1], x.frames[:, :1], KAPPA, cache=cache)


@pytest.mark.parametrize("l", [1, 2, 3])
def test_with_rope_only_differences_of_positions_count(beliefs, l):
    x = beliefs(l)
    theta = torch.tensor([0.3, 0.05], dtype=F64)
    near, far = (rope_frames(l, torch.arange(13) + shift, theta) for shift in (0, 1000))
    first, second = (kl_attention(x.mu, x.sigma, None, 0.4, rope=r, return_lse=True) for r in (near, far))
    assert_parity(first.lse, second.lse, atol=1e-9)
    assert_parity(first.mean, dense_kl_attention(x.mu, x.sigma, None, 0.4, rope=near).mean, atol=1e-11)
    assert (first.lse - kl_attention(x.mu, x.sigma, None, 0.4, return_lse=True).lse).abs().max() > 1e-3


def test_covariance_stays_positive_definite_when_beliefs_are_sharp(beliefs):
    x = beliefs(2, dtype=torch.float32, spread=3.0)
    got = kl_attention(x.mu, 1e-9 * x.sigma, x.frames, 1e7).covariance
    sharp = kl_attention(x.mu, 1e-9 * x.sigma, x.frames, 1e-3).covariance
    for covariance in (got, sharp):
        assert torch.linalg.eigvalsh(covariance.double()).min() > 0
        assert covariance.isfinite().all()
    alone = kl_attention(x.mu, 1e-9 * x.sigma[..., 0], x.frames, 1e-3).covariance
    assert (alone > 0).all()


@pytest.mark.parametrize(("precision", "atol"), [("fp16", 5e-3), ("bf16x3", 1e-2)])
def test_fast_paths_are_near(beliefs, precision, atol):
    x = beliefs(2, spread=0.5, dtype=torch.float32)
    for options in ({"self_mask": True}, {"alibi": 0.5}):
        exact = dense_kl_attention(*(t.double() for t in x[:3]), 0.43, **options)
        got = kl_attention(*x[:3], 0.43, precision=precision, return_kl=True, **options)
        for field in ("mean", "covariance", "kl"):
            assert_parity(getattr(got, field), getattr(exact, field), atol=2 * atol, rtol=atol, name=field)
        assert got.mean.dtype == torch.float32


def test_autocast_changes_nothing(beliefs):
    x = beliefs(1, dtype=torch.float32)
    plain = kl_attention(*x[:3], 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kl_attention(*x[:3], 0.1).mean, plain.mean)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)).map(lambda t: f"{t[0]}x{t[1]}e"), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=5, deadline=None)
def test_any_layout_is_its_heads_one_by_one(terms, self_mask, seed):
    irreps = Irreps("+".join(terms))
    generator = torch.Generator().manual_seed(seed)
    mu, phi = irreps.randn(2, 6, generator=generator, dtype=F64), torch.randn(2, 6, 3, generator=generator, dtype=F64)
    sigma = irreps.randn(2, 6, generator=generator, dtype=F64).exp()
    kappa, slope = 0.2 + torch.rand(2, irreps.n_heads, generator=generator, dtype=F64)
    omega = frames_for(irreps, phi)
    got = kl_attention_irreps(
        irreps, mu, sigma, omega, kappa, self_mask=self_mask, alibi=slope, return_lse=True, return_kl=True
    )
    means = kl_attention_irreps(irreps, mu, sigma, omega, kappa, self_mask=self_mask, alibi=slope, mean_only=True)
    assert_parity(means.mean, got.mean, atol=1e-10)  # smaller products: on some CPUs another last bit
    for head, ((_, l), where) in enumerate(zip(irreps.heads, irreps.head_slices(), strict=True)):
        dense = dense_kl_attention(
            mu[:, None, :, where],
            sigma[:, None, :, where],
            omega[l],
            kappa[head],
            alibi=slope[head],
            self_mask=self_mask,
        )
        assert_parity(got.mean[..., where], dense.mean[:, 0], atol=1e-10)
        assert_parity(got.variance[..., where], dense.covariance[:, 0].diagonal(dim1=-2, dim2=-1), atol=1e-10)
        assert_parity(got.lse[:, head], dense.lse[:, 0], atol=1e-10)
        assert_parity(got.kl[:, head], dense.kl[:, 0], atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": torch.zeros(2, 3, 4)}, "mu is"),
        ({"sigma": torch.ones(2, 2, 13, 4)}, "sigma of shape"),
        ({"frames": torch.zeros(2, 12, 3, 3)}, "frames of shape"),
        ({"kappa": 0.0}, "kappa=0.0"),
        ({"kappa": torch.ones(3)}, "3 values for 2 heads"),
        ({"causal": False, "self_mask": True}, "causal"),
        ({"precision": "tf32"}, "'tf32'"),
    ],
)
def test_what_does_not_fit_is_named(beliefs, change, message):
    x = beliefs(1)
    arguments = {"mu": x.mu, "sigma": x.sigma, "frames": x.frames, "kappa": 0.4, **change}
    with pytest.raises(ValueError, match=message):
        kl_attention(**arguments)
