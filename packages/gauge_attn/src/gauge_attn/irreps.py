"""Layouts of features made of SO(3) irreps: `Irreps("5x0e+3x1e+1x2e")`. Imports no torch.

The layout is e3nn's: terms in the order written, and inside the term `3x1e` the copies one after the other, each
with its 2l+1 components, so that (..., 3, 2l+1) flattened gives the term. Components of l=1 are x, y, z; `so3` has
the basis of every l. Every copy is one attention head.

Parity: e (even) and o (odd) are read, kept and printed as e3nn does, but only rotations act here, so that 1o and 1e
transform alike and share their heads' kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_TERM = re.compile(r"(?:(\d+)\s*[x×]\s*)?(\d+)\s*([eo])")
_LABEL = re.compile(r"[lLℓ]\s*_?(\d+)(?:_\w+)?")


@dataclass(frozen=True)
class Term:
    """`multiplicity` copies of the irrep of angular momentum `l` and parity "e" or "o"."""

    multiplicity: int
    l: int
    parity: str = "e"

    @property
    def dim(self) -> int:
        """multiplicity * (2l+1)"""
        return self.multiplicity * (2 * self.l + 1)

    def __str__(self) -> str:
        return f"{self.multiplicity}x{self.l}{self.parity}"


@dataclass(frozen=True)
class Group:
    """Everything of one l: its heads' indices among all heads, and where the features are."""

    l: int
    heads: tuple[int, ...]
    slices: tuple[slice, ...]

    @property
    def multiplicity(self) -> int:
        return len(self.heads)

    @property
    def d(self) -> int:
        """2l+1"""
        return 2 * self.l + 1


class Irreps:
    """A direct sum of irreps, from an e3nn string or from tuples (label, multiplicity, dimension).

    Irreps("5x0e+3x1e+1x2e") == Irreps([("ℓ0", 5, 1), ("l1", 3, 3), ("ℓ2", 1, 5)]). A term without a
    multiplicity is one copy; terms of multiplicity 0 are dropped. A label may carry a suffix (`ℓ0_pad`).

    Raises ValueError naming the term that cannot be read, a dimension that is not 2l+1, or an empty layout.
    """

    terms: tuple[Term, ...]

    def __init__(self, spec: str | Irreps | Sequence[tuple[str, int, int]]) -> None:
        if isinstance(spec, Irreps):
            terms = list(spec.terms)
        elif isinstance(spec, str):
            terms = [_parse(text.strip()) for text in spec.split("+")]
        else:
            terms = [_from_tuple(entry) for entry in spec]
        terms = [term for term in terms if term.multiplicity]
        if not terms:
            raise ValueError(f"irreps {spec!r} have no components; write for example '5x0e+3x1e+1x2e'")
        self.terms = tuple(terms)

    @property
    def dim(self) -> int:
        """K, the number of components."""
        return sum(term.dim for term in self.terms)

    @property
    def n_heads(self) -> int:
        """Copies of irreps, each of which is a head."""
        return sum(term.multiplicity for term in self.terms)

    @property
    def lmax(self) -> int:
        return max(term.l for term in self.terms)

    @property
    def heads(self) -> list[tuple[str, int]]:
        """(label, l) of every head, in order: [("ℓ0", 0), ...]."""
        return [(f"ℓ{term.l}", term.l) for term in self.terms for _ in range(term.multiplicity)]

    @property
    def labels(self) -> list[str]:
        """The heads' labels."""
        return [label for label, _ in self.heads]

    @property
    def ls(self) -> list[int]:
        """The distinct l, ascending."""
        return sorted({term.l for term in self.terms})

    def slices(self) -> list[slice]:
        """Where each term lies among the K components, as in e3nn."""
        begins = [sum(term.dim for term in self.terms[:i]) for i in range(len(self.terms))]
        return [slice(begin, begin + term.dim) for begin, term in zip(begins, self.terms, strict=True)]

    def head_slices(self) -> list[slice]:
        """Where each head lies among the K components."""
        slices, begin = [], 0
        for _, l in self.heads:
            slices.append(slice(begin, begin + 2 * l + 1))
            begin += 2 * l + 1
        return slices

    def by_l(self) -> dict[int, Group]:
        """{l: Group}, l ascending; terms of one l that are apart in the layout are one group."""
        head_l = [l for _, l in self.heads]
        return {
            l: Group(
                l,
                tuple(h for h, other in enumerate(head_l) if other == l),
                tuple(s for s, term in zip(self.slices(), self.terms, strict=True) if term.l == l),
            )
            for l in self.ls
        }

    def split(self, x_BNK: Tensor) -> dict[int, Tensor]:
        """(B, N, K) to {l: (B, H_l, N, 2l+1)}; differentiable, the inverse of `join`."""
        if x_BNK.size(-1) != self.dim:
            raise ValueError(f"{self} has {self.dim} components, got a last dimension of {x_BNK.size(-1)}")
        parts = {}
        for l, group in self.by_l().items():
            pieces = [x_BNK[..., s].unflatten(-1, (-1, group.d)) for s in group.slices]
            x_BNHd = pieces[0] if len(pieces) == 1 else _cat(pieces, -2)
            parts[l] = x_BNHd.transpose(-3, -2)
        return parts

    def join(self, parts: Mapping[int, Tensor]) -> Tensor:
        """{l: (B, H_l, N, 2l+1)} to (B, N, K)."""
        used = dict.fromkeys(self.ls, 0)
        pieces = []
        for term in self.terms:
            begin = used[term.l]
            used[term.l] += term.multiplicity
            pieces.append(parts[term.l][..., begin : used[term.l], :, :].transpose(-3, -2).flatten(-2))
        return pieces[0] if len(pieces) == 1 else _cat(pieces, -1)

    def randn(self, *size: int, **kwargs: Any) -> Tensor:
        """Standard normal (*size, K); kwargs (generator, dtype, device) as for torch.randn."""
        import torch

        return torch.randn(*size, self.dim, **kwargs)

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __str__(self) -> str:
        return "+".join(str(term) for term in self.terms)

    def __repr__(self) -> str:
        return f"Irreps({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Irreps) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)


def _cat(pieces: list[Tensor], dim: int) -> Tensor:
    import torch

    return torch.cat(pieces, dim)


def _parse(text: str) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read the irreps term {text!r}; write multiplicity x l parity, for example '3x1e'")
    multiplicity, l, parity = match.groups()
    return Term(1 if multiplicity is None else int(multiplicity), int(l), parity)


def _from_tuple(entry: tuple[str, int, int]) -> Term:
    label, multiplicity, dim = entry
    match = _LABEL.fullmatch(label)
    if match is None or multiplicity < 0:
        raise ValueError(f"cannot read the irreps entry {entry!r}; write (label, multiplicity, dim), as ('ℓ1', 3, 3)")
    l = int(match.group(1))
    if dim != 2 * l + 1:
        raise ValueError(f"irreps entry {entry!r}: the irrep {label} has dimension {2 * l + 1}, not {dim}")
    return Term(multiplicity, l)
