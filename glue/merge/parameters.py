"""Parameters of a merge: from what a recipe says of the members to one number for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glue.errors import MethodError, did_you_mean
from glue.family import Choice, is_per_member


def settled(choice: Choice, names: Sequence[str], ndim: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the method is called with: parameters that differ by member as tensors [n, 1, ..., 1], the rest as is.

    names  of the n members, in order
    ndim   of the tensor that is merged, the members not counted
    """
    rows = by_member(choice, names)
    return {word: torch.tensor(rows[word], dtype=dtype).reshape(-1, *[1] * ndim) if word in rows else value
            for word, value in choice.params.items()}


def whole(weight: Tensor) -> Tensor:
    """The sum of the weights, to divide by. Raises MethodError where they cancel out."""
    total = weight.sum()
    if total.abs() <= 1e-6 * weight.abs().sum():
        raise MethodError(f"the weights {weight.flatten().tolist()} sum to 0, so they cannot be normalized",
                          fix="change the weights, or switch normalizing off where the method allows it")
    return total


def by_member(choice: Choice, names: Sequence[str]) -> dict[str, list[float]]:
    """The parameters that take a value for each member, as n numbers in the order of `names`. Raises MethodError."""
    about = f"{choice.method.name}: "
    return {word: _row(f"{about}'{word}'", choice.params[word], names)
            for word, info in choice.method.parameters.items() if is_per_member(info.annotation, info.metadata)}


def _row(what: str, value: Any, names: Sequence[str]) -> list[float]:
    if isinstance(value, dict):
        value = _in_order(what, value, names)
    row = value if isinstance(value, list) else [value] * len(names)
    if len(row) != len(names):
        raise MethodError(f"{what} has {len(row)} values for {len(names)} members ({', '.join(names)})",
                          fix="give one value for all, one for each, or a mapping from their names")
    wrong = [number for number in row if not math.isfinite(number)]
    if wrong:
        raise MethodError(f"{what} cannot be {wrong[0]}", fix="give finite numbers")
    return [float(number) for number in row]


def _in_order(what: str, given: dict[str, float], names: Sequence[str]) -> list[float]:
    found: dict[int, tuple[str, float]] = {}
    for word, value in given.items():
        places = [k for k, name in enumerate(names) if name == word] or \
                 [k for k, name in enumerate(names) if name.rsplit("/", 1)[-1] == word]
        if not places:
            raise MethodError(f"{what} names '{word}', which is not merged here{did_you_mean(word, names)}",
                              fix="its keys are the names of the members, or the last part of those names")
        if len(places) > 1:
            raise MethodError(f"{what} names '{word}', which fits {len(places)} members "
                              f"({', '.join(names[k] for k in places)})", fix="write the full name, or a list")
        if places[0] in found:
            raise MethodError(f"{what} names '{names[places[0]]}' twice, as '{found[places[0]][0]}' and '{word}'",
                              fix="keep one of the two")
        found[places[0]] = word, value
    missing = [name for k, name in enumerate(names) if k not in found]
    if missing:
        raise MethodError(f"{what} has no value for {', '.join(repr(name) for name in missing)}",
                          fix="a mapping names every member")
    return [found[k][1] for k in range(len(names))]
