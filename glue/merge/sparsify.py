"""Sparsify: keep some entries of each member's difference to the base and zero the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glue.errors import MethodError
from glue.merge.leaf import Leaf, inner

NO_NORM = 1e-7   # L1 norms below this are not restored
ROUNDING = 1e-6  # 0.85 + 0.15 is more than 1 in fp32


@dataclass(frozen=True)
class Cut:
    """Which entries of a whole tensor are its largest, so that a piece of it can be judged alone.

    at    [n], the smallest magnitude that is kept
    last  [n], the flat index of the last entry of just that magnitude that is kept
    """

    at: Tensor
    last: Tensor


def cut(deltas: Tensor, density: Tensor) -> Cut:
    """Where to cut so that exactly max(1, int(density[i] * numel)) entries of deltas[i] remain; see `cut_at`.

    deltas   [n, *shape], whole tensors
    density  [n, 1, ..., 1], in (0, 1], fp64: int() of an fp32 product can be off by one
    """
    numel = deltas[0].numel()
    return cut_at(deltas, [max(1, int(share * numel)) for share in density.reshape(-1).tolist()])


def cut_at(numbers: Tensor, counts: Sequence[int]) -> Cut:
    """Where to cut so that the counts[i] entries of largest magnitude in numbers[i] remain.

    numbers  [n, *shape], whole tensors
    counts   n whole numbers, of 0 to numel

    Of entries with equal magnitude at the cut, those with the lower flat index stay.
    """
    at = numbers.new_full((len(numbers),), torch.inf)  # nothing is larger, and no index is below 0
    last = torch.full((len(numbers),), -1)
    for i, (row, kept) in enumerate(zip(numbers, counts, strict=True)):
        if kept:
            size = np.abs(row.reshape(-1).numpy())
            size[np.isnan(size)] = np.inf  # kept, so that it shows in the output and is refused there
            edge = np.partition(size, len(size) - kept)[len(size) - kept]
            level = np.flatnonzero(size == edge)
            at[i] = float(edge)
            last[i] = int(level[kept - np.count_nonzero(size > edge) - 1])
    return Cut(at, last)


def among_largest(numbers: Tensor, cut: Cut, start: int) -> Tensor:
    """Which entries of a piece are among the largest of their tensor.

    numbers  [n, *shape]
    start    flat index, in the tensor, of the first entry of the piece
    returns  [n, *shape], bool
    """
    index = torch.arange(start, start + numbers[0].numel()).reshape(numbers.shape[1:])
    column = [-1, *[1] * index.ndim]
    size, at, last = numbers.abs(), cut.at.reshape(column), cut.last.reshape(column)
    return (size > at) | ((size == at) & (index <= last))


def keep_largest(leaf: Leaf, cut: Cut) -> Tensor:
    """The entries of leaf.tensors that are among the largest of their tensor, the rest zero: [n, *shape]."""
    return leaf.tensors * among_largest(leaf.tensors, cut, leaf.start)


def keep_random(leaf: Leaf, density: Tensor) -> Tensor:
    """Each entry of leaf.tensors[i] with probability density[i], the rest zero: [n, *shape].

    density  [n, 1, ..., 1], or a probability for each entry: [n, *shape]
    """
    drawn = torch.stack([leaf.uniform(i) for i in range(leaf.n)])
    return leaf.tensors * (drawn < density.float())  # fp32 for all callers, or glance and method could disagree


def chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """The chance of each entry to stay, from density - epsilon for the smallest of its row to density + epsilon.

    delta    [*shape]; of equal magnitudes in a row, the one with the lower index ranks lower
    density  where it is 1, all entries stay. Raises MethodError where chances would leave [0, 1]
    """
    if density == 1:
        return torch.ones_like(delta)
    if density - epsilon < -ROUNDING or density + epsilon > 1 + ROUNDING:
        raise MethodError(f"density {density:.6g} and epsilon {epsilon:.6g} make chances to stay of "
                          f"{density - epsilon:.6g} to {density + epsilon:.6g}; a chance lies between 0 and 1",
                          fix="give a smaller epsilon")
    rows = delta.reshape(-1, delta.shape[-1] if delta.ndim else 1)
    if rows.shape[1] == 1:
        return torch.full_like(delta, density)
    order = rows.abs().argsort(dim=1, stable=True)
    place = (2 * torch.arange(rows.shape[1], dtype=delta.dtype) / (rows.shape[1] - 1) - 1).expand_as(rows)
    return (density + epsilon * torch.empty_like(rows).scatter_(1, order, place)).clamp(0, 1).reshape(delta.shape)


def to_same_l1(before: Tensor, after: Tensor) -> Tensor:
    """What to multiply each after[i] by, so that its L1 norm becomes that of before[i]: [n], fp64.

    before, after  [n, *shape], whole tensors
    """
    norms = [(inner(one, one.sign()), inner(other, other.sign())) for one, other in zip(before, after, strict=True)]
    return torch.tensor([one / other if min(one, other) >= NO_NORM else 1.0 for one, other in norms],
                        dtype=torch.float64)
