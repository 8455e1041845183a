"""FFA-LoRA: adapters that share one frozen a, so that the mean of their b is the mean of their changes."""

from __future__ import annotations

import torch

from glue.errors import MethodError
from glue.family import PerMember
from glue.merge import merging
from glue.merge.factors import Factors, averaged_apart
from glue.merge.leaf import Leaf


@merging.add("ffa", source="arXiv:2403.12313", space="factors", symmetric=True, idempotent={})
def ffa(leaf: Leaf, *, weight: PerMember[float] = 1.0) -> Factors:
    """Average b alone: (sum_i w_i s_i b_i) a, with sum_i w_i = 1; exact, and at the rank that the clients have.

    leaf.factors  n of one a [r, n], b [m, r] and a scale
    weight        [n], divided by its sum
    """
    a = leaf.factors[0].a
    if not all(torch.equal(part.a, a) for part in leaf.factors[1:]):
        raise MethodError(f"merge method 'ffa' is for adapters that were trained with one frozen A, and those of "
                          f"'{leaf.name}' differ", fix="use flora, which sums any adapters exactly")
    made = averaged_apart(leaf.factors, weight)
    return Factors(a, made.b, made.scale)
