"""WUDI: the difference to the base that acts on what each member reads as that member's own difference does.

The rows of a member's difference span what the member learnt to read, which stands in for its data. The paper goes 300
steps with Adam, from the sum of the differences towards the least interference; where that ends depends on the size
of a step beside that of the weights. Here the least is solved for, at the cost of about ten of those steps. What
stopping early did, a ridge does: it draws the result towards the same sum, and keeps it from growing along directions
that no member uses much, where the least alone is often several times the sum. 0.1 is nearest to the paper's steps
where entries differ from the base by 5e-4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from glue.family import NonNegative
from glue.merge import merging
from glue.merge.leaf import Leaf, summed
from glue.merge.matrices import Otherwise, by_matrix, layer_matrix, length

ROUNDING = 10  # times eps: below this the curvature is not known


def least_interfering(deltas: Tensor, ridge: float) -> Tensor:
    """The minimum over x of sum_i |(x - d_i) d_i'|^2 / |d_i|^2 + r |x - sum_i d_i|^2, with r in units of curvature.

    deltas   [n, outputs, inputs]; changed in place
    ridge    r over the mean curvature of the first sum, which is n / inputs
    returns  [outputs, inputs]
    """
    outputs, inputs = deltas.shape[1:]
    sizes = [length(delta) for delta in deltas]
    drawn = max(ridge / inputs, ROUNDING * torch.finfo(deltas.dtype).eps) * sum(size > 0 for size in sizes)
    pull = summed(deltas).mul_(drawn)
    if not drawn:
        return pull
    curvature = torch.zeros(inputs, inputs, dtype=deltas.dtype, device=deltas.device)
    for delta, size in zip(deltas, sizes, strict=True):
        if size > 0:
            delta /= size  # numbers near one: the fourth power of a difference can be too small for its type
            curvature.addmm_(delta.T, delta)
            if outputs < inputs:
                pull.addmm_(delta @ delta.T, delta, alpha=size)
            else:
                pull.addmm_(delta, delta.T @ delta, alpha=size)
    curvature.diagonal().add_(drawn)
    root = curvature.T  # the same, in LAPACK's order of entries: no step from here on makes a copy
    torch.linalg.cholesky(root, out=root)
    torch.linalg.solve_triangular(root.T, pull, upper=True, left=False, out=pull)
    return torch.linalg.solve_triangular(root, pull, upper=False, left=False, out=pull)


@merging.add("wudi", source="arXiv:2503.08099", space="delta", sees=layer_matrix, symmetric=True)
def wudi(leaf: Leaf, *, ridge: NonNegative = 0.1, inputs: Literal["columns", "rows"] = "columns",
         otherwise: Otherwise = "mean", lambda_: float = 1.0) -> Tensor:
    """Add lambda x to the base, where x interferes least with all members: sum_i |(x - d_i) d_i'|^2 / |d_i|^2.

    leaf.tensors  [n, rows, columns], differences to the base, for a matrix of a layer; [n, c] for a piece of another
    ridge         how strongly x is drawn to sum_i d_i, against the mean curvature; 0 for the least alone
    inputs        what a matrix is multiplied with: its columns, as in most models, or its rows, as in GPT-2
    otherwise     what is made of the differences of embeddings, heads and all that is not a matrix
    """
    def merge(deltas: Tensor) -> Tensor:
        return least_interfering(deltas, ridge) if inputs == "columns" else least_interfering(deltas.mT, ridge).T

    return by_matrix(leaf, otherwise, merge).mul_(lambda_)
