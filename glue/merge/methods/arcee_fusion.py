"""Arcee Fusion: the first model, with those weights of the second that matter most.

A weight matters by how far it moved, times how much the softmax of its row changed (KL divergence). Unlike mergekit,
rows are compared in fp64, since in fp32 small changes drown in rounding, and the threshold is that of all entries,
not of a sample where there are more than a million.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glue.merge import merging
from glue.merge.leaf import Leaf

ROWS = 1024   # that are compared at once
FLOOR = 1e-8  # is added to each probability


def importance(x: Tensor, y: Tensor) -> Tensor:
    """|y - x| times the divergence of y's softmax from x's: [rows, columns] -> [rows, columns], fp64."""
    p, q = y.double().softmax(-1) + FLOOR, x.double().softmax(-1) + FLOOR
    divergence = (p * (p / q).log()).numpy().sum(-1, keepdims=True)  # unlike torch's sums, the same for any threads
    return (y - x).abs() * torch.from_numpy(divergence)


@merging.add("arcee_fusion", source="https://arcee.ai", space="weight", whole=True, members=(2, 2), idempotent={})
def arcee_fusion(leaf: Leaf) -> Tensor:
    """Take the second model's entries of an importance of at least median + 1.5 (upper - lower quartile).

    leaf.tensors  [2, *shape]
    """
    x, y = leaf.tensors.reshape(2, -1, leaf.tensors.shape[-1] if leaf.tensors.ndim > 1 else 1)
    scores = torch.cat([importance(*rows) for rows in zip(x.split(ROWS), y.split(ROWS), strict=True)])
    places = [int(share * (scores.numel() - 1)) for share in (0.25, 0.5, 0.75)]
    lower, median, upper = np.partition(scores.reshape(-1).numpy(), places)[places]
    kept = scores >= median + 1.5 * (upper - lower)
    return (x + kept * (y - x)).reshape(leaf.tensors.shape[1:])
