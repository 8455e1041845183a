"""Model Stock: the average of the members, drawn towards the base the more, the less they agree.

mergekit takes products of lengths below 1e-6 for 1e-6, which leaves tensors that changed little at the base; here, as
in the paper, only directions count.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from glue.merge import merging
from glue.merge.combine import added, combined
from glue.merge.gram import gram, gram_along
from glue.merge.leaf import Leaf, summed
from glue.merge.target import Glimpse

SINGULAR = 1e-6  # |1 + (n-1) cosine| below which there is no estimate, and the base stays


def share(product: Tensor) -> Tensor:
    """How far to go from the base, of the inner products of n differences: [n, n, *shape] -> [*shape], fp64."""
    n, cosines = len(product), []
    length = [product[i, i].sqrt() for i in range(n)]
    for i, j in combinations(range(n), 2):
        both = length[i] * length[j]
        cosines.append((product[i, j] / torch.where(both == 0, 1, both)).clamp(-1, 1))
    cosine = summed(torch.stack(cosines)) / len(cosines)
    below = 1 + (n - 1) * cosine
    return torch.where(below.abs() < SINGULAR, 0, n * cosine / below)


def flattened(pieces: Glimpse, *, filter_wise: bool) -> float | None:
    """The share where cosines are those of the flattened tensors."""
    return None if filter_wise else float(share(gram(pieces)))


@merging.add("model_stock", version=2, source="arXiv:2403.19522", space="delta", glance=flattened, members=(2, None),
             sees=lambda name, shape, params: "rows" if params["filter_wise"] else "pieces", symmetric=True,
             idempotent={})
def model_stock(leaf: Leaf, *, filter_wise: bool = False) -> Tensor:
    """Go the share t = n c / (1 + (n-1) c) from the base to the average, with c the mean cosine of two differences.

    Cosines are those of the flattened tensors, or of each filter, along the last axis, if filter_wise.

    leaf.tensors  [n, c], or [n, r, c] if filter_wise; differences to the base
    """
    if leaf.seen is not None:
        return combined([leaf.seen / leaf.n] * leaf.n, leaf.tensors)
    t = share(gram_along(leaf.tensors, -1))
    return added(leaf.tensors).mul_((t / leaf.n).to(leaf.tensors.dtype))
