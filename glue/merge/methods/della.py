"""DELLA: drop differences to the base at random, small ones more often, rescale the rest, sum them or let signs vote.

The chance to stay grows with the rank of an entry's magnitude in its row; so a tensor is merged in one piece, and the
chances of every member are held beside it. Rows are along the last dimension; mergekit's are along the second, which
for matrices is the same.

`rescale: share` divides each entry by its own chance, as the paper does, so that the mean over seeds is what was there
before. `rescale: l1` restores the L1 norm of each tensor instead, as mergekit does since 0.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from glue.family import PerMember, Probability, Share
from glue.merge import merging
from glue.merge.leaf import Leaf, summed
from glue.merge.parameters import whole
from glue.merge.sparsify import chances, keep_random, to_same_l1
from glue.merge.votes import agreed


def kept(leaf: Leaf, density: Tensor, epsilon: Tensor, rescale: str) -> Tensor:
    """A random share of the entries, rescaled: [n, *shape]."""
    pairs = zip(density.flatten().tolist(), epsilon.flatten().tolist(), strict=True)
    chance = torch.stack([chances(delta, *pair) for delta, pair in zip(leaf.tensors, pairs, strict=True)])
    stays = keep_random(leaf, chance)
    if rescale == "share":
        return stays / torch.where(chance > 0, chance, 1.0)
    return stays * to_same_l1(leaf.tensors, stays).to(stays.dtype).reshape(density.shape)


@merging.add("della", source="arXiv:2406.11617", space="delta", whole=True, symmetric=True,
             idempotent={"density": 1.0},
             unbiased={"density": 0.5, "epsilon": 0.25, "normalize": False, "rescale": "share"})
def della(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
          epsilon: PerMember[Probability] = 0.15, normalize: bool = True,
          rescale: Literal["share", "l1"] = "share", lambda_: float = 1.0) -> Tensor:
    """Keep entries with chances of density - epsilon to density + epsilon, rescale them, then vote as TIES does.

    leaf.tensors  [n, *shape], differences to the base
    weight        [n, 1, ..., 1]
    density       [n, 1, ..., 1], the mean chance; at 1 nothing is dropped
    epsilon       [n, 1, ..., 1]
    """
    return lambda_ * agreed(kept(leaf, density, epsilon, rescale), weight, normalize)


@merging.add("della_linear", source="arXiv:2406.11617", space="delta", whole=True, symmetric=True,
             idempotent={"density": 1.0}, unbiased={"density": 0.5, "epsilon": 0.25, "rescale": "share"})
def della_linear(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                 epsilon: PerMember[Probability] = 0.15, normalize: bool = False,
                 rescale: Literal["share", "l1"] = "share", lambda_: float = 1.0) -> Tensor:
    """Keep entries with chances of density - epsilon to density + epsilon, rescale them, sum: lambda sum_i w_i d_i.

    leaf.tensors  [n, *shape], differences to the base
    weight        [n, 1, ..., 1]
    density       [n, 1, ..., 1], the mean chance; at 1 nothing is dropped
    epsilon       [n, 1, ..., 1]
    """
    total = summed(weight * kept(leaf, density, epsilon, rescale))
    return lambda_ * (total / whole(weight) if normalize else total)
