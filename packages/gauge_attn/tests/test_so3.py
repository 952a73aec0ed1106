import math

import pytest
import torch
from gauge_attn.irreps import Irreps
from gauge_attn.so3 import compose, frames, frames_for, frames_upto, generators, rope_frames, rotation
from gauge_attn.tables import matmul
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity

F64 = torch.float64


def angles(n: int, largest: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(n, 3, generator=generator, dtype=F64)
    return direction / direction.norm(dim=-1, keepdim=True) * largest * torch.rand(n, 1, generator=generator, dtype=F64)


def exponential(phi: torch.Tensor, l: int) -> torch.Tensor:
    """exp(phi . X): scale to a norm below 1/2, Taylor series to order 18, square back."""
    a = torch.einsum("...a,aij->...ij", phi, generators(l))
    squarings = max(0, math.ceil(math.log2(max(1.0, l * phi.norm(dim=-1).max().item()))) + 1)
    a = a / 2**squarings
    total = power = torch.eye(2 * l + 1, dtype=F64).expand_as(a)
    for k in range(1, 19):
        power = power @ a / k
        total = total + power
    for _ in range(squarings):
        total = total @ total
    return total


@pytest.mark.parametrize("l", range(10))
def test_generators_are_skew_with_the_algebra_and_the_casimir(l):
    x, y, z = generators(l)
    for a, b, c in ((x, y, z), (y, z, x), (z, x, y)):
        assert_parity(a @ b - b @ a, c, atol=1e-13)
        assert_parity(a.mT, -a, atol=1e-15)
    casimir = -(x @ x + y @ y + z @ z)
    assert_parity(casimir, l * (l + 1) * torch.eye(2 * l + 1, dtype=F64), atol=1e-12)


@pytest.mark.parametrize("l", range(10))
def test_frames_are_the_exponential(l):
    phi = angles(40, 2 * math.pi)
    assert_parity(frames(phi, l), exponential(phi, l), atol=1e-12)


def test_frames_are_orthogonal_in_float32_up_to_l_9_and_two_pi():
    for l, d_l in enumerate(frames_upto(angles(300, 2 * math.pi).float(), 9)):
        assert_parity(d_l @ d_l.mT, torch.eye(2 * l + 1).expand_as(d_l), atol=5e-6, name=f"l={l}")


def test_the_vector_irrep_is_the_rotation_and_positive():
    quarter = rotation(torch.tensor([0.0, 0.0, math.pi / 2], dtype=F64))
    assert_parity(quarter @ torch.tensor([1.0, 0, 0], dtype=F64), torch.tensor([0.0, 1, 0], dtype=F64), atol=1e-15)
    phi = angles(20, 6)
    assert_parity(frames(phi, 1), rotation(phi), atol=0)


def harmonics(v: torch.Tensor, l: int) -> torch.Tensor:
    """Real harmonics of l = 2 and 3 as polynomials of a unit vector, polar axis y, up to a common factor."""
    x, y, z = v.unbind(-1)
    if l == 2:
        parts = [x * z, x * y, (y * y - (x * x + z * z) / 2) / math.sqrt(3), y * z, (z * z - x * x) / 2]
        return torch.stack(parts, -1)
    a, b = math.sqrt(5 / 8), math.sqrt(3 / 8)
    parts = [
        a * x * (3 * z * z - x * x),
        math.sqrt(15) * x * y * z,
        b * x * (5 * y * y - 1),
        y * (5 * y * y - 3) / 2,
        b * z * (5 * y * y - 1),
        math.sqrt(15) / 2 * y * (z * z - x * x),
        a * z * (z * z - 3 * x * x),
    ]
    return torch.stack(parts, -1)


@pytest.mark.parametrize("l", [2, 3])
def test_harmonics_of_a_turned_vector_are_the_turned_harmonics(l):
    v = torch.nn.functional.normalize(torch.randn(30, 3, dtype=F64, generator=torch.Generator().manual_seed(1)), dim=-1)
    phi = angles(30, 6)
    turned = (rotation(phi) @ v[:, :, None])[..., 0]
    assert_parity(harmonics(turned, l), (frames(phi, l) @ harmonics(v, l)[..., None])[..., 0], atol=1e-13)


@given(st.integers(0, 9), st.integers(0, 2**31), st.floats(0, 10))
@settings(max_examples=8, deadline=None)
def test_homomorphism(l, seed, largest):
    first, second = angles(5, largest, seed), angles(5, largest, seed + 1)
    both = compose(first, second)
    assert (both.norm(dim=-1) <= math.pi + 1e-12).all()
    assert_parity(frames(both, l), frames(first, l) @ frames(second, l), atol=1e-10)
    assert_parity(frames(-first, l), frames(first, l).mT, atol=1e-10)


def test_frames_and_compose_are_smooth_at_and_around_zero():
    for length in (0.0, 0.0999, 0.1001):
        phi = (torch.tensor([[1.0, -2.0, 0.5]], dtype=F64) * length / math.sqrt(5.25)).requires_grad_()
        assert torch.autograd.gradcheck(lambda p: frames(p, 2), phi, fast_mode=True)
        assert torch.autograd.gradcheck(lambda p: compose(p, torch.full_like(p, 0.3)), phi, fast_mode=True)
    zero = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda p: frames(p, 2), zero, fast_mode=True)
    derivative = torch.autograd.functional.jacobian(lambda p: frames(p, 3), torch.zeros(3, dtype=F64))
    assert_parity(derivative.permute(2, 0, 1), generators(3), atol=1e-14)


def test_frames_for_a_layout_are_the_single_ones():
    phi = angles(6, 3).view(2, 3, 3)
    parts = frames_for(Irreps("2x3e+1x0e+1x2o"), phi)
    assert list(parts) == [0, 2, 3]
    for l, part in parts.items():
        assert_parity(part, frames(phi, l), atol=0)
    with pytest.raises(ValueError, match="three components"):
        frames(torch.zeros(2, 4), 1)


def test_frames_ignore_autocast_and_keep_float32():
    phi = angles(4, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frames(phi, 3), frames(phi, 3))
        assert frames(phi.bfloat16(), 3).dtype == torch.float32


@pytest.mark.parametrize("l", [0, 1, 2, 3])
def test_rope_turns_the_pairs_of_m_around_the_axis(l):
    theta = 0.3
    r = rope_frames(l, torch.arange(5), torch.tensor(theta, dtype=F64))
    assert_parity(r[2] @ r[1].mT, r[4] @ r[3].mT, atol=1e-14)
    for m in range(1, l + 1):
        pair = [l - m, l + m]
        c, s = math.cos(3 * m * theta), math.sin(3 * m * theta)
        assert_parity(r[3][pair][:, pair], torch.tensor([[c, s], [-s, c]], dtype=F64), atol=1e-13)
    per_head = rope_frames(l, torch.arange(5), torch.tensor([theta, 1.0], dtype=F64))
    assert_parity(per_head[0], r, atol=1e-15)
    assert rope_frames(l, torch.arange(5), theta).dtype == torch.float32
    far = rope_frames(l, torch.tensor([100_000]), theta)
    assert_parity(far, rope_frames(l, torch.tensor([100_000]), torch.tensor(theta, dtype=F64)), atol=1e-6)


def test_the_product_without_tf32_is_the_product():
    a, b = torch.randn(2, 3, 4, 5, dtype=F64), torch.randn(2, 3, 5, 2, dtype=F64)
    assert_parity(matmul(a, b), (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2), atol=1e-14)


@pytest.mark.slow  # importing e3nn takes seconds
def test_generators_and_frames_are_those_of_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    phi = angles(20, 3.1)
    for l in range(8):
        d_l = o3.Irrep(l, 1).D_from_matrix(rotation(phi)).to(F64)
        assert_parity(frames(phi, l), d_l, atol=1e-5, name=f"l={l}")
