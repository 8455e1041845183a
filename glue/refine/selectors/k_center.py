"""Examples that lie far from each other, so that no example is far from all that are chosen."""

from __future__ import annotations

import numpy as np

from glue.refine import selecting
from glue.refine.pool import Pool


@selecting.add("k_center", source="arXiv:1708.00489", needs="places")
def k_center(pool: Pool) -> np.ndarray:
    """Greedy k-center: after one by chance, always the example that is farthest from the nearest chosen one.

    No choice of as many examples leaves the farthest one nearer than half as far.
    """
    assert pool.places is not None
    places = np.asarray(pool.places, dtype=np.float64)
    squares = (places ** 2).sum(axis=1)
    chosen = [int(pool.rng().integers(len(pool)))] if pool.wanted else []
    distance = np.full(len(pool), np.inf)
    while len(chosen) < pool.wanted:
        last = chosen[-1]
        distance = np.minimum(distance, np.maximum(squares + squares[last] - 2 * places @ places[last], 0))
        distance[last] = -np.inf  # stays so: it is chosen, whatever lies where it does
        chosen.append(int(np.argmax(distance)))
    return np.array(chosen, dtype=np.int64)
