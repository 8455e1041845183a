"""DARE: drop entries of the differences to the base at random, rescale the rest, sum them or let their signs vote.

`rescale: share` divides by the density, as the paper does, so that the mean over seeds is what was there before.
`rescale: l1` restores the L1 norm of each tensor instead, as mergekit does since 0.1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from glue.family import PerMember, Share
from glue.merge import merging
from glue.merge.leaf import Leaf, summed
from glue.merge.parameters import whole
from glue.merge.sparsify import keep_random, to_same_l1
from glue.merge.votes import agreed


def factors(leaf: Leaf, *, density: Tensor, rescale: str) -> Tensor:
    """What the kept entries of each member are multiplied by: [n], fp64."""
    if rescale == "share":
        return 1 / density.reshape(-1)
    return to_same_l1(leaf.tensors, keep_random(leaf, density))


def kept(leaf: Leaf, density: Tensor) -> Tensor:
    """A random share of the entries, rescaled: [n, c]."""
    return keep_random(leaf, density) * leaf.seen.to(leaf.tensors.dtype).reshape(density.shape)


@merging.add("dare_linear", source="arXiv:2311.03099", space="delta", glance=factors, symmetric=True,
             idempotent={"density": 1.0}, unbiased={"density": 0.5, "rescale": "share"})
def dare_linear(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                normalize: bool = False, rescale: Literal["share", "l1"] = "share", lambda_: float = 1.0) -> Tensor:
    """Keep each entry with probability `density`, rescale it, sum: lambda sum_i w_i m_i d_i f_i, with f_i = 1/density.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1]
    """
    total = summed(weight * kept(leaf, density))
    return lambda_ * (total / whole(weight) if normalize else total)


@merging.add("dare_ties", source="arXiv:2311.03099", space="delta", glance=factors, symmetric=True,
             idempotent={"density": 1.0}, unbiased={"density": 0.5, "rescale": "share"})
def dare_ties(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
              normalize: bool = False, rescale: Literal["share", "l1"] = "share", lambda_: float = 1.0) -> Tensor:
    """Keep each entry with probability `density`, rescale it, then elect signs and sum what agrees, as TIES does.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1]
    """
    return lambda_ * agreed(kept(leaf, density), weight, normalize)
