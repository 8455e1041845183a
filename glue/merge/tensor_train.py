"""Tensor trains: changes of linear weights as chains of cores, taken apart, added and shortened without their product.

Sums are exact: cores side by side, in blocks, are the cores of the sum, and ranks add up. What rounding to lower ranks
loses is at most the root of the sum of the squares of what each cut loses (Oseledets, 2011), and is told. Means of
cores are means of changes only where all but one core are the same for all. All of it is computed in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from glue.errors import MethodError
from glue.kinds.tt import Train
from glue.merge.factors import Factors, recompressed
from glue.merge.factors import Keep as KeepFactors
from glue.merge.matrices import EPS, one_thread


@dataclass(frozen=True)
class Keep:
    """How much is kept: ranks of at most `rank`, and as much more of what may be lost as `error` allows.

    error  Frobenius norm, in units of that of the change
    """

    rank: int | None = None
    error: float = 0.0


@dataclass(frozen=True)
class Cut:
    """A train with less in it.

    lost  Frobenius norm of what each cut between two cores has lost; `bound` is the most that all together have
    """

    train: Train
    lost: tuple[float, ...]

    @property
    def bound(self) -> float:
        """At most so much is lost, as Frobenius norm."""
        return sqrt(sum(one * one for one in self.lost))


def decomposed(change: Tensor, rows: Sequence[int], columns: Sequence[int], keep: Keep = Keep()) -> Cut:  # noqa: B008
    """The cores of a dense change [m, n] seen as a tensor of sides `rows` and `columns` (TT-SVD)."""
    if (prod(rows), prod(columns)) != tuple(change.shape):
        raise MethodError(f"sides {tuple(rows)} and {tuple(columns)} do not make a weight of {tuple(change.shape)}",
                          fix="their products are its rows and columns")
    every = (*rows, *columns)
    with one_thread():
        rest = change.double().reshape(1, -1)
        allowed = keep.error * float(rest.norm()) / sqrt(max(1, len(every) - 1))
        cores, lost = [], []
        for side in every[:-1]:
            left, rest, gone = _cut(rest.reshape(rest.shape[0] * side, -1), keep.rank, allowed)
            cores.append(left.reshape(-1, side, left.shape[1]))
            lost.append(gone)
    return Cut(Train((*cores, rest.reshape(rest.shape[0], every[-1], 1)), len(rows)), tuple(lost))


def _cut(matrix: Tensor, rank: int | None, allowed: float) -> tuple[Tensor, Tensor, float]:
    """Orthonormal columns and the rest of a matrix, of the lowest rank that is allowed; and what is lost."""
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost with 0, 1, ... values kept
    noise = float(values[0]) * 8 * sum(matrix.shape) * EPS  # of what was rounded on the way here, not of the change
    k = max(1, int((tail > max(allowed, noise)).sum()))
    k = k if rank is None else min(k, rank)
    return u[:, :k], values[:k, None] * vt[:k], float(tail[k]) if k < len(tail) else 0.0


def added(trains: Sequence[Train], weights: Sequence[float] | None = None) -> Train:
    """The sum of changes of one weight, exactly, by blocks; ranks add up. Raises MethodError for other sides.

    weights  of each, in its first core alone; 1 unless given
    """
    first = trains[0]
    for train in trains:
        if (train.sides, train.rows) != (first.sides, first.rows):
            raise MethodError(f"trains of sides {first.sides} and {train.sides} cannot be added core by core",
                              fix="make both with the same sides")
    told = list(weights) if weights is not None else [1.0] * len(trains)
    cores = []
    for k in range(len(first.cores)):
        parts = [train.cores[k].double() * (weight if k == 0 else 1.0)
                 for train, weight in zip(trains, told, strict=True)]
        if k == 0:
            cores.append(torch.cat(parts, dim=2))
        elif k == len(first.cores) - 1:
            cores.append(torch.cat(parts, dim=0))
        else:
            cores.append(torch.stack([torch.block_diag(*(part[:, i] for part in parts))
                                      for i in range(parts[0].shape[1])], dim=1))
    return Train(tuple(cores), first.rows)


def rounded(train: Train, keep: Keep) -> Cut:
    """The same change at lower ranks: each rank cut by singular values, the others made orthonormal first."""
    cores = [core.double() for core in train.cores]
    with one_thread():
        for k in range(len(cores) - 1, 0, -1):  # all behind a core become orthonormal rows
            q, r = torch.linalg.qr(cores[k].reshape(cores[k].shape[0], -1).T)
            cores[k] = q.T.reshape(-1, *cores[k].shape[1:])
            cores[k - 1] = cores[k - 1] @ r.T
        allowed = keep.error * float(cores[0].norm()) / sqrt(max(1, len(cores) - 1))
        lost = []
        for k in range(len(cores) - 1):
            r, side, _ = cores[k].shape
            left, rest, gone = _cut(cores[k].reshape(r * side, -1), keep.rank, allowed)
            cores[k] = left.reshape(r, side, -1)
            cores[k + 1] = torch.einsum("ab,bsc->asc", rest, cores[k + 1])
            lost.append(gone)
    return Cut(Train(tuple(cores), train.rows), tuple(lost))


def averaged(trains: Sequence[Train], weights: Sequence[float]) -> Train:
    """The mean of changes that differ in one core: that core's mean, exactly, at their rank.

    Raises MethodError where more than one core differs: the mean of cores would be no mean of changes.
    """
    differ = differing(trains)
    if len(differ) > 1:
        raise MethodError(f"cores {', '.join(map(str, differ))} differ, and a mean of several cores is no mean of "
                          f"changes", fix="train one core only, or add the trains and round the sum")
    total, cores = sum(weights), list(trains[0].cores)
    for k in differ:
        cores[k] = sum((train.cores[k].double() * (weight / total)
                        for train, weight in zip(trains, weights, strict=True)), torch.zeros(()))
    return Train(tuple(cores), trains[0].rows)


def differing(trains: Sequence[Train]) -> list[int]:
    """Which cores are not the same in all of these."""
    if any((train.sides, train.rows) != (trains[0].sides, trains[0].rows) for train in trains):
        return list(range(max(len(train.cores) for train in trains)))
    return [k for k, cores in enumerate(zip(*(train.cores for train in trains), strict=True))
            if any(core.shape != cores[0].shape or not torch.equal(core, cores[0]) for core in cores)]


def inner(one: Train, other: Train) -> float:
    """The inner product of two changes of one weight, core by core."""
    state = torch.ones(1, 1, dtype=torch.float64)
    with one_thread():
        for mine, theirs in zip(one.cores, other.cores, strict=True):
            state = torch.einsum("ab,asc,bsd->cd", state, mine.double(), theirs.double())
    return float(state)


def norm(train: Train) -> float:
    """The Frobenius norm of a change."""
    return sqrt(max(0.0, inner(train, train)))


def of_factors(change: Factors, rows: Sequence[int], columns: Sequence[int], keep: Keep = Keep()) -> Cut:  # noqa: B008
    """A LoRA's change as a train, without its dense product; exact unless `keep` says otherwise."""
    slim = recompressed(change, KeepFactors(rank=change.rank))
    # what the change is made of at the middle: orthonormal columns of b and rows of a, but for the roots in them
    b = _left(slim.b, rows)
    a = _left(slim.a.T, tuple(reversed(columns)), backwards=True)
    turned = [core.permute(2, 1, 0) for core in reversed(a)]
    return rounded(Train((*b, *turned), len(rows)), keep)


def _left(matrix: Tensor, every: Sequence[int], backwards: bool = False) -> list[Tensor]:
    """The cores of a matrix [product of sides, r], whose last core ends in r; the last side first if backwards."""
    width = matrix.shape[1]
    rest = matrix.reshape(*(reversed(every) if backwards else every), width)
    if backwards:
        rest = rest.permute(*reversed(range(len(every))), len(every))
    cores, rest = [], rest.reshape(1, -1)
    with one_thread():
        for side in every[:-1]:
            left, rest, _ = _cut(rest.reshape(rest.shape[0] * side, -1), None, 0.0)
            cores.append(left.reshape(-1, side, left.shape[1]))
    return [*cores, rest.reshape(-1, every[-1], width)]


def as_factors(train: Train) -> Factors:
    """The same change as a LoRA, whose rank is that between rows and columns."""
    a, b = Train(tuple(core.double() for core in train.cores), train.rows).factors()
    return Factors(a, b)
