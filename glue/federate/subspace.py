"""A small space of soft prompts: p0 + A x, where A is drawn once from a seed, and p0 are vectors of tokens so drawn.

A draw of A is as wide as the embeddings are, divided by the root of d, so that an x of numbers about 1 moves a prompt
by about as much as one token differs from another.

Letters: t tokens, h hidden size, v vocabulary, d dimensions of the space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from glue.errors import GlueError
from glue.kinds.draws import drawn


@dataclass(frozen=True)
class Subspace:
    """The prompts that can be found.

    start  [t, h], p0        ways  [d, t, h], the columns of A        tokens  [t], whose vectors p0 is
    """

    start: np.ndarray
    ways: np.ndarray
    tokens: np.ndarray

    def prompt(self, x: np.ndarray) -> np.ndarray:
        """The prompt of a point [d]: [t, h], summed in fp64 and rounded once to fp32."""
        return (self.start + np.tensordot(x.astype(np.float64), self.ways, 1)).astype(np.float32)


def subspace(table: np.ndarray, tokens: int, dim: int, seed: int, without: Collection[int] = ()) -> Subspace:
    """The space that a seed stands for, over embeddings [v, h].

    without  ids of tokens that p0 is not begun with, such as the end of text
    """
    known = np.setdiff1d(np.arange(len(table)), np.asarray(list(without), dtype=int))
    if not len(known):
        raise GlueError("no token is left that a prompt could begin with", fix="give a model with a vocabulary")
    key = int.from_bytes(hashlib.sha256(f"{seed}|bpt|start".encode()).digest()[:16], "little")
    chosen = known[np.random.Philox(key=key).random_raw(tokens) % np.uint64(len(known))]
    wide = table.astype(np.float64)
    # rounded to fp16, so that machines that add in another order find the same
    width = float(np.float16(wide.std())) or 1.0
    ways = np.stack([drawn(seed, column, "bpt.ways", 0, np.empty(tokens * table.shape[1], np.float32))
                     for column in range(dim)]).astype(np.float64)
    return Subspace(wide[chosen], (width / np.sqrt(dim) * ways).reshape(dim, tokens, -1), chosen)
