"""Quality-ordered cluster sampling."""

from __future__ import annotations

import numpy as np

from glue.refine import selecting
from glue.refine.pool import Pool


@selecting.add("qocs", source="arXiv:2405.00705", needs="values")
def qocs(pool: Pool) -> np.ndarray:
    """All examples of the best cluster, then of the next, until there are enough; a smaller choice begins a larger."""
    assert pool.values is not None
    order = np.argsort(-pool.values, kind="stable")
    return np.concatenate([pool.members[k] for k in order])[:pool.wanted]
