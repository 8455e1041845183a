"""Kind "tensor_train": changes of linear weights as chains of small cores, read and run through the model below.

A weight [m, n] with m = m_1 ... m_a and n = n_1 ... n_b is a tensor of a + b short sides; its change is the product of
one core [r, side, r'] for each of them. A LoRA is the chain of two cores. Nothing here is nonlinear, so every change
can be added to its weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from glue.checkpoint import ADAPTER, Checkpoint, Header, Weights
from glue.errors import CheckpointError, one_line
from glue.files import write_aside
from glue.hub import locate
from glue.kinds import Dtype, Running, kinds, weights
from glue.kinds.frame import framed
from glue.kinds.seed_history import dense
from glue.member import Member, canonical

CONFIG, TYPE = "adapter_config.json", "GLUE_TENSOR_TRAIN"
CORE = "{module}.tt_core_{k}"
SIDE = 8  # the sides of a tensor are made about so long


@dataclass(frozen=True)
class Train:
    """A change of one linear weight [m, n].

    cores  k of [r, side, r'], where r of the first and r' of the last are 1
    rows   how many of them make the m; the others make the n
    """

    cores: tuple[Tensor, ...]
    rows: int

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the tensor that the weight is seen as."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Between neighbouring cores."""
        return tuple(core.shape[2] for core in self.cores[:-1])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that is changed."""
        return prod(self.sides[:self.rows]), prod(self.sides[self.rows:])

    @property
    def numel(self) -> int:
        """How many numbers the cores have."""
        return sum(core.numel() for core in self.cores)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change as b @ a, where b is what the cores of the rows make: a [r, n], b [m, r], of the cores' type."""
        left, right = (_joined(part) for part in (self.cores[:self.rows], self.cores[self.rows:]))
        return right.reshape(right.shape[0], -1), left.reshape(-1, left.shape[-1])

    def dense(self) -> Tensor:
        """The change itself: [m, n], fp64."""
        a, b = Train(tuple(core.double() for core in self.cores), self.rows).factors()
        return b @ a


def sides(extent: int, longest: int = SIDE) -> tuple[int, ...]:
    """An extent as a product of sides of about `longest`: its prime factors, put together while they fit."""
    found: list[int] = []
    rest, prime = extent, 2
    while rest > 1:
        prime = prime if prime * prime <= rest else rest
        while rest % prime == 0:
            rest //= prime
            if found and found[-1] * prime <= longest:
                found[-1] *= prime
            else:
                found.append(prime)
        prime += 1
    return tuple(found) or (1,)


def _joined(cores: tuple[Tensor, ...]) -> Tensor:
    """The product of neighbouring cores: [r of the first, all sides in one, r' of the last]."""
    whole = cores[0]
    for core in cores[1:]:
        whole = (whole.reshape(-1, core.shape[0]) @ core.reshape(core.shape[0], -1)).reshape(
            whole.shape[0], -1, core.shape[2])
    return whole


def write_trains(folder: Path, trains: Mapping[str, Train]) -> None:
    """Put the trains of linear layers, by the names of their modules, into a folder, in fp32."""
    from safetensors.torch import save

    tensors = {CORE.format(module=module, k=k): core.to(torch.float32).contiguous()
               for module, train in trains.items() for k, core in enumerate(train.cores)}
    told = {"peft_type": TYPE, "rows": {module: train.rows for module, train in trains.items()}}
    write_aside(folder / ADAPTER, save(tensors, metadata={"format": "pt"}))
    write_aside(folder / CONFIG, canonical(told))


def read_trains(folder: Path) -> dict[str, Train]:
    """The trains in a folder, by module. Raises CheckpointError where they are none, or do not hold together."""
    try:
        told = json.loads((folder / CONFIG).read_bytes())
        if told["peft_type"] != TYPE:
            raise ValueError(f"peft_type is {one_line(str(told['peft_type']), 40)}")
        stored, found = Checkpoint(folder / ADAPTER), {}
        for module, rows in sorted(told["rows"].items()):
            names = [CORE.format(module=module, k=k) for k in range(len(stored))]
            cores = tuple(stored[name] for name in names if name in stored)
            ends = [1, *(core.shape[2] for core in cores)]
            if not 0 < rows < len(cores) or ends[-1] != 1 or [core.shape[0] for core in cores] != ends[:-1]:
                raise ValueError(f"the cores of '{module}' are {[tuple(core.shape) for core in cores]}")
            found[module] = Train(cores, rows)
        if lost := sorted(set(stored) - {CORE.format(module=module, k=k) for module, train in found.items()
                                         for k in range(len(train.cores))}):
            raise ValueError(f"'{lost[0]}' belongs to no train")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
        raise CheckpointError(f"{folder} holds no tensor trains that are understood ({one_line(str(problem), 160)})",
                              fix="write or download it again") from None


class Trained(Mapping[str, Tensor]):
    """A base and trains seen as one dense model, each tensor computed in fp64 and rounded once to the base's type."""

    def __init__(self, base: Weights, folder: Path):
        self._base, self.trains = base, read_trains(folder)
        self._stored = Checkpoint(folder / ADAPTER)
        self._modules = {f"{module}.weight": module for module in self.trains}
        for name, module in self._modules.items():
            target = base.headers.get(name)
            if target is None or target.shape != self.trains[module].shape:
                raise CheckpointError(f"{folder} changes '{name}' of {self.trains[module].shape}, and its base has "
                                      f"{target.shape if target else 'none'}", fix="give the base it was made for")
        self.headers = {name: Header(header.dtype, header.shape) if name in self._modules else header
                        for name, header in base.headers.items()}

    def __getitem__(self, name: str) -> Tensor:
        weight, module = self._base[name], self._modules.get(name)
        return weight if module is None else (weight.double() + self.trains[module].dense()).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, the cores, and how many of them make the rows."""
        rows = canonical({module: train.rows for module, train in self.trains.items()})
        parts = (self._base.fingerprint, self._stored.fingerprint, rows)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def train_weights(member: Member) -> Trained:
    """The tensors of the model below with these trains added. Raises CheckpointError for what is not understood."""
    framed(member)
    assert member.base is not None
    return Trained(weights(member.base), locate(member.path))


@kinds.add("tensor_train", weights=train_weights, source="arXiv:2410.13097")
def tensor_train(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """The model below with the change of each train added to its weight."""
    return dense(member, train_weights(member), device, dtype)
