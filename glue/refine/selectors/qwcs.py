"""Quality-weighted cluster sampling."""

from __future__ import annotations

import numpy as np

from glue.family import NonNegative
from glue.refine import selecting
from glue.refine.pool import Pool


@selecting.add("qwcs", source="arXiv:2405.00705", needs="values")
def qwcs(pool: Pool, *, factor: NonNegative = 1.0) -> np.ndarray:
    """Draw a cluster by its value, then an example of it that has not been drawn, until there are enough.

    factor  a cluster's chance is proportional to exp(factor * z), z its value in standard deviations from the mean of
            all; 0 draws evenly from clusters, a large one in the order of `qocs`

    The paper weighs raw values, whose scale is that of the score. What is left of a cluster does not change its chance.
    """
    assert pool.values is not None
    spread = pool.values.std()
    z = (pool.values - pool.values.mean()) / spread if spread else np.zeros(len(pool.values))
    # who comes first among exponential waits is drawn by weight; log waits do not overflow, however large the factor
    rng, found = np.random.default_rng([pool.seed, len(pool), 1]), list[int]()
    sizes, taken = np.array([len(some) for some in pool.members]), np.zeros(len(z), dtype=np.int64)
    while len(found) < pool.wanted:
        waits = np.where(taken < sizes, np.log(rng.standard_exponential(len(z))) - factor * z, np.inf)
        k = int(np.argmin(waits))
        found.append(int(pool.members[k][taken[k]]))
        taken[k] += 1
    return np.array(found, dtype=np.int64)
