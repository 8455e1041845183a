"""Breadcrumbs: drop the smallest and the very largest differences to the base, sum the rest or let the signs vote.

As in mergekit, and unlike the paper, what is given is the share that stays and the share of outliers, and members may
have weights. Where both shares do not fit, fewer outliers are dropped.
"""

from __future__ import annotations

from torch import Tensor

from glue.family import PerMember, Probability, Share
from glue.merge import merging
from glue.merge.leaf import Leaf, summed
from glue.merge.parameters import whole
from glue.merge.sparsify import Cut, among_largest, cut_at
from glue.merge.votes import agreed


def ends(leaf: Leaf, *, density: Tensor, gamma: Tensor) -> tuple[Cut, Cut]:
    """Where each member's tensor is cut below and above: int(density * numel) entries lie between the two."""
    numel = leaf.tensors[0].numel()
    kept = [int(share * numel) for share in density.reshape(-1).tolist()]
    dropped = [min(int(share * numel), numel - count)
               for share, count in zip(gamma.reshape(-1).tolist(), kept, strict=True)]
    return cut_at(leaf.tensors, [k + d for k, d in zip(kept, dropped, strict=True)]), cut_at(leaf.tensors, dropped)


def middle(leaf: Leaf) -> Tensor:
    """The entries that lie between the two cuts, the rest zero: [n, c]."""
    below, above = (among_largest(leaf.tensors, cut, leaf.start) for cut in leaf.seen)
    return leaf.tensors * (below & ~above)


@merging.add("breadcrumbs", source="arXiv:2312.06795", space="delta", glance=ends, symmetric=True,
             idempotent={"density": 1.0})
def breadcrumbs(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                gamma: PerMember[Probability] = 0.01, normalize: bool = False, lambda_: float = 1.0) -> Tensor:
    """Drop the share `gamma` of largest differences, keep the share `density` below it, sum: lambda sum_i w_i d_i.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1], of each whole tensor; at 1 nothing is dropped, outliers neither
    gamma         [n, 1], of each whole tensor
    """
    total = summed(weight * middle(leaf))
    return lambda_ * (total / whole(weight) if normalize else total)


@merging.add("breadcrumbs_ties", source="arXiv:2312.06795", space="delta", glance=ends, symmetric=True,
             idempotent={"density": 1.0})
def breadcrumbs_ties(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0,
                     gamma: PerMember[Probability] = 0.01, normalize: bool = False, lambda_: float = 1.0) -> Tensor:
    """Drop and keep as breadcrumbs does, then elect signs and sum what agrees, as TIES does.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1], of each whole tensor; at 1 nothing is dropped, outliers neither
    gamma         [n, 1], of each whole tensor
    """
    return lambda_ * agreed(middle(leaf), weight, normalize)
