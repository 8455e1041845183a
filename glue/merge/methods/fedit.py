"""FedIT: the factors of adapters averaged apart, the simple way that FLoRA is compared with.

The mean of products is not the product of means: what comes out is off by all pairs of clients, unless these share
one a, or one b. It is here as a baseline, and for rounds in which factors have to keep their meaning.
"""

from __future__ import annotations

from glue.errors import MethodError
from glue.family import PerMember
from glue.merge import merging
from glue.merge.factors import Factors, averaged_apart
from glue.merge.leaf import Leaf


@merging.add("fedit", source="arXiv:2305.05644", space="factors", symmetric=True, idempotent={})
def fedit(leaf: Leaf, *, weight: PerMember[float] = 1.0) -> Factors:
    """Average a and b apart: (sum_i w_i b_i) (sum_i w_i a_i), with sum_i w_i = 1; all need one rank.

    leaf.factors  n of a [r, n], b [m, r] and a scale; where scales differ, they go into b
    weight        [n], divided by its sum
    """
    ranks = sorted({part.rank for part in leaf.factors})
    if len(ranks) > 1:
        raise MethodError(f"merge method 'fedit' averages factors of one rank, and those of '{leaf.name}' have ranks "
                          f"{', '.join(map(str, ranks))}", fix="use flora, which sums any ranks exactly, or zero_pad")
    return averaged_apart(leaf.factors, weight)
