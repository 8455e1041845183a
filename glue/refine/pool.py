"""What a selector sees of a dataset: its examples in clusters, and what has been measured of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Pool:
    """n examples, of which `size` are wanted; what a selector does not need may be None.

    cluster    [n], the cluster of each example, counted from 0
    values     [c], what each cluster is worth; a cluster without examples is allowed
    places     [n, h], where each example lies; near is alike
    losses     [n], how surprised the base is by each answer, in bits a byte
    """

    size: int
    seed: int
    cluster: np.ndarray
    values: np.ndarray | None = None
    places: np.ndarray | None = None
    losses: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.cluster)

    @property
    def wanted(self) -> int:
        """How many a selector returns."""
        return min(self.size, len(self))

    def rng(self) -> np.random.Generator:
        """Where a selector's chance comes from."""
        return np.random.default_rng([self.seed, len(self)])

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The examples of each cluster in an order that the seed decides, the same for any size."""
        rng, count = self.rng(), int(self.cluster.max(initial=-1)) + 1 if self.values is None else len(self.values)
        return [rng.permutation(np.flatnonzero(self.cluster == k)) for k in range(count)]
