"""All examples: a dataset that is valued and kept as it is, so that others can choose from it."""

from __future__ import annotations

import numpy as np

from glue.refine import selecting
from glue.refine.pool import Pool


@selecting.add("full", all=True)
def full(pool: Pool) -> np.ndarray:
    """Every example, in the order of the dataset."""
    return np.arange(len(pool))
