"""Factors: low-rank changes of linear weights, added, cut and measured without their product, which is never made.

Sums are exact: the factors of several changes side by side are the factors of their sum. Lengths and angles follow
from inner products of factors; the nearest change of lower rank from a QR decomposition of each side. All of it is
computed in fp64 on one thread, so that the same factors always give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from glue.merge.matrices import EPS, Matrix, dots, eigen, one_thread
from glue.merge.parameters import whole


@dataclass(frozen=True)
class Factors:
    """The change scale * b @ a of one linear weight [m, n].

    a         [r, n]
    b         [m, r]
    spectrum  [k], the singular values that the change had before it was cut to rank r, largest first; None where it
              was not cut
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    spectrum: Tensor | None = None

    @property
    def rank(self) -> int:
        """How many rows a has; it may be more than the rank of the change."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that is changed."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def error(self) -> float:
        """The Frobenius norm of what was cut off."""
        return 0.0 if self.spectrum is None else float(self.spectrum[self.rank:].norm())

    def times(self, factor: float) -> Factors:
        """The change, `factor` times as large."""
        return replace(self, scale=self.scale * factor)

    def dense(self) -> Tensor:
        """The change itself: [m, n], fp64."""
        return self.scale * (self.b.double() @ self.a.double())


@dataclass(frozen=True)
class Keep:
    """How much of a change is kept: what is asked for by share and by error, at no more than a rank.

    rank    the most singular values
    energy  the least share of the sum of their squares
    error   the most that may be lost, as Frobenius norm, in units of that of the change
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    @property
    def everything(self) -> bool:
        """Whether nothing is asked for, so that nothing is cut."""
        return self.rank is None and self.energy is None and self.error is None

    def count(self, values: Tensor) -> int:
        """How many of these singular values are kept, the largest first: as few as will do, and at least one."""
        if self.everything:
            return len(values)
        squares = values.double().square()
        fewest = 1 if self.rank is None or self.energy is not None or self.error is not None else self.rank
        if self.energy is not None:
            reached = squares.cumsum(0)
            fewest = max(fewest, int((reached < self.energy * reached[-1]).sum()) + 1)
        if self.error is not None:
            left = squares.flip(0).cumsum(0).flip(0)  # by how many are kept: what is lost with 0, 1, ...
            fewest = max(fewest, int((left > self.error**2 * left[0]).sum()))
        return min(fewest, len(values), self.rank or len(values))


def stacked(parts: Sequence[Factors]) -> Factors:
    """The sum of changes of one weight, exactly; scales go into a alone, since in both they would be squared.

    Returns a [sum of ranks, n] and b [m, sum of ranks], fp64.
    """
    return Factors(torch.cat([part.a.double() * part.scale for part in parts]),
                   torch.cat([part.b.double() for part in parts], dim=1))


def weighted(parts: Sequence[Factors], weight: Tensor, normalize: bool = True) -> tuple[Factors, ...]:
    """Each change times its weight [n], divided by the sum of all weights; no number of a factor is touched."""
    total = whole(weight) if normalize else 1.0
    return tuple(part.times(float(w / total)) for part, w in zip(parts, weight, strict=True))


def recompressed(change: Factors, keep: Keep) -> Factors:
    """The nearest change of lower rank (Eckart and Young, 1936), with the root of each singular value in both factors.

    Its first k rows of a and columns of b are the nearest change of rank k, so that it can be cut again for nothing.
    """
    with one_thread():
        a, b = change.a.double(), change.b.double()
        left, right = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.T, mode="r").R
        u, values, v = torch.linalg.svd(change.scale * left @ right.T, full_matrices=False)
        k = keep.count(values)
        root = values[:k].sqrt()
        # From the triangles alone: singular vectors of one side are what the change makes of those of the other.
        back = change.scale * torch.where(values[:k] > len(values) * EPS * values[0], 1 / root, 0.0)
        return Factors((back[:, None] * (u[:, :k].T @ left)) @ a, b @ (right.T @ v[:k].T * back), 1.0, values)


def factored(delta: Matrix, keep: Keep) -> Factors:
    """The nearest change of lower rank to a dense one, [m, n].

    It is found from the inner products of the shorter side: singular values below sqrt(rows eps) of the largest, which
    fp32 does not tell from rounding, are no more than noise, and are not kept.
    """
    if delta.shape[0] > delta.shape[1]:
        turned = factored(delta.T, keep)
        return Factors(turned.b.T, turned.a.T, 1.0, turned.spectrum)
    with one_thread():
        squares, vectors = eigen(dots(delta))
        squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
        values = squares.sqrt()
        real = max(1, int((squares > len(squares) * EPS * squares[0]).sum()))
        k = min(keep.count(values), real)
        root = values[:k].sqrt()
        b = vectors[:, :k].clone()  # a view would hold all of them
        del vectors
        a = torch.where(root > 0, 1 / root, 0.0)[:, None] * (b.T @ delta.double())
        return Factors(a, b * root, 1.0, values)


def first(change: Factors, rank: int) -> Factors:
    """The first `rank` rows of a and columns of b: of what was recompressed, the nearest change of that rank."""
    return replace(change, a=change.a[:rank], b=change.b[:, :rank])


def inner(one: Factors, other: Factors) -> float:
    """The inner product of two changes of one weight, from r x r products of their factors."""
    with one_thread():
        left = one.b.double().T @ other.b.double()
        right = one.a.double() @ other.a.double().T
        return one.scale * other.scale * float((left * right).sum())


def gram(parts: Sequence[Factors]) -> Tensor:
    """The inner products of all pairs of changes of one weight: [n, n], fp64."""
    both, whose = stacked(parts), torch.repeat_interleave(torch.tensor([part.rank for part in parts]))
    with one_thread():
        products = (both.b.T @ both.b) * (both.a @ both.a.T)
    rows = torch.zeros(len(parts), len(products), dtype=torch.float64).index_add_(0, whose, products)
    return torch.zeros(len(parts), len(parts), dtype=torch.float64).index_add_(1, whose, rows)


def norm(change: Factors) -> float:
    """The Frobenius norm of a change. Where its factors cancel, all below 1e-8 of their own size is rounding."""
    return sqrt(max(0.0, inner(change, change)))


def cosine(one: Factors, other: Factors) -> float:
    """The cosine of the angle between two changes of one weight; 0 where one of them changes nothing."""
    sizes = norm(one) * norm(other)
    return inner(one, other) / sizes if sizes else 0.0


def distance(one: Factors, other: Factors) -> float:
    """The Frobenius norm of the difference of two changes, to full precision even where they are nearly the same."""
    both = stacked([one, other.times(-1)])
    with one_thread():
        return float((torch.linalg.qr(both.b).R @ torch.linalg.qr(both.a.T).R.T).norm())


def averaged_apart(parts: Sequence[Factors], weight: Tensor) -> Factors:
    """The weighted means of a and of b, each by itself: not the mean of the changes, unless all a, or all b, are one.

    parts   those of lower rank count as if zeros stood behind their factors
    weight  [n]; divided by its sum. Scales that differ go into b
    """
    total, scale = whole(weight), parts[0].scale
    if any(part.scale != scale for part in parts):
        scale = 1.0
    rank, (m, n) = max(part.rank for part in parts), parts[0].shape
    a = torch.zeros(rank, n, dtype=torch.float64)
    b = torch.zeros(m, rank, dtype=torch.float64)
    for part, w in zip(parts, weight, strict=True):
        a[:part.rank].add_(part.a.double(), alpha=float(w / total))
        b[:, :part.rank].add_(part.b.double(), alpha=float(w / total) * part.scale / scale)
    return Factors(a, b, scale)
