"""Multi-SLERP: the weighted mean of directions, with the weighted mean of lengths.

mergekit goes on from the mean direction along the mean of the tangents there. That mean is zero by construction, so
the step is left out. Where directions cancel out, mergekit takes the weighted sum of two tensors and refuses more;
here it is the weighted sum for any number, so that tensors that nobody changed can be merged.
"""

from __future__ import annotations

from torch import Tensor

from glue.family import PerMember, Positive
from glue.merge import merging
from glue.merge.combine import combined
from glue.merge.gram import gram
from glue.merge.leaf import Leaf
from glue.merge.parameters import whole
from glue.merge.target import Glimpse


def shares(pieces: Glimpse, *, weight: Tensor, normalize_weights: bool, eps: float) -> Tensor:
    """What each member is multiplied by: [n], fp64."""
    weight = (weight / whole(weight) if normalize_weights else weight).flatten()
    product = gram(pieces)
    length = product.diagonal().sqrt()
    scaled = weight / (length + eps)
    mean = (scaled[:, None] * product * scaled).sum().clamp(min=0).sqrt()
    return weight if mean < eps else scaled * ((weight * length).sum() / mean)


@merging.add("multislerp", version=2, source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
             space="delta", base="optional", glance=shares, symmetric=True, idempotent={})
def multislerp(leaf: Leaf, *, weight: PerMember[float] = 1.0, normalize_weights: bool = True,
               eps: Positive = 1e-8) -> Tensor:
    """Average directions and lengths apart: (sum_i w_i |x_i|) m / |m|, with m = sum_i w_i x_i / |x_i|.

    Weights are divided by their sum unless normalize_weights is false; where |m| < eps, sum_i w_i x_i.

    leaf.tensors  [n, c], differences to the base where there is one
    weight        [n, 1]
    """
    return combined(leaf.seen, leaf.tensors)
