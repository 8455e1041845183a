"""Compression of a mixture: experts that were tuned from one base become that base and low-rank changes of it.

For each matrix the truncated singular value decomposition of expert - base, which no other factors of that rank beat
(Eckart and Young, 1936). It is found from the smaller Gram matrix, in fp64: what that loses, singular values below 1e-8
of the largest, lies under the rounding of fp32. Factors are stored in the type of the weights. Tensors that are no
matrices, and those whose factors would be no smaller, are stored as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import Header, Weights, as_bytes, fingerprint
from glue.errors import CheckpointError, MethodError, did_you_mean
from glue.kinds.compressed import LEFT, RIGHT, restored

NOTE = "compress.json"  # beside the weights: what is kept, and what that loses
ENTRIES = 1 << 22  # made fp64 at once
FACTORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NOTHING = 1e-10    # of the largest singular value; a direction with less is rounding


@dataclass(frozen=True)
class Rank:
    """Keep the r largest singular values of each matrix."""

    r: int

    def count(self, energies: Tensor) -> int:
        """How many of these squared singular values, the largest first, are kept."""
        return min(self.r, len(energies))

    def spelled(self) -> dict[str, float]:
        """As a recipe says it."""
        return {"rank": self.r}


@dataclass(frozen=True)
class Energy:
    """Keep the fewest singular values of each matrix whose squares sum to this share of all."""

    share: float

    def count(self, energies: Tensor) -> int:
        """How many of these squared singular values, the largest first, are kept."""
        reached = energies.clamp(min=0).cumsum(0)
        return int((reached < self.share * reached[-1]).sum()) + 1 if len(energies) else 0

    def spelled(self) -> dict[str, float]:
        """As a recipe says it."""
        return {"energy": self.share}


def keep(told: Mapping[str, float]) -> Rank | Energy:
    """What `{rank: r}` or `{energy: share}` says. Raises MethodError for anything else."""
    words = {"rank": Rank, "energy": Energy}
    for word in told:
        if word not in words:
            raise MethodError(f"svd has no parameter '{word}'{did_you_mean(word, words)}")
    if len(told) != 1:
        raise MethodError("svd keeps a rank or a share of energy; one of them has to be said, and not both",
                          fix="write  compress: {svd: {rank: 16}}  or  compress: {svd: {energy: 0.95}}")
    (word, value), = told.items()
    if word == "rank" and (value != int(value) or value < 1):
        raise MethodError(f"svd: a rank is a whole number of at least 1, not {value:g}", fix="write e.g.  rank: 16")
    if word == "energy" and not 0 < value <= 1:
        raise MethodError(f"svd: energy is a share above 0, up to 1, not {value:g}", fix="write e.g.  energy: 0.95")
    return Rank(int(value)) if word == "rank" else Energy(float(value))


def factored(delta: Tensor, kept: Rank | Energy) -> tuple[Tensor, Tensor, float]:
    """The nearest product of two factors to a matrix, and how far it is from it.

    delta  [rows, columns] -> left [rows, r], right [r, columns] in fp32, or fp64 where delta is; both have the root of
           each singular value, so that neither leaves the range of a narrow type. r is 0 for a matrix of zeros
    Returns (left, right, Frobenius norm of delta - left @ right before rounding). Raises CheckpointError for numbers
    that are not finite.
    """
    assert delta.dim() == 2, f"only matrices have singular values; this is {tuple(delta.shape)}"
    if delta.shape[0] < delta.shape[1]:
        right, left, error = factored(delta.T, kept)
        return left.T.contiguous(), right.T.contiguous(), error
    wide = torch.promote_types(delta.dtype, torch.float32)
    gram = torch.zeros(delta.shape[1], delta.shape[1], dtype=torch.float64)
    for block in _blocks(delta):
        gram.addmm_(block.T, block)
    if not bool(torch.isfinite(gram).all()):
        raise CheckpointError("a change from the base has numbers that are not finite", fix="look at both models")
    if not bool(gram.any()):
        return delta.new_zeros(len(delta), 0, dtype=wide), delta.new_zeros(0, delta.shape[1], dtype=wide), 0.0
    energies, directions = torch.linalg.eigh(gram)
    energies, directions = energies.flip(0), directions.flip(1)
    count = kept.count(energies)
    directions = directions[:, :count].contiguous()
    left = torch.cat([block @ directions for block in _blocks(delta)])
    values = left.norm(dim=0)
    real = values > NOTHING * values.max()
    missing = sqrt(max(0.0, float(energies[count:].clamp(min=0).sum())))
    root = values[real].sqrt()
    return (left[:, real] / root).to(wide), (directions[:, real] * root).T.to(wide).contiguous(), missing


def _blocks(delta: Tensor) -> Iterator[Tensor]:
    for rows in delta.split(max(1, ENTRIES // delta.shape[1])):
        yield rows.double()


@dataclass(frozen=True)
class Stored:
    """What became of one tensor of one expert; norms are Frobenius, of numbers as they are loaded again.

    how     same: as in the base, nothing is stored; factors; whole
    change  norm of expert - base          error  of expert - what is loaded
    norm    of the expert's tensor         nbytes, dense  what is stored, and what was
    """

    name: str
    how: Literal["same", "factors", "whole"]
    rank: int
    change: float
    error: float
    norm: float
    nbytes: int
    dense: int

    @property
    def lost(self) -> float:
        """The share of the change that is lost, 0 to 1."""
        return self.error / self.change if self.change else 0.0


@dataclass(frozen=True)
class Loss:
    """What compression cost, over all experts: bytes with the base, and relative Frobenius errors.

    of_change   of what experts changed of the base         of_weights  of the experts' weights
    worst       the tensor that lost the largest share of its change
    """

    before: int
    after: int
    of_change: float
    of_weights: float
    worst: str
    worst_lost: float

    def as_dict(self) -> dict[str, Any]:
        """For glue.json, the card and the board."""
        return {**vars(self), "ratio": self.after / self.before}


class Packed(Mapping[str, Tensor]):
    """The stored form of some experts over their base, to be written tensor by tensor; see glue.kinds.compressed.

    Factors are computed at once and wait in an unnamed file in `scratch`, since their sizes must be known before the
    first byte is written; base and whole tensors are read when they are asked for. Memory holds one tensor of the base
    and of one expert at a time: sources are copied before each, since a copy of a checkpoint maps its files anew.

    taken    what the mixture calls each tensor of an expert -> what the base and every expert call it
    Raises CheckpointError where an expert lacks one of them or has it in another shape.
    """

    def __init__(self, base: Weights, experts: Sequence[Weights], taken: Mapping[str, str], kept: Rank | Energy,
                 scratch: Path):
        _check(base, experts, taken.values())
        self._base, self._experts, self._taken = base, experts, dict(taken)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives as long as this does
        self._places: dict[str, tuple[int, Header]] = {}
        self._end = 0
        whole: dict[str, Header] = {}
        self.stored: list[Stored] = []
        needed: dict[str, Header] = {}
        for name, part in taken.items():
            below = copy(base)[part]  # once for all experts: it may be an average that is computed
            for k, expert in enumerate(experts):
                found = self._pack(f"expert_{k}.{name}", below, copy(expert)[part], kept)
                self.stored.append(found)
                if found.how == "whole":
                    whole[found.name] = _plain(expert.headers[part])
                else:
                    needed[f"base.{name}"] = _plain(base.headers[part])
        self.headers = {**needed, **whole, **{name: header for name, (_, header) in self._places.items()}}

    def _pack(self, name: str, base: Tensor, expert: Tensor, kept: Rank | Energy) -> Stored:
        nbytes, norm = expert.numel() * expert.element_size(), _norm(expert)
        if base.dtype == expert.dtype and torch.equal(base, expert):
            return Stored(name, "same", 0, 0.0, 0.0, norm, 0, nbytes)
        wide = torch.promote_types(expert.dtype, torch.float32)
        delta = expert.to(wide, copy=True).sub_(base)
        change = _norm(delta)
        whole = Stored(name, "whole", 0, change, 0.0, norm, nbytes, nbytes)
        if base.dtype != expert.dtype or expert.dim() != 2 or expert.dtype not in FACTORED:
            return whole
        try:
            left, right, _ = factored(delta, kept)
        except CheckpointError as wrong:
            raise CheckpointError(f"'{name}': {wrong.what}", fix=wrong.fix) from None
        left, right = left.to(expert.dtype), right.to(expert.dtype)
        size = (left.numel() + right.numel()) * expert.element_size()
        if size >= nbytes:
            return whole
        rows = max(1, ENTRIES // expert.shape[1])
        parts = zip(expert.split(rows), base.split(rows), left.split(rows), strict=True)
        error = sqrt(sum(_norm(mine.to(wide) - restored(below, some, right).to(wide)) ** 2
                         for mine, below, some in parts))
        self._put(name + LEFT, left)
        self._put(name + RIGHT, right)
        return Stored(name, "factors", left.shape[1], change, error, norm, size, nbytes)

    def _put(self, name: str, tensor: Tensor) -> None:
        data = as_bytes(tensor)
        self._file.write(data)
        self._places[name] = self._end, Header(tensor.dtype, tuple(tensor.shape))
        self._end += len(data)

    @property
    def loss(self) -> Loss:
        """Over everything that was packed."""
        before = sum(one.dense for one in self.stored)
        change, error, norm = (sqrt(sum(getattr(one, word) ** 2 for one in self.stored))
                               for word in ("change", "error", "norm"))
        worst = max(self.stored, key=lambda one: one.lost)
        return Loss(before, sum(header.nbytes for header in self.headers.values()), error / change if change else 0.0,
                    error / norm if norm else 0.0, worst.name, worst.lost)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._places:
            at, header = self._places[name]
            self._file.seek(at)
            data = np.frombuffer(bytearray(self._file.read(header.nbytes)), dtype=np.uint8)
            return torch.from_numpy(data).view(header.dtype).reshape(header.shape)
        owner, _, name = name.partition(".")
        source = self._base if owner == "base" else self._experts[int(owner.removeprefix("expert_"))]
        return copy(source)[self._taken[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that will be stored."""
        return fingerprint(self)


def _check(base: Weights, experts: Sequence[Weights], names: Iterable[str]) -> None:
    for name in names:
        for k, expert in enumerate(experts):
            shapes = [weights.headers[name].shape if name in weights.headers else None for weights in (base, expert)]
            if shapes[0] is None or shapes[0] != shapes[1]:
                raise CheckpointError(f"'{name}' is {shapes[0] or 'nothing'} in the base and {shapes[1] or 'nothing'} "
                                      f"in expert {k}", fix="leave compress out, or name the base that all of them "
                                                            "were tuned from")


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in fp64."""
    flat = tensor.reshape(-1)
    return sqrt(sum(float((part.double() ** 2).sum()) for part in flat.split(ENTRIES)))


def _plain(header: Header) -> Header:
    return Header(header.dtype, header.shape)
