"""FlexLoRA: the weighted mean of adapters, cut to the largest of their ranks.

The paper makes the mean as a dense matrix; here it is found from the factors, with the same result. What each client
gets back at its own rank are the first rows and columns of it.
"""

from __future__ import annotations

from glue.family import Count, PerMember
from glue.merge import merging
from glue.merge.factors import Factors, Keep, recompressed, stacked, weighted
from glue.merge.leaf import Leaf


@merging.add("flexlora", source="arXiv:2402.11505", space="factors", symmetric=True, idempotent={})
def flexlora(leaf: Leaf, *, weight: PerMember[float] = 1.0, rank: Count | None = None) -> Factors:
    """Average the changes, sum_i w_i s_i b_i a_i / sum_i w_i, and keep the largest singular values of the mean.

    leaf.factors  n of a [r_i, n], b [m, r_i] and a scale
    weight        [n]
    rank          how many are kept; unless given as many as the largest r_i
    """
    most = rank or max(1, *(part.rank for part in leaf.factors))
    return recompressed(stacked(weighted(leaf.factors, weight)), Keep(most))
