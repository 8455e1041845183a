"""FLoRA: the exact weighted sum of adapters, their factors side by side."""

from __future__ import annotations

from glue.family import Count, PerMember, Share
from glue.merge import merging
from glue.merge.factors import Factors, Keep, recompressed, stacked, weighted
from glue.merge.leaf import Leaf


@merging.add("flora", source="arXiv:2409.05976", space="factors", symmetric=True, idempotent={})
def flora(leaf: Leaf, *, weight: PerMember[float] = 1.0, normalize: bool = True, rank: Count | None = None,
          energy: Share | None = None, error: Share | None = None) -> Factors | tuple[Factors, ...]:
    """Sum the changes: sum_i w_i s_i b_i a_i, divided by sum_i w_i unless normalize is false; ranks may differ.

    The rank of the sum is the sum of the ranks. Where rank, energy or error is given, the sum is replaced by the
    nearest change of the lowest rank that will do.

    leaf.factors  n of a [r_i, n], b [m, r_i] and a scale
    weight        [n]
    rank          the most of each weight; energy: the least share of its squared singular values that is kept
    error         the most that may be lost of it, in units of its Frobenius norm
    """
    parts, keep = weighted(leaf.factors, weight, normalize), Keep(rank, energy, error)
    return parts if keep.everything else recompressed(stacked(parts), keep)
