"""Zero padding: adapters of different ranks filled up with zeros, and then averaged as by FedIT."""

from __future__ import annotations

from glue.family import PerMember
from glue.merge import merging
from glue.merge.factors import Factors, averaged_apart
from glue.merge.leaf import Leaf


@merging.add("zero_pad", source="arXiv:2401.06432", space="factors", symmetric=True, idempotent={})
def zero_pad(leaf: Leaf, *, weight: PerMember[float] = 1.0) -> Factors:
    """Pad a and b with zeros to the largest rank, and average them apart; as inexact as fedit.

    leaf.factors  n of a [r_i, n], b [m, r_i] and a scale; where scales differ, they go into b
    weight        [n], divided by its sum
    """
    return averaged_apart(leaf.factors, weight)
