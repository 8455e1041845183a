"""How alike the weights of models are: the mean column cosine of Model-GLUE, all pairs in one pass.

For members a and b, S(a, b) is the mean over tensors of the mean over input columns of cos(W_a[:, j], W_b[:, j]).
The tensors are the matrices [out, in] whose name says self_attn or mlp; each counts once, however large it is.
Departures from the published code: a column that is zero in both members counts 1 and one that is zero in a single
member counts 0 (there: 0 and 0), so that copies are always exactly alike, and so are the columns that neither of two
fine-tunes has moved; members of other shapes give NaN where the published code fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import Weights
from glue.errors import CheckpointError

Part = Literal["all", "attention", "mlp"]
PARTS: dict[str, tuple[str, ...]] = {"all": ("self_attn", "mlp"), "attention": ("self_attn",), "mlp": ("mlp",)}
BLOCK = 1 << 16  # entries of one member that are compared at a time: small enough for the cache and for sums in fp32


def similarity(sources: Sequence[Weights], *, part: Part = "all", base: Weights | None = None,
               progress: Callable[[list[str]], Iterable[str]] = iter) -> np.ndarray:
    """Mean column cosine of every pair of sources.

    base      compare W - W_base instead of W; a source that does not have the shapes of the base is NaN to all others
    progress  wraps the list of tensor names that one pass goes through, such as rich's `track`
    returns   [n, n] float64: exactly symmetric, exactly 1 on the diagonal, NaN between members of different shape

    Sums are taken in fp32 within a block, or fp64 where a source is fp64, and in fp64 across blocks. Every tensor is
    read once; memory is one block of all members, besides what a source makes up when it is asked for a tensor.
    Raises CheckpointError where a source has no such matrix, or packs it into integers.
    """
    result = np.full((len(sources), len(sources)), np.nan)
    np.fill_diagonal(result, 1.0)
    for members, names in _same_shape(sources, part, base):
        total = np.zeros((len(members), len(members)))
        for name in progress(names):
            total += _column_cosines([sources[k][name] for k in members], None if base is None else base[name])
        above = np.triu(total / len(names), 1)
        result[np.ix_(members, members)] = (above + above.T).clip(-1, 1) + np.eye(len(members))
    return result


def compatible(a: Weights, b: Weights) -> str:
    """Why a and b cannot be merged tensor by tensor: the first difference in names or shapes; "" if there is none."""
    for name in sorted(set(a.headers) | set(b.headers)):
        if name not in a.headers or name not in b.headers:
            return f"'{name}' is only in the {'first' if name in a.headers else 'second'}"
        one, other = a.headers[name].shape, b.headers[name].shape
        if one != other:
            return f"'{name}' is {list(one)} in the first and {list(other)} in the second"
    return ""


def _same_shape(sources: Sequence[Weights], part: Part, base: Weights | None) -> list[tuple[list[int], list[str]]]:
    """The sources in groups that have the same matrices, each with the names of these; groups of one left out."""
    groups: dict[tuple, list[int]] = {}
    for k, source in enumerate(sources):
        groups.setdefault(_matrices(source, part, f"source {k}"), []).append(k)
    if base is not None:
        shapes = _matrices(base, part, "the base")
        groups = {key: members for key, members in groups.items() if key == shapes}
    return [(members, [name for name, _ in key]) for key, members in groups.items() if len(members) > 1]


def _matrices(source: Weights, part: Part, who: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = {name: header for name, header in source.headers.items()
             if len(header.shape) == 2 and header.numel and any(word in name for word in PARTS[part])}
    if not found:
        raise CheckpointError(f"{who} has no matrix whose name says {' or '.join(PARTS[part])}: nothing to compare",
                              fix="leave it out; only models whose parts are named as in Llama can be compared")
    packed = [name for name, header in found.items() if not header.dtype.is_floating_point]
    if packed:
        raise CheckpointError(f"{who} stores '{packed[0]}' as {found[packed[0]].dtype}: packed weights have no cosine",
                              fix="write it in a floating type first, or leave it out")
    return tuple(sorted((name, header.shape) for name, header in found.items()))


def _column_cosines(tensors: list[Tensor], base: Tensor | None) -> np.ndarray:
    """The mean over columns of the cosine of columns, for all pairs.

    tensors  n of [out, in]
    returns  [n, n]; only what is above the diagonal is meant to be used
    """
    rows, columns = tensors[0].shape
    exact = any(tensor.dtype == torch.float64 for tensor in tensors)
    work = torch.float64 if exact else torch.float32
    step = max(1, BLOCK // columns)

    def blocks() -> Iterable[Tensor]:
        for start in range(0, rows, step):
            block = torch.stack([tensor[start:start + step].to(work) for tensor in tensors])
            yield block if base is None else block - base[start:start + step].to(work)

    squares = torch.zeros(len(tensors), columns, dtype=torch.float64)
    for block in blocks():
        squares += block.square().sum(1)
    zero = squares == 0
    scale = torch.where(zero, 0.0, squares.rsqrt()).to(work)
    total = zero.double() @ zero.double().T
    for block in blocks():
        unit = (block * scale[:, None]).flatten(1)
        total += unit @ unit.T
    return (total / columns).numpy()
