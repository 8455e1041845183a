"""Leaf: what a merge method sees, one tensor or one piece of it across all members."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import Weights

DRAWS = 8   # 32-bit draws that Philox makes of one count
UNUSED = 8  # bits of a draw


@dataclass(frozen=True)
class Source:
    """A member as merging sees it: a name and weights."""

    name: str
    weights: Weights


@dataclass(frozen=True)
class Leaf:
    """One tensor, or a piece of it, across n members.

    name     of the tensor
    tensors  [n, c], a flat piece; [n, r, c], whole rows, for methods that see `rows`; [n, *shape] for those that see
             it `whole`. Weights, or differences to the base
    base     the same without n, or None where no base was given
    start    flat index, in the tensor, of the first entry of the piece
    keys     n keys of 128 bits, of member and tensor, for random numbers
    seen     what the method's glance at the whole tensor found
    shape    of the whole tensor
    offset   flat index, in the model, of the first entry of the tensor

    The numbers are wider than the output: fp32 for outputs of 16 bits and less, else fp64. They belong to the leaf
    and may be changed in place.
    """

    name: str
    tensors: Tensor
    base: Tensor | None = None
    start: int = 0
    keys: tuple[int, ...] = ()
    seen: Any = None
    shape: tuple[int, ...] = ()
    offset: int = 0

    @property
    def n(self) -> int:
        """How many members."""
        return len(self.tensors)

    def uniform(self, i: int) -> Tensor:
        """Draws for member i, uniform in [0, 1), one for each entry: [c] or [*shape], fp32.

        An entry's draw depends on the seed, the member, the tensor and the entry's flat index, and on nothing else.
        """
        draws = (self._words(i) >> UNUSED).astype(np.float32)
        draws *= np.float32(2**-24)
        return torch.from_numpy(draws).to(self.tensors.device).reshape(self.tensors.shape[1:])

    def below(self, i: int, chance: float) -> Tensor:
        """Where the draws for member i are less than a chance, of which fp32 counts: 1 there, 0 elsewhere, uint8.

        The same entries as  uniform(i) < chance, without turning the draws into fractions.
        """
        limit = int(np.ceil(np.float64(np.float32(chance)) * 2**24))  # in fp64 the product is exact
        if limit >= 2**24:
            return torch.ones(self.tensors.shape[1:], dtype=torch.uint8, device=self.tensors.device)
        found = np.less(self._words(i), np.uint32(limit << UNUSED))
        return torch.from_numpy(found.view(np.uint8)).to(self.tensors.device).reshape(self.tensors.shape[1:])

    def _words(self, i: int) -> np.ndarray:
        """Draws of 32 bits, of which the upper 24 are used: so many fit in fp32."""
        count, skipped = self.tensors.shape[1:].numel(), self.start % DRAWS
        stream = np.random.Philox(key=self.keys[i], counter=self.start // DRAWS)
        # Raw words, because numpy promises that these never change, and promises nothing of Generator.random.
        return stream.random_raw(-(-(skipped + count) // 2)).view(np.uint32)[skipped:skipped + count]


def random_key(seed: int, fingerprint: str, name: str) -> int:
    """128 bits of seed, member and tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{fingerprint}|{name}".encode()).digest()[:16], "little")


def summed(parts: Tensor) -> Tensor:
    """The sum over members, first to last: [n, *shape] -> [*shape]. Unlike Tensor.sum, no shape changes its bits."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
