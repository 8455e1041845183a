"""Leaf: what a merge method sees, one tensor or one piece of it across all members."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import Weights

if TYPE_CHECKING:
    from glue.merge.factors import Factors

DRAWS = 8   # 32-bit draws that Philox makes of one count
CHANCES = 1 << 16  # steps of a chance, where a whole tensor has one
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
    factors  n low-rank changes of a linear weight, for methods in the space of factors; `name` is then that of its
             module, and tensors are [n, 0]. They are the members' own and may not be changed

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
    factors: tuple[Factors, ...] = ()

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

    def stays(self, i: int, chance: float) -> Tensor:
        """Which entries of member i stay, each with the same chance: 1 for those and 0 for the others, uint8.

        Chances count in steps of 1 / 65536, see `steps`. An entry's fate depends on what its draw depends on.
        """
        shape, limit = self.tensors.shape[1:], steps(chance)
        if limit == CHANCES:
            return torch.ones(shape, dtype=torch.uint8, device=self.tensors.device)
        lanes = 2 * DRAWS  # of 16 bits: half the work of a draw, and as exact as a chance need be
        found = np.less(self._raw(i, lanes).view(np.uint16)[self.start % lanes:][:shape.numel()], np.uint16(limit))
        return torch.from_numpy(found.view(np.uint8)).to(self.tensors.device).reshape(shape)

    def _words(self, i: int) -> np.ndarray:
        """Draws of 32 bits, of which the upper 24 are used: so many fit in fp32."""
        return self._raw(i, DRAWS).view(np.uint32)[self.start % DRAWS:][:self.tensors.shape[1:].numel()]

    def _raw(self, i: int, lanes: int) -> np.ndarray:
        """Words of 64 bits with all draws of this piece, where one count of the generator makes so many draws."""
        stream = np.random.Philox(key=self.keys[i], counter=self.start // lanes)
        # Raw words, because numpy promises that these never change, and promises nothing of Generator.random.
        return stream.random_raw(-(-(self.start % lanes + self.tensors.shape[1:].numel()) * 4 // lanes))


def steps(chance: float) -> int:
    """A chance in steps of 1 / 65536, at least one."""
    return max(1, round(float(np.float32(chance)) * CHANCES))


def random_key(seed: int, fingerprint: str, name: str) -> int:
    """128 bits of seed, member and tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{fingerprint}|{name}".encode()).digest()[:16], "little")


def summed(parts: Tensor) -> Tensor:
    """The sum over members, first to last: [n, *shape] -> [*shape]. Unlike Tensor.sum, no shape changes its bits."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
