"""Combine: sums over the members of a leaf, which use up its tensors. Memory that is new costs more than a sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def added(tensors: Tensor) -> Tensor:
    """The sum over members, first to last: [n, *shape] -> [*shape], which is tensors[0]."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total += tensor
    return total


def combined(factors: Tensor | Sequence[float], tensors: Tensor) -> Tensor:
    """sum_i factors[i] tensors[i]: n numbers and [n, *shape] -> [*shape], which is tensors[0]."""
    total = tensors[0]
    for i, (factor, tensor) in enumerate(zip(factors, tensors, strict=True)):
        if i:
            total.add_(tensor, alpha=float(factor))
        else:
            total.mul_(float(factor))
    return total
