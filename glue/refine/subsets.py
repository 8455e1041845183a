"""What the value of each subset counts for in Shapley values, which are sums of these: so items have values too.

The value of a subset is most often a mean over items. The same sums over the results of one item are what players are
worth to that item, and how much these differ says how sure their mean is of other items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from glue.refine.shapley import shapley


def counts(n: int, subsets: Sequence[frozenset[int]], *, exact: bool, **how: Any) -> np.ndarray:
    """What the value of each subset is multiplied by, for each player: [n, subsets].

    subsets  those that were valued
    exact    whether these are all
    how      as `shapley` was called, where it was told how many chains to walk and not how precise to be: else what is
             asked depends on the values
    """
    if not exact:
        return np.stack([shapley(n, partial(_ones, own), exact=False, **how).mean for own in subsets], axis=1)
    table = np.empty((n, len(subsets)))
    for k, subset in enumerate(subsets):
        size = len(subset)
        inside = 1 / (n * math.comb(n - 1, size - 1)) if size else 0.0
        outside = -1 / (n * math.comb(n - 1, size)) if size < n else 0.0
        table[:, k] = [inside if i in subset else outside for i in range(n)]
    return table


def _ones(own: frozenset[int], some: Sequence[frozenset[int]]) -> list[float]:
    return [float(one == own) for one in some]
