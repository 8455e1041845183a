"""TIES: trim each member's difference to the base, let the signs vote, sum what agrees.

As in mergekit, and unlike the paper, members may have weights, and are trimmed tensor by tensor; `scope: model` trims
them as the paper does, by one cut over all tensors. `rescale: l1` gives each member back the L1 norm that it had, in
the tensor or, with `scope: model`, in the whole model.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from glue.family import PerMember, Share
from glue.merge import merging
from glue.merge.cut import Cut
from glue.merge.leaf import Leaf
from glue.merge.sparsify import cut, keep_largest, rescaling
from glue.merge.target import Glimpse
from glue.merge.votes import agreed


def largest(pieces: Glimpse, *, density: Tensor, rescale: str) -> tuple[Cut, Tensor]:
    """Where each member is cut, and what its trimmed entries are multiplied by: [n, 1]."""
    edges = cut(pieces, density)
    return edges, rescaling(pieces, rescale, lambda leaf: keep_largest(leaf, edges))


@merging.add("ties", version=2, source="arXiv:2306.01708", space="delta", glance=largest, symmetric=True,
             idempotent={"density": 1.0})
def ties(leaf: Leaf, *, weight: PerMember[float] = 1.0, density: PerMember[Share] = 1.0, normalize: bool = True,
         rescale: Literal["none", "l1"] = "none", scope: Literal["tensor", "model"] = "tensor",
         lambda_: float = 1.0) -> Tensor:
    """Keep the share `density` of largest differences, elect the sign of their weighted sum, average what has it.

    lambda sum_i w_i d_i [sign(w_i d_i) = s] / sum_i w_i [sign(w_i d_i) = s], with s the sign of sum_i w_i d_i;
    without the division if normalize is false.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    density       [n, 1], of each whole tensor, or of the whole model
    """
    edges, factor = leaf.seen
    votes = keep_largest(leaf, edges).mul_(weight * factor.to(weight))
    return agreed(votes, weight, normalize).mul_(lambda_)
