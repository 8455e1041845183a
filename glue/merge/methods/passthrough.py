"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from torch import Tensor

from glue.merge import merging
from glue.merge.leaf import Leaf


@merging.add("passthrough", source="mergekit", space="weight", members=(1, 1), idempotent={})
def passthrough(leaf: Leaf, *, scale: float = 1.0) -> Tensor:
    """Take the only member: scale x.

    leaf.tensors  [1, c]
    """
    return scale * leaf.tensors[0]
