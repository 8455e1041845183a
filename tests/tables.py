"""Sources whose every probability is known beforehand: tables of what follows which token."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import product

import torch

from glue.kinds.local_source import narrowed
from glue.kinds.source import Scored, Vocabulary


class Table:
    """The next token depends on the last one alone: logs [v, v], rows are log-probabilities in fp64.

    calls  (ids, start, top_k, extra) of every question, in order
    """

    tells, longest = "full", 10_000

    def __init__(self, logits: torch.Tensor, *, most: int = 0):
        self.logs = torch.log_softmax(logits.double(), -1)
        self.most = most or len(logits)
        self.vocabulary = Vocabulary(len(logits), f"table of {len(logits)}")
        self.calls: list[tuple] = []

    @contextmanager
    def open(self):
        yield self

    def score(self, ids, start, *, top_k=None, extra=()) -> Scored:
        self.calls.append((list(ids), start, top_k, [list(some) for some in extra]))
        assert 1 <= start <= len(ids) and (not extra or len(extra) == len(ids) - start + 1)
        return narrowed(self.logs[list(ids[start - 1:])], top_k, extra)


def table(v: int, seed: int, spread: float = 1.5, **words) -> Table:
    """A random one."""
    random = torch.Generator().manual_seed(seed)
    return Table(spread * torch.randn(v, v, generator=random, dtype=torch.float64), **words)


def trio(v: int = 7, seed: int = 0, spread: float = 1.5, alike: float = 1.0) -> dict[str, Table]:
    """Three tables; `alike` is how near the tuned one is to the large one, and the untuned one to both."""
    large, tuned, small = (table(v, 3 * seed + k, spread) for k in range(3))
    near = [Table(alike * large.logs + (1 - alike) * other.logs) for other in (tuned, small)] if alike < 1 else None
    return {"large": large, "tuned": near[0] if near else tuned, "small": near[1] if near else small}


def mixture(sources: dict[str, Table], alpha: float) -> torch.Tensor:
    """Unnormalised log-probabilities [v, v] of the exact mixture."""
    return sources["large"].logs + alpha * (sources["tuned"].logs - sources["small"].logs)


def sequences(rows: torch.Tensor, first: int, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every text of so many tokens after `first`, given rows [v, v] of probabilities."""
    found = {}
    for text in product(range(len(rows)), repeat=length):
        chance, last = 1.0, first
        for token in text:
            chance *= float(rows[last, token])
            last = token
        found[text] = chance
    return found
