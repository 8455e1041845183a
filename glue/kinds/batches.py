"""Batches of what a member reads: always the same for the same inputs, and of a size that most likely fits.

What did not fit is halved, and that is remembered: for members of one shape on one device in one type the next reading
begins where the last one ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from glue.files import locked, write_aside
from glue.kinds import BatchSize
from glue.member import canonical

Ids = tuple[int, ...]
R = TypeVar("R")
CPU_ROWS = 64
MOST_ROWS = 256  # elsewhere, where more rows go faster until the memory is full
TOKENS = 1 << 16  # padded tokens of a batch, what will be written included
NOTES = "batches.json"  # in the zoo's folder: how often what was read there had to be halved


@dataclass(frozen=True)
class Cutter:
    """How many distinct inputs are read at once.

    rows    the most inputs of a batch
    tokens  the most that they may have when all are padded to the longest; None: any number. One input may always.
    """

    rows: int
    tokens: int | None = None

    @staticmethod
    def of(size: BatchSize, device: str) -> Cutter:
        """A number is that number, whatever happens; auto gets smaller where the memory does not suffice."""
        if size != "auto":
            return Cutter(size)
        return Cutter(CPU_ROWS if device == "cpu" else MOST_ROWS, TOKENS)

    def cut(self, inputs: Sequence[Ids], places: Sequence[int], halved: int = 0, more: int = 0) -> list[list[int]]:
        """Positions of requests in batches of distinct inputs, the longest first.

        places  those of the inputs that are cut     more  tokens that will be written after each
        halved  how often a batch was too much; nothing gets smaller where there is no limit of tokens
        Requests with one input stay together, since lm-eval answers them by one pass of the model.
        """
        together: dict[Ids, list[int]] = {}
        for k in places:
            together.setdefault(inputs[k], []).append(k)
        order = sorted(together, key=lambda ids: (-len(ids), ids))
        batches, first = [], 0
        while first < len(order):
            count = self.rows
            if self.tokens is not None:
                fit = (self.tokens >> halved) // max(1, len(order[first]) + more)
                count = max(1, min(self.rows >> halved, fit))
            batches.append([k for ids in order[first:first + count] for k in together[ids]])
            first += count
        return batches


class Room:
    """How much of anything a member reads at once where it runs: all, or less by so many halves.

    file  where that is remembered, by `key`; None: nowhere. A damaged file is one that remembers nothing
    size  the most inputs; auto: as many as whoever reads thinks fit
    """

    def __init__(self, file: Path | None = None, key: str = "", size: BatchSize = "auto"):
        self._file, self._key, self.size = file, key, size
        self.halved = _remembered(file).get(key, 0)

    def halve(self) -> None:
        """So much was too much."""
        self.halved += 1
        if self._file is not None:
            with suppress(OSError), locked(self._file):  # a zoo that may only be read remembers nothing
                known = _remembered(self._file)
                write_aside(self._file, canonical({**known, self._key: max(self.halved, known.get(self._key, 0))}))

    def of(self, most: int) -> int:
        """So many as there is room for, where at most so many are wanted; one at least."""
        return max(1, most >> self.halved)

    def read(self, places: Sequence[int], read: Callable[[Sequence[int]], list[R]]) -> list[R]:
        """What is read of some places, in their order; half by half where all at once are too much for the memory.

        Raises torch.OutOfMemoryError where one alone is.
        """
        found, left, most = list[R](), list(places), len(places)
        while left:
            some = left[:most]
            with suppress(torch.OutOfMemoryError) if len(some) > 1 else nullcontext():
                found += read(some)
                left = left[most:]
                continue
            emptied()  # not before the error is gone, which holds what filled the memory
            self.halve()
            most = (len(some) + 1) // 2
        return found


def emptied() -> None:
    """Give back what torch holds for nothing on an accelerator."""
    torch.cuda.empty_cache()


def _remembered(file: Path | None) -> dict[str, int]:
    with suppress(OSError, ValueError, AttributeError):
        told = json.loads(file.read_bytes()) if file else {}
        return {key: count for key, count in told.items() if type(count) is int and 0 <= count < 64}
    return {}
