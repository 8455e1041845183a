"""Leaf: what a merge method sees, one tensor or one piece of it across all members."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import Weights

BLOCK = 1 << 16  # entries; fixed, because the blocks of a sum decide its last bit
DRAWS = 8        # 32-bit draws that Philox makes of one count


@dataclass(frozen=True)
class Source:
    """A member as merging sees it: a name and weights."""

    name: str
    weights: Weights


@dataclass(frozen=True)
class Leaf:
    """One tensor, or a piece of it, across n members.

    name     of the tensor
    tensors  [n, c], a flat piece; [n, *shape] for methods that declare `whole`. Weights, or differences to the base
    base     [c] or [*shape], or None where no base was given
    start    flat index, in the tensor, of the first entry of the piece
    keys     n keys of 128 bits, of member and tensor, for random numbers
    seen     what the method's glance at the whole tensor found

    The numbers are wider than the output: fp32 for outputs of 16 bits and less, else fp64. They belong to the leaf
    and may be changed in place.
    """

    name: str
    tensors: Tensor
    base: Tensor | None = None
    start: int = 0
    keys: tuple[int, ...] = ()
    seen: Any = None

    @property
    def n(self) -> int:
        """How many members."""
        return len(self.tensors)

    def uniform(self, i: int) -> Tensor:
        """Draws for member i, uniform in [0, 1), one for each entry: [c] or [*shape], fp32.

        An entry's draw depends on the seed, the member, the tensor and the entry's flat index, and on nothing else.
        """
        shape = self.tensors.shape[1:]
        count, skipped = shape.numel(), self.start % DRAWS
        stream = np.random.Philox(key=self.keys[i], counter=self.start // DRAWS)
        # Raw words, because numpy promises that these never change, and promises nothing of Generator.random.
        words = stream.random_raw(-(-(skipped + count) // 2)).view(np.uint32)[skipped:skipped + count]
        return torch.from_numpy((words >> 8).astype(np.float32) * np.float32(2**-24)).reshape(shape)


def random_key(seed: int, fingerprint: str, name: str) -> int:
    """128 bits of seed, member and tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{fingerprint}|{name}".encode()).digest()[:16], "little")


def summed(parts: Tensor) -> Tensor:
    """The sum over members, first to last: [n, *shape] -> [*shape]. Unlike Tensor.sum, no shape changes its bits."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def inner(one: Tensor, other: Tensor) -> float:
    """The inner product of two tensors in fp64. Unlike torch.dot, no number of threads changes its bits."""
    a, b = one.reshape(-1).numpy(), other.reshape(-1).numpy()
    return math.fsum(float(np.sum(a[k:k + BLOCK].astype(np.float64) * b[k:k + BLOCK].astype(np.float64)))
                     for k in range(0, len(a), BLOCK))


def gram(tensors: Tensor, axis: int | None = None) -> Tensor:
    """Inner products of all pairs of members, whole or along one axis, in fp64; no number of threads changes a bit.

    tensors  [n, *shape]
    axis     of *shape; None for all of it
    returns  [n, n, *shape], with 1 for the axes that were summed
    """
    n, ones = len(tensors), [1] * (tensors.ndim - 1)
    found: dict[tuple[int, int], Tensor] = {}
    for i in range(n):
        for j in range(i, n):
            if axis is None:
                product = torch.tensor(inner(tensors[i], tensors[j]), dtype=torch.float64).reshape(ones)
            else:
                both = tensors[i].numpy().astype(np.float64) * tensors[j].numpy().astype(np.float64)
                product = torch.from_numpy(both.sum(axis=axis, keepdims=True))
            found[i, j] = found[j, i] = product
    return torch.stack([torch.stack([found[i, j] for j in range(n)]) for i in range(n)])
