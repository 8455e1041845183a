"""TIES: trim each member's difference to the base, let the signs vote, sum what agrees.

As in mergekit, and unlike the paper, members are trimmed tensor by tensor and may have weights.
"""

from __future__ import annotations

from torch import Tensor

from glue.family import PerMember, Share
from glue.merge import merging
from glue.merge.leaf import Leaf
from glue.merge.sparsify import Cut, cut, keep_largest
from glue.merge.votes import agreed


def largest(leaf: Leaf, *, density: Tensor) -> Cut:
    """Where each member's tensor is cut."""
    return cut(leaf.tensors, density)


@merging.add("ties", source="arXiv:2306.01708", space="delta", glance=largest, symmetric=True,
             idempotent={"density": 1.0})
def ties(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0, normalize: bool = True,
         lambda_: float = 1.0) -> Tensor:
    """Keep the share `density` of largest differences, elect the sign of their weighted sum, average what has it.

    lambda sum_i w_i d_i [sign(w_i d_i) = s] / sum_i w_i [sign(w_i d_i) = s], with s the sign of sum_i w_i d_i;
    without the division if normalize is false.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1], of each whole tensor
    """
    return lambda_ * agreed(keep_largest(leaf, leaf.seen), weight, normalize)
