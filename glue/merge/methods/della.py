"""DELLA: drop differences to the base at random, small ones more often, rescale the rest, sum them or let signs vote.

The chance to stay grows with the rank of an entry's magnitude in its row. Rows are along the last dimension; mergekit's
are along the second, which for matrices is the same.

`rescale: share` divides each entry by its own chance, as the paper does, so that the mean over seeds is what was there
before. `rescale: l1` restores the L1 norm of each tensor instead, as mergekit does since 0.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from glue.family import PerMember, Probability, Share
from glue.merge import merging
from glue.merge.combine import added
from glue.merge.leaf import Leaf
from glue.merge.parameters import whole
from glue.merge.sparsify import chances, rescaling
from glue.merge.target import Glimpse
from glue.merge.votes import agreed

Rescale = Literal["none", "share", "l1"]


def thinned(leaf: Leaf, density: Tensor, epsilon: Tensor, by_chance: bool) -> Tensor:
    """A random share of the entries, each divided by its chance if by_chance, the rest zero: [n, r, c]."""
    # In the type of the leaf, since a glance is given fp64, and both must agree.
    shares, spreads = (given.to(leaf.tensors.dtype).flatten().tolist() for given in (density, epsilon))
    for i, (share, spread) in enumerate(zip(shares, spreads, strict=True)):
        chance = chances(leaf.tensors[i], share, spread)
        if share < 1:
            leaf.tensors[i].mul_(torch.lt(leaf.uniform(i), chance, out=torch.empty_like(chance)))
        if share < 1 and by_chance:
            leaf.tensors[i].div_(chance.clamp_(min=torch.finfo(chance.dtype).tiny))  # none stayed of a chance of zero
    return leaf.tensors


def factors(pieces: Glimpse, *, density: Tensor, epsilon: Tensor, rescale: str) -> Tensor:
    """What the kept entries of each member are multiplied by, besides their chances: [n, 1], fp64."""
    return rescaling(pieces, rescale, lambda leaf: thinned(leaf, density, epsilon, False))


def kept(leaf: Leaf, density: Tensor, epsilon: Tensor, weight: Tensor, rescale: str) -> Tensor:
    """A random share of the entries, rescaled and weighted: [n, r, c]."""
    left = thinned(leaf, density, epsilon, rescale == "share")
    return left.mul_(weight * leaf.seen.to(weight).reshape(weight.shape))


@merging.add("della", version=2, source="arXiv:2406.11617", space="delta", glance=factors, sees="rows",
             symmetric=True, idempotent={"density": 1.0},
             unbiased={"density": 0.5, "epsilon": 0.25, "normalize": False, "rescale": "share"})
def della(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
          epsilon: PerMember[Probability] = 0.15, normalize: bool = True,
          rescale: Rescale = "share", lambda_: float = 1.0) -> Tensor:
    """Keep entries with chances of density - epsilon to density + epsilon, rescale them, then vote as TIES does.

    leaf.tensors  [n, r, c], differences to the base
    weight        [n, 1, 1]
    density       [n, 1, 1], the mean chance; at 1 nothing is dropped
    epsilon       [n, 1, 1]
    """
    return agreed(kept(leaf, density, epsilon, weight, rescale), weight, normalize).mul_(lambda_)


@merging.add("della_linear", version=2, source="arXiv:2406.11617", space="delta", glance=factors, sees="rows",
             symmetric=True, idempotent={"density": 1.0},
             unbiased={"density": 0.5, "epsilon": 0.25, "rescale": "share"})
def della_linear(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                 epsilon: PerMember[Probability] = 0.15, normalize: bool = False,
                 rescale: Rescale = "share", lambda_: float = 1.0) -> Tensor:
    """Keep entries with chances of density - epsilon to density + epsilon, rescale them, sum: lambda sum_i w_i d_i.

    leaf.tensors  [n, r, c], differences to the base
    weight        [n, 1, 1]
    density       [n, 1, 1], the mean chance; at 1 nothing is dropped
    epsilon       [n, 1, 1]
    """
    total = added(kept(leaf, density, epsilon, weight, rescale))
    return (total.div_(whole(weight)) if normalize else total).mul_(lambda_)
