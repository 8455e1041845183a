"""DARE: drop entries of the differences to the base at random, rescale the rest, sum them or let their signs vote.

`rescale: share` divides by the density, as the paper does, so that the mean over seeds is what was there before.
`rescale: l1` restores the L1 norm of each tensor instead, as mergekit does since 0.1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from glue.family import PerMember, Share
from glue.merge import merging
from glue.merge.combine import added
from glue.merge.leaf import CHANCES, Leaf, steps
from glue.merge.parameters import whole
from glue.merge.sparsify import keep_random, rescaling
from glue.merge.target import Glimpse
from glue.merge.votes import agreed

Rescale = Literal["none", "share", "l1"]


def factors(pieces: Glimpse, *, density: Tensor, rescale: str) -> Tensor:
    """What the kept entries of each member are multiplied by: [n, 1], fp64."""
    if rescale == "share":  # of what the chance is in truth, so that the mean is what it should be
        return density.clone().apply_(lambda share: CHANCES / steps(share))
    return rescaling(pieces, rescale, lambda leaf: keep_random(leaf, density))


def kept(leaf: Leaf, density: Tensor, weight: Tensor) -> Tensor:
    """A random share of the entries, rescaled and weighted: [n, c]."""
    return keep_random(leaf, density).mul_(weight * leaf.seen.to(weight))


@merging.add("dare_linear", version=2, source="arXiv:2311.03099", space="delta", glance=factors, symmetric=True,
             idempotent={"density": 1.0}, unbiased={"density": 0.5, "rescale": "share"})
def dare_linear(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                normalize: bool = False, rescale: Rescale = "share", lambda_: float = 1.0) -> Tensor:
    """Keep each entry with probability `density`, rescale it, sum: lambda sum_i w_i m_i d_i f_i, with f_i = 1/density.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1]
    """
    total = added(kept(leaf, density, weight))
    return (total.div_(whole(weight)) if normalize else total).mul_(lambda_)


@merging.add("dare_ties", version=2, source="arXiv:2311.03099", space="delta", glance=factors, symmetric=True,
             idempotent={"density": 1.0}, unbiased={"density": 0.5, "rescale": "share"})
def dare_ties(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
              normalize: bool = False, rescale: Rescale = "share", lambda_: float = 1.0) -> Tensor:
    """Keep each entry with probability `density`, rescale it, then elect signs and sum what agrees, as TIES does.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1]
    """
    return agreed(kept(leaf, density, weight), weight, normalize).mul_(lambda_)
