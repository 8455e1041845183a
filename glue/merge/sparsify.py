"""Sparsify: keep some entries of each member's difference to the base and zero the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glue.merge.leaf import Leaf


@dataclass(frozen=True)
class Cut:
    """Which entries of a whole tensor are its largest, so that a piece of it can be judged alone.

    at    [n], the smallest magnitude that is kept
    last  [n], the flat index of the last entry of just that magnitude that is kept
    """

    at: Tensor
    last: Tensor


def cut(deltas: Tensor, density: Tensor) -> Cut:
    """Where to cut so that exactly max(1, int(density[i] * numel)) entries of deltas[i] remain.

    deltas   [n, *shape], whole tensors
    density  [n, 1, ..., 1], in (0, 1], fp64: int() of an fp32 product can be off by one

    Of entries with equal magnitude at the cut, those with the lower flat index stay.
    """
    at, last = deltas.new_zeros(len(deltas)), torch.zeros(len(deltas), dtype=torch.int64)
    for i, (delta, share) in enumerate(zip(deltas, density.reshape(-1).tolist(), strict=True)):
        size = np.abs(delta.reshape(-1).numpy())
        size[np.isnan(size)] = np.inf  # kept, so that it shows in the output and is refused there
        kept = max(1, int(share * len(size)))
        edge = np.partition(size, len(size) - kept)[len(size) - kept]
        level = np.flatnonzero(size == edge)
        at[i] = float(edge)
        last[i] = int(level[kept - np.count_nonzero(size > edge) - 1])
    return Cut(at, last)


def keep_largest(leaf: Leaf, cut: Cut) -> Tensor:
    """The entries of leaf.tensors that are among the largest of their tensor, the rest zero: [n, *shape]."""
    index = torch.arange(leaf.start, leaf.start + leaf.tensors[0].numel()).reshape(leaf.tensors.shape[1:])
    column = [-1, *[1] * index.ndim]
    size, at, last = leaf.tensors.abs(), cut.at.reshape(column), cut.last.reshape(column)
    return leaf.tensors * ((size > at) | ((size == at) & (index <= last)))


def keep_random(leaf: Leaf, density: Tensor) -> Tensor:
    """Each entry of leaf.tensors[i] with probability density[i], the rest zero: [n, *shape]."""
    drawn = torch.stack([leaf.uniform(i) for i in range(leaf.n)])
    return leaf.tensors * (drawn < density.float())  # fp32 for all callers, or glance and method could disagree
