"""Matrices: tell the weight matrices of layers from other tensors, take them apart and put them together again.

Products are made in fp64, some columns at a time and in the place of what is not needed any more, so that beside the
members there are only small squares: [rows, rows], where rows are the shorter side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from glue.merge.leaf import Leaf, summed

Otherwise = Literal["mean", "sum"]
COLUMNS = 512  # that are multiplied at once
ROWS = 32      # that are measured at once
EPS = torch.finfo(torch.float64).eps

# Lookup tables and heads, whose rows belong to tokens, places or labels.
TABLES = re.compile(r"(^|\.)(\w*embe?d\w*|wte|wpe|\w*head|output_layer|score|classifier|(text|visual)_projection"
                    r"|relative_attention_bias)(\.|$)|^(model\.)?(output|shared)\.|^cls\.")


def layer_matrix(name: str, shape: tuple[int, ...], params: Mapping[str, Any]) -> Literal["whole", "pieces"]:
    """Trait `sees` of the methods for matrices: whole where the tensor is the weight matrix of a layer.

    Everything else they merge entry by entry: vectors, stacks of matrices, and embeddings and heads, which only their
    names tell from other matrices.
    """
    return "whole" if len(shape) == 2 and not TABLES.search(name) else "pieces"


def by_matrix(leaf: Leaf, otherwise: Otherwise, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """What `merge` makes of the matrix of a layer; of a piece of anything else, the mean or the sum.

    leaf.tensors  [n, rows, columns], a matrix; or [n, c]
    """
    if leaf.tensors.ndim == 2:
        return summed(leaf.tensors) / (leaf.n if otherwise == "mean" else 1)
    if not all(end.isfinite() for end in leaf.tensors.aminmax()):
        return torch.full_like(leaf.tensors[0], torch.nan)  # LAPACK would raise; the output is refused, with the name
    with one_thread():
        return merge(leaf.tensors)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread: how many share the work of LAPACK decides the last bits of what it finds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def directions(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Singular values and left singular vectors, without those that are zero but for rounding, smallest first.

    matrix   [rows, columns], rows <= columns
    most     singular values, the largest, that are wanted
    returns  [k] and [rows, k], fp64; a matrix of zeros has k = 0

    They are those of the inner products of rows: at half the time and memory of a decomposition of the matrix, values
    below sqrt(rows eps), a millionth of the largest, are lost; the directions of those are noise in weights.
    """
    squares, vectors = eigen(dots(matrix))
    k = min(most, int((squares > len(squares) * EPS * squares[-1]).sum()))
    return squares[len(squares) - k:].sqrt(), vectors[:, len(squares) - k:].clone()  # a view would hold all of them


def eigen(products: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors of a symmetric matrix, in whose place they are written."""
    values = products.new_empty(len(products))
    torch.linalg.eigh(products.mT, out=(values, products.mT))  # LAPACK's order of entries: no copy is made
    return values, products.mT


class Matrix(Protocol):
    """[rows, columns], as a tensor or as something that makes a part of it when that is asked for."""

    @property
    def T(self) -> Any: ...
    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def __getitem__(self, at: Any, /) -> Tensor: ...
    def double(self) -> Tensor: ...


def dots(*parts: Matrix) -> Tensor:
    """Inner products of all rows of matrices [rows_i, columns]: [sum of rows, sum of rows], fp64."""
    rows = sum(len(part) for part in parts)
    found = torch.zeros(rows, rows, dtype=torch.float64, device=parts[0].device)
    for _, block in _blocks(parts):
        found.addmm_(block, block.T)
    return found


def mixed(mix: Tensor, *parts: Tensor, into: Tensor) -> Tensor:
    """Combinations of all rows of matrices [rows_i, columns], written where one of them may be.

    mix   [k, sum of rows], fp64
    into  [k, columns]
    """
    for at, block in _blocks(parts):
        into[:, at] = mix @ block
    return into


def length(matrix: Tensor) -> float:
    """The root of the sum of squares, in fp64."""
    parts = [torch.linalg.vector_norm(rows, dtype=torch.float64) for rows in matrix.split(ROWS)]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def _blocks(parts: tuple[Matrix, ...]) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, parts[0].shape[1], COLUMNS):
        at = slice(start, start + COLUMNS)
        yield at, torch.cat([part[:, at] for part in parts]).double()
