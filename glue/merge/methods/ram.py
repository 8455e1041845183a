"""RAM: average each difference to the base over those members alone that changed the entry.

So what one member alone has learnt is kept in full. RAM+ makes it larger still, the more a member shares with others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glue.family import NonNegative
from glue.merge import merging
from glue.merge.combine import added
from glue.merge.leaf import Leaf, summed
from glue.merge.target import Glimpse


def changed(leaf: Leaf, epsilon: float) -> tuple[Tensor, Tensor]:
    """Which members changed an entry, 1 or 0, and how many did: [n, c] and [c]."""
    touched = torch.abs(leaf.tensors).gt_(epsilon)  # numbers, since torch is slow with masks
    return touched, summed(touched)


@merging.add("ram", version=2, source="arXiv:2601.13572", space="delta", symmetric=True, idempotent={"epsilon": 0.0})
def ram(leaf: Leaf, *, epsilon: NonNegative = 1e-5) -> Tensor:
    """Average over the members that changed an entry: sum_i d_i [|d_i| > epsilon] / sum_i [|d_i| > epsilon].

    leaf.tensors  [n, c], differences to the base
    """
    touched, count = changed(leaf, epsilon)
    return added(leaf.tensors.mul_(touched)).div_(count.clamp_(min=1))


def boost(pieces: Glimpse, *, r: float, alpha: float, epsilon: float) -> Tensor:
    """1 + r min(alpha, shared / alone): [n, 1]; how many entries a member changed with others, and how many alone."""
    in_all = alone = torch.zeros(pieces.n, dtype=torch.float64)
    for leaf in pieces:
        touched, count = changed(leaf, epsilon)
        in_all = in_all + _ones(touched)
        alone = alone + _ones(touched.mul_(torch.eq(count, 1, out=count)))
    ratio = (in_all - alone) / alone.clamp(min=1)  # who changed nothing alone has nothing to enlarge
    return (1 + r * ratio.clamp(max=alpha)).reshape(-1, 1)


def _ones(marks: Tensor) -> Tensor:
    return torch.tensor([int(row.count_nonzero()) for row in marks], dtype=torch.float64)


@merging.add("ramplus_tl", version=2, source="arXiv:2601.13572", space="delta", glance=boost, symmetric=True,
             idempotent={"epsilon": 0.0})
def ramplus_tl(leaf: Leaf, *, r: NonNegative = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5) -> Tensor:
    """Average as RAM does, and enlarge what a member alone changed by up to 1 + r alpha, tensor by tensor.

    leaf.tensors  [n, c], differences to the base
    r             how much a ratio of shared to lone entries of 1 adds
    alpha         the largest ratio that counts
    """
    touched, count = changed(leaf, epsilon)
    deltas = leaf.tensors.mul_(touched)
    average = summed(deltas).div_(count.clamp(min=1))
    enlarged = added(deltas.mul_(leaf.seen.to(deltas)))  # of these count those that one member alone changed
    return torch.where(count == 1, enlarged, average)
