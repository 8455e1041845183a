"""Kind "seed_history": a base and one number for each of K directions, which seeds stand for; a few KB on the disk.

    w = w0 - learning_rate * (a_1 z_1 + ... + a_K z_K)

The sum is made in fp32, first to last, each product rounded before it is added, so that the same history gives the
same bits on every machine; another order of the directions gives others. See `glue.kinds.draws` for z.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import HISTORY, Checkpoint, Header, Weights
from glue.errors import CheckpointError, ZooError, one_line
from glue.files import write_aside
from glue.hub import locate
from glue.identity import identify
from glue.kinds import Dtype, Running, kinds, weights
from glue.kinds.draws import LANES, drawn
from glue.kinds.frame import framed, widest
from glue.kinds.model import assembled
from glue.member import Member, canonical

NOTE, NUMBERS = "seed_history.json", "accumulators"
FORMAT = 1
PIECE = 1 << 16  # entries that are replayed at once: with their draws they stay in the caches


@dataclass(frozen=True)
class History:
    """Everything that the weights depend on.

    base          digest of the member that w0 is
    seed          the master seed of all directions
    accumulators  [K], fp32: how far each direction was gone, before the learning rate
    targets       words in the names of tensors that move, such as q_proj; () moves every floating tensor
    told          how it came about, for readers: changes no number
    """

    base: str
    seed: int
    learning_rate: float
    accumulators: np.ndarray
    targets: tuple[str, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.accumulators.dtype == np.float32 and self.accumulators.ndim == 1

    def moves(self, name: str, header: Header) -> bool:
        """Whether a tensor of the base is changed."""
        return header.dtype.is_floating_point and (
            not self.targets or any(f".{word}." in f".{name}." for word in self.targets))

    def total(self, name: str, numel: int) -> np.ndarray:
        """The sum of all directions in one tensor, [numel] in fp32; a direction that was not gone is not drawn."""
        gone = np.flatnonzero(self.accumulators)
        total, drawing = np.zeros(numel, dtype=np.float32), np.empty(min(PIECE, numel), dtype=np.float32)
        for start in range(0, numel, PIECE):
            part = total[start:start + PIECE]
            z = drawing[:len(part)]
            for j in gone:
                drawn(self.seed, int(j), name, start, z)
                np.multiply(z, self.accumulators[j], out=z)  # two roundings: a fused step is not on every machine
                np.add(part, z, out=part)
        return total

    def replayed(self, name: str, weight: Tensor) -> Tensor:
        """The tensor `name` of the base as it became: in fp32, or in fp64 where the base is."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = self.total(name, weight.numel()) * np.float32(self.learning_rate)
        before = weight.detach().cpu().to(wide).numpy()
        return torch.from_numpy(before - change.reshape(before.shape))

    def write(self, folder: Path) -> None:
        """Put it into a folder; the note comes last."""
        from safetensors.numpy import save

        note = {"format": FORMAT, "base": self.base, "seed": self.seed, "learning_rate": self.learning_rate,
                "targets": list(self.targets), "told": dict(self.told)}
        write_aside(folder / HISTORY, save({NUMBERS: self.accumulators}))
        write_aside(folder / NOTE, canonical(note))

    @property
    def fingerprint(self) -> str:
        """Of everything but what is told."""
        said = canonical([self.base, self.seed, self.learning_rate, list(self.targets)]).encode()
        return hashlib.sha256(said + self.accumulators.tobytes()).hexdigest()


assert PIECE % LANES == 0


def read_history(folder: Path) -> History:
    """The history in a folder. Raises CheckpointError where it is damaged, or of a format that is not known."""
    try:
        told = json.loads((folder / NOTE).read_bytes())
        if told["format"] != FORMAT:
            raise ValueError(f"format {one_line(str(told['format']))}, known is {FORMAT}")
        numbers = Checkpoint(folder / HISTORY)[NUMBERS]
        if numbers.dtype != torch.float32 or numbers.ndim != 1 or not bool(numbers.isfinite().all()):
            raise ValueError(f"'{NUMBERS}' must be finite numbers in fp32, one for each direction")
        for key, kind in (("base", str), ("seed", int), ("learning_rate", float), ("targets", list), ("told", dict)):
            if type(told[key]) is not kind:
                raise ValueError(f"{key}: {one_line(str(told[key]), 60)}")
        return History(told["base"], told["seed"], told["learning_rate"], numbers.numpy().copy(),
                       tuple(map(str, told["targets"])), told["told"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{folder} holds no seed history that is understood ({one_line(str(problem), 160)})",
                              fix="write or download it again") from None


class Replayed(Mapping[str, Tensor]):
    """A base as a history changed it, each tensor replayed when it is asked for, rounded once, and not kept."""

    def __init__(self, base: Weights, history: History):
        self._base, self.history = base, history
        # a tensor that moved is in no file, whatever the base says of it
        self.headers = {name: Header(header.dtype, header.shape) if history.moves(name, header) else header
                        for name, header in base.headers.items()}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        if not self.history.moves(name, self.headers[name]):
            return weight
        return self.history.replayed(name, weight).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base and the history; nothing is replayed for it."""
        return hashlib.sha256(f"{self._base.fingerprint}|{self.history.fingerprint}".encode()).hexdigest()


def history_weights(member: Member) -> Replayed:
    """The tensors of the base as this history changed them. Raises ZooError where the base is another."""
    framed(member)
    assert member.base is not None
    history = read_history(locate(member.path))
    found = member.base.digest or identify(locate(member.base.path))[1]
    if found != history.base:
        raise ZooError(f"'{member.name}' was taught from a base with the digest {history.base[:8]}, and "
                       f"'{member.base.name}' has {found[:8]}", fix="name the base that it was taught from")
    return Replayed(weights(member.base), history)


@kinds.add("seed_history", weights=history_weights, source="arXiv:2312.06353")
def seed_history(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """The base with the history replayed into it; K draws for each of its weights."""
    return dense(member, history_weights(member), device, dtype)


def dense(member: Member, tensors: Weights, device: str, dtype: Dtype) -> Running:
    """A member that is a change of its base, as the model that it stands for."""
    stored: Any = str(widest(tensors.headers.values())).removeprefix("torch.")
    return assembled(member, ((name, tensors[name]) for name in tensors), device=device,
                     dtype=stored if dtype == "auto" else dtype)
