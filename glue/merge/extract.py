"""Extraction: what a model changes of its base, layer by layer as factors of low rank, and what is left out of that."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from glue.checkpoint import Weights
from glue.errors import CheckpointError
from glue.merge.factors import Factors, Keep, factored
from glue.merge.target import PIECE


def change(model: Weights, base: Weights, module: str, keep: Keep) -> Factors | None:
    """The nearest low-rank change that makes one layer of the base that of the model; None where they are the same.

    The difference is made in fp64, and held as a whole. Raises CheckpointError for numbers that are not finite.
    """
    name = f"{module}.weight"
    delta = model[name].double() - base[name].double()
    if not delta.sum().isfinite():
        raise CheckpointError(f"'{name}' of the model or its base has numbers that are not finite",
                              fix="repair its weights first")
    return factored(delta, keep) if delta.any() else None


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
