"""RAM: average each difference to the base over those members alone that changed the entry.

So what one member alone has learnt is kept in full. RAM+ makes it larger still, the more a member shares with others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glue.family import NonNegative
from glue.merge import merging
from glue.merge.leaf import Leaf, summed


def changed(leaf: Leaf, epsilon: float) -> tuple[Tensor, Tensor]:
    """Which members changed an entry, and how many did: bool [n, c] and [c]."""
    touched = leaf.tensors.abs() > epsilon
    return touched, summed(touched.to(leaf.tensors.dtype))


def averaged(leaf: Leaf, factor: Tensor, epsilon: float) -> Tensor:
    """The mean over the members that changed an entry, times factor[i] where member i alone did: [c]."""
    touched, count = changed(leaf, epsilon)
    return summed(leaf.tensors * touched * torch.where(count == 1, factor, 1.0)) / count.clamp(min=1)


@merging.add("ram", source="arXiv:2601.13572", space="delta", symmetric=True, idempotent={"epsilon": 0.0})
def ram(leaf: Leaf, *, epsilon: NonNegative = 1e-5) -> Tensor:
    """Average over the members that changed an entry: sum_i d_i [|d_i| > epsilon] / sum_i [|d_i| > epsilon].

    leaf.tensors  [n, c], differences to the base
    """
    return averaged(leaf, leaf.tensors.new_ones(leaf.n, 1), epsilon)


def boost(leaf: Leaf, *, r: float, alpha: float, epsilon: float) -> Tensor:
    """1 + r min(alpha, shared / alone): [n, 1]; how many entries a member changed with others, and how many alone."""
    touched, count = changed(leaf, epsilon)
    shared, alone = ((touched & at).sum(dim=1).double() for at in (count > 1, count == 1))
    ratio = shared / alone.clamp(min=1)  # who changed nothing alone has nothing to enlarge
    return (1 + r * ratio.clamp(max=alpha)).reshape(-1, 1)


@merging.add("ramplus_tl", source="arXiv:2601.13572", space="delta", glance=boost, symmetric=True,
             idempotent={"epsilon": 0.0})
def ramplus_tl(leaf: Leaf, *, r: NonNegative = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5) -> Tensor:
    """Average as RAM does, and enlarge what a member alone changed by up to 1 + r alpha, tensor by tensor.

    leaf.tensors  [n, c], differences to the base
    r             how much a ratio of shared to lone entries of 1 adds
    alpha         the largest ratio that counts
    """
    return averaged(leaf, leaf.seen.to(leaf.tensors.dtype), epsilon)
