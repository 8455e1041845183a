"""Task singular vectors: the strongest directions of each difference to the base, made orthogonal to those of others.

The vectors of all members are replaced by the nearest ones that are orthogonal (Procrustes), u (u' u)^-1/2. Unlike the
paper's code, vectors whose singular value is zero take no part, and vectors of several members that are one and the
same stay one: so members of low rank in different directions are summed exactly, and copies of a member are that
member, where nearest vectors would be whatever rounding chose. At least one vector of each member is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glue.family import Share
from glue.merge import merging
from glue.merge.leaf import Leaf
from glue.merge.matrices import Otherwise, by_matrix, directions, dots, eigen, layer_matrix, mixed

SAME = 1e-6  # squared length, over the largest, of combinations of vectors that count as zero: an angle of 1e-3


def inverse_root(products: Tensor) -> Tensor:
    """The inverse of the square root of a positive matrix, zero where that is zero; `products` is lost."""
    squares, vectors = eigen(products)
    vectors *= torch.where(squares > SAME * squares[-1], squares, torch.inf).pow(-0.25)
    return vectors @ vectors.T


def decorrelated(deltas: Tensor, share: float) -> Tensor:
    """sum_j s_j u_j v_j over the kept vectors of all members: [n, rows, columns] -> [rows, columns]."""
    if deltas.shape[1] > deltas.shape[2]:
        return decorrelated(deltas.mT, share).T
    most = max(1, int(share * deltas.shape[1] / len(deltas)))
    kept = [directions(delta, most) for delta in deltas]
    right = [mixed((u / s).T, delta, into=delta[:len(s)]) for (s, u), delta in zip(kept, deltas, strict=True)]
    s, left = (torch.cat(each, dim=-1) for each in zip(*kept, strict=True))
    del kept
    if not len(s):
        return deltas[0]
    mix = left @ inverse_root(left.T @ left).mul_(s) @ inverse_root(dots(*right))
    return mixed(mix, *right, into=deltas[0])


@merging.add("tsv", source="arXiv:2412.00081", space="delta", sees=layer_matrix, symmetric=True)
def tsv(leaf: Leaf, *, share: Share = 1.0, otherwise: Otherwise = "mean", lambda_: float = 1.0) -> Tensor:
    """Keep the min(rows, columns) / n largest singular values of each difference, make all vectors orthogonal, sum.

    leaf.tensors  [n, rows, columns], differences to the base, for a matrix of a layer; [n, c] for a piece of another
    share         of those min(rows, columns) / n to keep
    otherwise     what is made of the differences of embeddings, heads and all that is not a matrix
    """
    return by_matrix(leaf, otherwise, lambda deltas: decorrelated(deltas, share)).mul_(lambda_)
