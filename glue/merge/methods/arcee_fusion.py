"""Arcee Fusion: the first model, with those weights of the second that matter most.

A weight matters by how far it moved, times how much the softmax of its row changed (KL divergence). Unlike mergekit,
rows are compared in fp64, since in fp32 small changes drown in rounding, and the threshold is that of all entries,
not of a sample where there are more than a million.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glue.merge import merging
from glue.merge.cut import ranked
from glue.merge.leaf import Leaf
from glue.merge.target import Glimpse

FLOOR = 1e-8  # is added to each probability


def importance(leaf: Leaf) -> Tensor:
    """|y - x| times the divergence of y's softmax from x's: [1, r, c], fp64."""
    x, y = leaf.tensors
    p, q = y.double().softmax(-1) + FLOOR, x.double().softmax(-1) + FLOOR
    # Unlike torch's sums, numpy's are the same for any threads. A divergence is less than zero by rounding alone.
    divergence = (p * (p / q).log()).cpu().numpy().sum(-1, keepdims=True).clip(min=0)
    return (y - x).abs_().double().mul_(torch.from_numpy(divergence).to(x.device))[None]


def edge(pieces: Glimpse) -> float:
    """The importance from which on entries are taken."""
    numel = pieces.numel
    lower, median, upper = ranked(pieces, [numel - int(share * (numel - 1)) for share in (0.25, 0.5, 0.75)], importance)
    return median + 1.5 * (upper - lower)


@merging.add("arcee_fusion", version=2, source="https://arcee.ai", space="weight", glance=edge, sees="rows",
             members=(2, 2), idempotent={})
def arcee_fusion(leaf: Leaf) -> Tensor:
    """Take the second model's entries of an importance of at least median + 1.5 (upper - lower quartile).

    leaf.tensors  [2, r, c]
    """
    x, y = leaf.tensors
    taken = importance(leaf)[0].ge_(leaf.seen).to(x.dtype)  # numbers, since torch is slow with masks
    return y.sub_(x).mul_(taken).add_(x)
