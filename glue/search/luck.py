"""How far ahead the best of many looks by luck alone: a reality check, doi:10.1111/1468-0262.00152.

Had every merge been as good as what it is compared with, its lead on each item would as well have had the other sign.
So signs are drawn for the items, the same for all merges, since what is hard for one is hard for its like; and each
time it is noted how many standard errors the luckiest merge is ahead. Unlike a bound for merges that have nothing to
do with each other, this does not ask more of a search for trying a finer grid.
"""

from __future__ import annotations

import numpy as np

DRAWS = 1000
AT_ONCE = 1 << 22  # signs


def luck(moves: np.ndarray, share: float, seed: int) -> float:
    """Standard errors by which the luckiest merge is ahead in no more than this share of the draws.

    moves  [k, items], what each item adds to the gain of each merge beyond the mean of its task; the squares of a
           row sum to the squared error of that gain. Rows of zeros say nothing
    """
    errors = np.sqrt((moves ** 2).sum(axis=1))
    rows = moves[errors > 0] / errors[errors > 0, None]
    if not len(rows):
        return 0.0
    rng, items = np.random.default_rng(seed), rows.shape[1]
    step = max(1, AT_ONCE // items)
    most = [(rows @ (rng.integers(0, 2, (items, min(step, DRAWS - start))) * 2.0 - 1.0)).max(axis=0)
            for start in range(0, DRAWS, step)]
    return float(np.quantile(np.concatenate(most), 1 - share))
