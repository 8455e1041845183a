"""Task arithmetic: what each member learnt, added to the base."""

from __future__ import annotations

from torch import Tensor

from glue.family import PerMember
from glue.merge import merging
from glue.merge.combine import added
from glue.merge.leaf import Leaf
from glue.merge.parameters import whole


@merging.add("task_arithmetic", source="arXiv:2212.04089", space="delta", symmetric=True, idempotent={})
def task_arithmetic(leaf: Leaf, *, weight: PerMember[float] = 1.0, normalize: bool = False,
                    lambda_: float = 1.0) -> Tensor:
    """Add the differences to the base: lambda sum_i w_i d_i, divided by sum_i w_i if normalize is true.

    leaf.tensors  [n, c], differences to the base
    weight        [n, 1]
    """
    total = added(leaf.tensors.mul_(weight))
    return (total.div_(whole(weight)) if normalize else total).mul_(lambda_)
