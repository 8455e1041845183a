"""SCE: select the entries where members differ most, weigh members by what they changed, erase minority signs.

As in mergekit, members count alike where their mean squares sum to less than 1e-6, though the paper sets no such limit;
signs are elected before members are weighed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glue.family import Share
from glue.merge import merging
from glue.merge.leaf import Leaf, inner, summed
from glue.merge.sparsify import Cut, among_largest, cut_at
from glue.merge.votes import with_winner

FAINT = 1e-6


def variance(deltas: Tensor) -> Tensor:
    """Over the members, at each entry: [n, c] -> [1, c]. Exactly zero where all members are equal."""
    apart = deltas - deltas[0]
    return (summed((apart - summed(apart) / len(deltas)).square()) / len(deltas))[None]


def selected(leaf: Leaf, cut: Cut | None) -> Tensor:
    """The entries of leaf.tensors whose variance is among the largest of the tensor, the rest zero: [n, c]."""
    return leaf.tensors if cut is None else leaf.tensors * among_largest(variance(leaf.tensors), cut, leaf.start)


def weighed(leaf: Leaf, *, select_topk: float) -> tuple[Cut | None, Tensor]:
    """Where the variance is cut, None for nowhere; and each member's share in the squares of what is left: [n, 1]."""
    cut = None
    if select_topk < 1:
        spread = variance(leaf.tensors)
        cut = cut_at(spread, [int(int(spread.count_nonzero()) * select_topk)])
    squares = [inner(delta, delta) / delta.numel() for delta in selected(leaf, cut)]
    total = sum(squares)
    shares = [square / total if total >= FAINT else 1 / leaf.n for square in squares]
    return cut, torch.tensor(shares, dtype=torch.float64).reshape(-1, 1)


@merging.add("sce", source="arXiv:2408.07990", space="delta", glance=weighed, symmetric=True,
             idempotent={"select_topk": 1.0})
def sce(leaf: Leaf, *, select_topk: Share = 1.0) -> Tensor:
    """Average what has the sign s of the sum, where members vary most: sum_i w_i d_i [s_i = s] / sum_i w_i [s_i = s].

    w_i is the share of member i in the squares of what was selected.

    leaf.tensors  [n, c], differences to the base
    select_topk   share to select of the entries whose variance is not zero, in each whole tensor
    """
    cut, weight = leaf.seen
    deltas = selected(leaf, cut)
    counted = weight.to(deltas.dtype) * with_winner(deltas)
    return summed(deltas * counted) / summed(counted).clamp(min=FAINT)
