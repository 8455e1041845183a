"""Targets: a tensor that is to be made, what it is made of, and the pieces of it that merge methods see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from glue.checkpoint import Header
from glue.family import Choice
from glue.merge.leaf import Leaf, Source, random_key

PIECE = 1 << 17  # entries that are merged at once: large enough for torch, small enough for the caches
Sees = Literal["pieces", "rows", "whole"]


@dataclass(frozen=True)
class Input:
    """One tensor of one member."""

    source: Source
    name: str

    @property
    def header(self) -> Header:
        """What its file says of it."""
        return self.source.weights.headers[self.name]


@dataclass(frozen=True)
class Target:
    """One tensor to be made.

    header  its type and shape
    choice  the method, with one value, or one for each input, in the order of the inputs
    inputs  what it is made of; all of one shape
    offset  flat index of its first entry in the whole model
    """

    name: str
    header: Header
    choice: Choice
    inputs: tuple[Input, ...]
    base: Input | None = None
    offset: int = 0

    @property
    def names(self) -> list[str]:
        """Of the members, in order."""
        return [each.source.name for each in self.inputs]

    @property
    def sees(self) -> Sees:
        """How the method wants to see the tensor: in flat pieces, in pieces of whole rows, or whole."""
        told = self.choice.method.traits.get("sees", "pieces")
        return told(self.name, self.header.shape, self.choice.params) if callable(told) else told


@dataclass
class Pieces:
    """The pieces of one tensor across its members, read from the files whenever one goes through them.

    work    the type of the numbers; fp32 for outputs of 16 bits and less, else fp64, unless given
    device  where the numbers are

    A leaf is valid until the next one is asked for, since all share their memory.
    """

    target: Target
    seed: int
    piece: int = PIECE
    work: torch.dtype | None = None
    device: str = "cpu"
    _read: tuple[list[Tensor], Tensor | None] | None = field(default=None, repr=False)
    _memory: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape, self.sees = self.target.header.shape, self.target.sees
        self.numel, self.n = prod(shape), len(self.target.inputs)
        row = max(1, shape[-1] if shape else 1)
        self.step = {"pieces": self.piece, "rows": max(1, self.piece // row) * row,
                     "whole": max(1, self.numel)}[self.sees]
        # The wider type: an error of the sums then stays far below half a unit in the last place of the output.
        self.work = self.work or (torch.float32 if self.target.header.dtype.itemsize < 4 else torch.float64)
        self.keys = tuple(random_key(self.seed, each.source.weights.fingerprint, each.name)
                          for each in self.target.inputs)

    def __iter__(self) -> Iterator[Leaf]:
        return (self.at(start) for start in range(0, self.numel, self.step))

    def at(self, start: int, count: int | None = None) -> Leaf:
        """The piece that begins at a flat index: of `count` entries, or fewer where the tensor ends."""
        if self._read is None:
            base = self.target.base
            self._read = [_flat(each) for each in self.target.inputs], _flat(base) if base else None
        members, below = self._read
        end = min(self.numel, start + (self.step if count is None else count))
        if self._memory is None or self._memory.shape[1] < end - start:
            self._memory = torch.empty(self.n + 1, max(end - start, min(self.step, self.numel)), dtype=self.work,
                                       device=self.device)
        memory = self._memory[:, :end - start]
        values = memory[:self.n]
        for row, source in zip(values, members, strict=True):
            row.copy_(source[start:end])
        if below is not None:
            below = memory[self.n].copy_(below[start:end])
            if self.target.choice.method.traits["space"] == "delta":
                values -= below
        shape = self._shape(end - start)
        return Leaf(self.target.name, values.view(self.n, *shape), None if below is None else below.view(shape), start,
                    self.keys, shape=self.target.header.shape, offset=self.target.offset)

    def _shape(self, count: int) -> Sequence[int]:
        if self.sees == "whole":
            return self.target.header.shape
        row = self.target.header.shape[-1] if self.target.header.shape else 1
        return (count // max(1, row), row) if self.sees == "rows" else (count,)


def _flat(each: Input) -> Tensor:
    return each.source.weights[each.name].detach().reshape(-1)


class Model:
    """The pieces of all tensors of a model, one tensor after the other, as a glance over the whole model sees them."""

    def __init__(self, parts: Sequence[Pieces]):
        self.parts = [part for part in parts if part.numel]
        self.numel, self.n = sum(part.numel for part in self.parts), self.parts[0].n if self.parts else 0

    def __iter__(self) -> Iterator[Leaf]:
        for part in self.parts:
            yield from part
            part._read = part._memory = None  # or every tensor would keep its own

    def at(self, start: int, count: int) -> Leaf:
        """The piece that begins at a flat index of the model; it ends where its tensor does."""
        part = next(part for part in reversed(self.parts) if part.target.offset <= start)
        return part.at(start - part.target.offset, count)


class Held:
    """A leaf in memory in the place of Pieces."""

    def __init__(self, leaf: Leaf):
        self.leaf, self.n, self.numel = leaf, leaf.n, leaf.tensors[0].numel()

    def __iter__(self) -> Iterator[Leaf]:
        yield self.at(0, self.numel)

    def at(self, start: int, count: int) -> Leaf:
        """The one piece there is; a copy, since a glance may change it in place."""
        return replace(self.leaf, tensors=self.leaf.tensors.clone())


Glimpse = Pieces | Model | Held  # what a glance is given
