"""Breadcrumbs: drop the smallest and the very largest differences to the base, sum the rest or let the signs vote.

As in mergekit, and unlike the paper, what is given is the share that stays and the share of outliers, and members may
have weights. Where both shares do not fit, fewer outliers are dropped. `rescale: l1` gives each tensor back the L1 norm
that it had.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from glue.family import PerMember, Probability, Share
from glue.merge import merging
from glue.merge.combine import added
from glue.merge.cut import Cut, cut_at
from glue.merge.leaf import Leaf
from glue.merge.parameters import whole
from glue.merge.sparsify import drop_largest, keep_largest, rescaling
from glue.merge.target import Glimpse
from glue.merge.votes import agreed

Rescale = Literal["none", "l1"]


def ends(pieces: Glimpse, *, density: Tensor, gamma: Tensor, rescale: str) -> tuple[Cut, Cut, Tensor]:
    """Where each member's tensor is cut below and above, and what is left is multiplied by: [n, 1].

    int(density * numel) entries lie between the two cuts.
    """
    numel = pieces.numel
    kept = [int(share * numel) for share in density.flatten().tolist()]
    dropped = [min(int(share * numel), numel - count)
               for share, count in zip(gamma.flatten().tolist(), kept, strict=True)]
    below, above = cut_at(pieces, [k + d for k, d in zip(kept, dropped, strict=True)], dropped)
    return below, above, rescaling(pieces, rescale, lambda leaf: middle(leaf, below, above))


def middle(leaf: Leaf, below: Cut, above: Cut) -> Tensor:
    """The entries that lie between the two cuts, the rest zero: [n, c]."""
    keep_largest(leaf, below)
    return drop_largest(leaf, above)


def kept(leaf: Leaf, weight: Tensor) -> Tensor:
    """What is left, rescaled and weighted: [n, c]."""
    below, above, factor = leaf.seen
    return middle(leaf, below, above).mul_(weight * factor.to(weight))


@merging.add("breadcrumbs", version=2, source="arXiv:2312.06795", space="delta", glance=ends, symmetric=True,
             idempotent={"density": 1.0})
def breadcrumbs(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                gamma: PerMember[Probability] = 0.01, normalize: bool = False, rescale: Rescale = "none",
                lambda_: float = 1.0) -> Tensor:
    """Drop the share `gamma` of largest differences, keep the share `density` below it, sum: lambda sum_i w_i d_i.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1], of each whole tensor; at 1 nothing is dropped, outliers neither
    gamma         [n, 1], of each whole tensor
    """
    total = added(kept(leaf, weight))
    return (total.div_(whole(weight)) if normalize else total).mul_(lambda_)


@merging.add("breadcrumbs_ties", version=2, source="arXiv:2312.06795", space="delta", glance=ends, symmetric=True,
             idempotent={"density": 1.0})
def breadcrumbs_ties(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                     gamma: PerMember[Probability] = 0.01, normalize: bool = False, rescale: Rescale = "none",
                     lambda_: float = 1.0) -> Tensor:
    """Drop and keep as breadcrumbs does, then elect signs and sum what agrees, as TIES does.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1], of each whole tensor; at 1 nothing is dropped, outliers neither
    gamma         [n, 1], of each whole tensor
    """
    return agreed(kept(leaf, weight), weight, normalize).mul_(lambda_)
