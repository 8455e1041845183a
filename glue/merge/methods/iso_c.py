"""Iso-C: the sum of the differences to the base, with all its singular values made equal.

Directions that the sum does not have stay zero, and the mean is over those that it has: the paper's mean counts zeros
too, and gives their share to directions that rounding chose. Of a sum of full rank both are the same.
"""

from __future__ import annotations

from torch import Tensor

from glue.merge import merging
from glue.merge.leaf import Leaf
from glue.merge.matrices import Otherwise, by_matrix, directions, layer_matrix, mixed


def flattened(deltas: Tensor) -> Tensor:
    """The sum, with the mean of its singular values in the place of each: [n, rows, columns] -> [rows, columns]."""
    if deltas.shape[1] > deltas.shape[2]:
        return flattened(deltas.mT).T
    total = deltas[0]
    for delta in deltas[1:]:
        total += delta
    s, u = directions(total, len(total))
    return mixed(s.sum() / max(1, len(s)) * (u / s @ u.T), total, into=total)


@merging.add("iso_c", source="arXiv:2502.04959", space="delta", sees=layer_matrix, symmetric=True)
def iso_c(leaf: Leaf, *, otherwise: Otherwise = "mean", lambda_: float = 1.0) -> Tensor:
    """Add lambda s U V to the base, where U diag(S) V is the sum of the differences and s the mean of S.

    leaf.tensors  [n, rows, columns], differences to the base, for a matrix of a layer; [n, c] for a piece of another
    otherwise     what is made of the differences of embeddings, heads and all that is not a matrix
    """
    return by_matrix(leaf, otherwise, flattened).mul_(lambda_)
