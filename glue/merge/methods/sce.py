"""SCE: select the entries where members differ most, weigh members by what they changed, erase minority signs.

As in mergekit, members count alike where their mean squares sum to less than 1e-6, though the paper sets no such limit;
signs are elected before members are weighed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glue.family import Share
from glue.merge import merging
from glue.merge.cut import Cut, among_largest, cut_at
from glue.merge.leaf import Leaf
from glue.merge.target import Glimpse
from glue.merge.votes import won

FAINT = 1e-6


def variance(leaf: Leaf) -> Tensor:
    """Over the members, at each entry: [1, c]. Exactly zero where all members are equal."""
    apart, total = torch.empty_like(leaf.tensors[0]), torch.zeros_like(leaf.tensors[0])
    for delta in leaf.tensors[1:]:
        total.add_(torch.sub(delta, leaf.tensors[0], out=apart))
    mean = total.div_(leaf.n)
    spread = mean * mean  # of the first member, which is 0 apart from itself
    for delta in leaf.tensors[1:]:
        torch.sub(delta, leaf.tensors[0], out=apart).sub_(mean)
        spread.addcmul_(apart, apart)
    return spread.div_(leaf.n)[None]


def selected(leaf: Leaf, cut: Cut | None) -> Tensor:
    """The entries of leaf.tensors whose variance is among the largest of the tensor, the rest zero: [n, c]."""
    if cut is None:
        return leaf.tensors
    chosen = among_largest(variance(leaf), cut, leaf.offset + leaf.start)
    return leaf.tensors.mul_(chosen.view(torch.uint8).to(leaf.tensors.dtype))


def weighed(pieces: Glimpse, *, select_topk: float) -> tuple[Cut | None, Tensor]:
    """Where the variance is cut, None for nowhere; and each member's share in the squares of the rest: [n], fp64."""
    cut = None
    if select_topk < 1:
        varied = sum(int(variance(leaf).count_nonzero()) for leaf in pieces)
        cut, = cut_at(pieces, [int(varied * select_topk)], of=variance)
    squares = np.zeros(pieces.n)
    for leaf in pieces:
        squares += [_square(delta) for delta in selected(leaf, cut)]
    squares /= pieces.numel
    total = squares.sum()
    shares = squares / total if total >= FAINT else np.full(pieces.n, 1 / pieces.n)
    return cut, torch.from_numpy(shares)


def _square(delta: Tensor) -> float:
    """The sum of squares, in fp64; no number of threads changes its bits."""
    numbers = delta.cpu().numpy().astype(np.float64)
    return float(np.multiply(numbers, numbers, out=numbers).sum())


@merging.add("sce", version=2, source="arXiv:2408.07990", space="delta", glance=weighed, symmetric=True,
             idempotent={"select_topk": 1.0})
def sce(leaf: Leaf, *, select_topk: Share = 1.0) -> Tensor:
    """Average what has the sign s of the sum, where members vary most: sum_i w_i d_i [s_i = s] / sum_i w_i [s_i = s].

    w_i is the share of member i in the squares of what was selected.

    leaf.tensors  [n, c], differences to the base
    select_topk   share to select of the entries whose variance is not zero, in each whole tensor
    """
    cut, weight = leaf.seen
    total, counted = won(selected(leaf, cut), weight, weight)
    return total.div_(counted.clamp_(min=FAINT))
