"""Model Stock: the average of the members, drawn towards the base the more, the less they agree.

mergekit takes products of lengths below 1e-6 for 1e-6, which leaves tensors that changed little at the base; here, as
in the paper, only directions count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glue.merge import merging
from glue.merge.leaf import Leaf, gram, summed

SINGULAR = 1e-6  # |1 + (n-1) cosine| below which there is no estimate, and the base stays


@merging.add("model_stock", source="arXiv:2403.19522", space="delta", whole=True, members=(2, None), symmetric=True,
             idempotent={})
def model_stock(leaf: Leaf, *, filter_wise: bool = False) -> Tensor:
    """Go the share t = n c / (1 + (n-1) c) from the base to the average, with c the mean cosine of two differences.

    Cosines are those of the flattened tensors, or of each filter, along the last axis, if filter_wise.

    leaf.tensors  [n, *shape], differences to the base
    """
    n = leaf.n
    product = gram(leaf.tensors, -1 if filter_wise and leaf.tensors.ndim > 2 else None)
    length = [product[i, i].sqrt() for i in range(n)]
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            both = length[i] * length[j]
            cosines.append((product[i, j] / torch.where(both == 0, 1, both)).clamp(-1, 1))
    cosine = summed(torch.stack(cosines)) / len(cosines)
    below = 1 + (n - 1) * cosine
    t = torch.where(below.abs() < SINGULAR, 0, n * cosine / below)
    return (t / n).to(leaf.tensors.dtype) * summed(leaf.tensors)
