"""Draws: standard normal numbers that a seed and a place decide, the same bits on every machine.

Sixteen bits of a counter-based generator choose one of 65 536 equally likely values, the middles of as many slices of
the normal distribution, stretched so that their variance is 1. Departs from a normal in its tails alone: no draw is
beyond 4.33. In return there is no sine, logarithm or rejection, whose last bits differ between machines, and a piece
of a tensor can be drawn without what stands before it.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from statistics import NormalDist

import numpy as np

from glue.errors import GlueError

LANES = 16  # draws that Philox makes of one count
VALUES = 1 << 16
TABLE = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"  # sha256 of what `table` must be


def drawn(seed: int, index: int, name: str, start: int, out: np.ndarray) -> np.ndarray:
    """Fill `out` [c], fp32, with the draws of the tensor `name` from the flat index `start` on, a multiple of LANES.

    seed, index  which of the many directions that a master seed stands for
    """
    assert start % LANES == 0, f"a piece begins at a multiple of {LANES}, not at {start}"
    key = int.from_bytes(hashlib.sha256(f"{seed}|{index}|{name}".encode()).digest()[:16], "little")
    # Raw words, because numpy promises that these never change, and promises nothing of Generator.normal.
    words = np.random.Philox(key=key, counter=start // LANES).random_raw(-(-len(out) // 4))
    lanes = words.astype("<u8", copy=False).view("<u2")[:len(out)]
    return np.take(table(), lanes, out=out, mode="clip")  # clip: without it numpy would go through a buffer


@cache
def table() -> np.ndarray:
    """The 65 536 values, ascending, fp32."""
    upper = [NormalDist().inv_cdf((k + 0.5) / VALUES) for k in range(VALUES // 2, VALUES)]
    spread = math.sqrt(math.fsum(value * value for value in upper) / len(upper))
    half = np.array([value / spread for value in upper], dtype="<f4")
    found = np.concatenate([-half[::-1], half])
    if hashlib.sha256(found.tobytes()).hexdigest() != TABLE:
        raise GlueError("the logarithm of this machine leads to other draws than were agreed on",
                        fix="replay seed histories with a Python whose statistics.NormalDist is the usual one")
    return found
