"""Gram matrices: inner products of all pairs of members, from which lengths and angles follow."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from glue.merge.leaf import Leaf

BLOCK = 1 << 16  # entries that are made fp64 at once
RUN = 1 << 6     # products that are summed one after the other; then runs are summed in pairs


def gram(pieces: Iterable[Leaf]) -> Tensor:
    """Inner products of whole tensors: [n, n], fp64. Products are exact where the numbers are fp32.

    Unlike torch's, its sums are the same for any number of threads.
    """
    total: np.ndarray | float = 0.0
    for leaf in pieces:
        numbers = leaf.tensors.reshape(leaf.n, -1).cpu().numpy()
        for start in range(0, numbers.shape[1], BLOCK):
            total = total + _products(numbers[:, start:start + BLOCK].astype(np.float64))
    return torch.from_numpy(np.asarray(total))


def _products(numbers: np.ndarray) -> np.ndarray:
    n, whole = len(numbers), numbers.shape[1] // RUN * RUN
    runs, rest = numbers[:, :whole].reshape(n, -1, RUN), numbers[:, whole:]
    found = np.empty((n, n))
    for i in range(n):
        sums = np.einsum("kc,jkc->jk", runs[i], runs[i:]).sum(1)  # einsum of whole rows would add one by one
        found[i, i:] = found[i:, i] = sums + (rest[i] * rest[i:]).sum(1)
    return found


def gram_along(tensors: Tensor, axis: int) -> Tensor:
    """Inner products of all vectors along one axis: [n, *shape] -> [n, n, *shape], with 1 for that axis, fp64."""
    numbers = tensors.cpu().numpy().astype(np.float64)
    n, shape = len(numbers), list(numbers.shape[1:])
    shape[axis] = 1
    found = np.empty((n, n, *shape))
    for i in range(n):
        for j in range(i, n):
            found[i, j] = found[j, i] = (numbers[i] * numbers[j]).sum(axis, keepdims=True)
    return torch.from_numpy(found).to(tensors.device)
