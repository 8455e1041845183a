"""Extraction: what a model changes of its base, layer by layer as factors of low rank, and what is left out of that.

The change of a layer is made in fp64, some columns at a time for its inner products, and once as a whole, when room for
these is not needed any more. So a layer of a model of 7 billion parameters takes 0.5 GB, and few are cut at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from glue.checkpoint import Weights
from glue.errors import CheckpointError
from glue.merge.factors import Factors, Keep, factored
from glue.merge.matrices import COLUMNS
from glue.merge.target import PIECE

HELD = 1_000_000_000  # bytes of layers that are cut at once, by all workers together
ROWS = 64  # of which a difference is made at a time


def change(model: Weights, base: Weights, module: str, keep: Keep) -> Factors | None:
    """The nearest low-rank change that makes one layer of the base that of the model; None where they are the same.

    The difference is made in fp64, and held as a whole. Raises CheckpointError for numbers that are not finite.
    """
    name = f"{module}.weight"
    delta = Difference(model[name], base[name])
    norm = _away(delta.one, delta.other)
    if not isfinite(norm):
        raise CheckpointError(f"'{name}' of the model or its base has numbers that are not finite",
                              fix="repair its weights first")
    return factored(delta, keep) if norm else None


@dataclass(frozen=True)
class Difference:
    """One matrix less another of its shape, in fp64; it is made when it is asked for, and kept by nobody."""

    one: Tensor
    other: Tensor

    @property
    def T(self) -> Difference:
        """The same the other way round."""
        return Difference(self.one.T, self.other.T)

    @property
    def shape(self) -> torch.Size:
        """[rows, columns]"""
        return self.one.shape

    @property
    def device(self) -> torch.device:
        """Where it will be."""
        return self.one.device

    def __len__(self) -> int:
        return len(self.one)

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        return self.one[at].double() - self.other[at].double()

    def double(self) -> Tensor:
        """All of it, with nothing else beside it."""
        found = torch.empty_like(self.one, dtype=torch.float64)
        for start in range(0, len(found), ROWS):
            at = slice(start, start + ROWS), slice(None)
            found[at] = self[at]
        return found


def held(shape: tuple[int, int]) -> int:
    """Bytes that cutting a layer of this shape takes: inner products of its shorter side, LAPACK's room for their
    eigenvectors, and the columns that went into them; and in the end all of it."""
    rows, columns = sorted(shape)
    return 8 * (max(3 * rows**2, rows * columns) + 4 * rows * min(columns, COLUMNS))


def changed(model: Weights, base: Weights, names: Iterable[str]) -> dict[str, float]:
    """The Frobenius norm of the difference of each tensor, for those that differ."""
    found = {name: _away(model[name], base[name]) for name in names}
    return {name: away for name, away in found.items() if away}


def _away(one: Tensor, other: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64)
    flat = one.reshape(-1), other.reshape(-1)
    for start in range(0, len(flat[0]), PIECE):
        total += (flat[0][start:start + PIECE].double() - flat[1][start:start + PIECE].double()).square().sum()
    return float(total.sqrt())
