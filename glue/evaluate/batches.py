"""Requests cut into batches: always the same for the same inputs, and of a size that most likely fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Ids = tuple[int, ...]
BatchSize = int | Literal["auto"]
CPU_ROWS = 64
MOST_ROWS = 256  # elsewhere, where more rows go faster until the memory is full
TOKENS = 1 << 16  # padded tokens of a batch, what will be written included


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
