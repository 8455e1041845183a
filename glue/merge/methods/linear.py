"""Linear: the weighted average of models."""

from __future__ import annotations

from torch import Tensor

from glue.family import PerMember
from glue.merge import merging
from glue.merge.leaf import Leaf
from glue.merge.parameters import whole


@merging.add("linear", source="arXiv:2203.05482", space="weight", symmetric=True, idempotent={})
def linear(leaf: Leaf, *, weight: PerMember[float] = 1.0, normalize: bool = True) -> Tensor:
    """Average the weights: sum_i w_i x_i, divided by sum_i w_i unless normalize is false.

    leaf.tensors  [n, c]
    weight        [n, 1]
    """
    total = leaf.tensors[0].mul_(weight[0])
    for x, w in zip(leaf.tensors[1:], weight[1:], strict=True):
        total.addcmul_(x, w)  # fused, as in mergekit: both give the same bits
    return total.div_(whole(weight)) if normalize else total
