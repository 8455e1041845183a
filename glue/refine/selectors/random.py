"""Examples by chance: what any other selector has to beat."""

from __future__ import annotations

import numpy as np

from glue.refine import selecting
from glue.refine.pool import Pool


@selecting.add("random")
def random(pool: Pool) -> np.ndarray:
    """Every example with the same chance; a smaller choice begins a larger one of the same seed."""
    return pool.rng().permutation(len(pool))[:pool.wanted]
