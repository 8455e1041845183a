"""Examples by how surprised the base is by their answers."""

from __future__ import annotations

from typing import Literal

import numpy as np

from glue.refine import selecting
from glue.refine.pool import Pool


@selecting.add("loss", source="arXiv:2107.07075", needs="losses")
def loss(pool: Pool, *, keep: Literal["high", "low"] = "high") -> np.ndarray:
    """The examples of the highest loss, from which there is most to learn where labels are right; or of the lowest.

    Equal ones, such as copies, in an order that the seed decides. The paper ranks by the norm of the error, early in
    training; a loss ranks answers alike.
    """
    assert pool.losses is not None
    signed = -pool.losses if keep == "high" else pool.losses
    shuffled = pool.rng().permutation(len(pool))
    return shuffled[np.argsort(signed[shuffled], kind="stable")][:pool.wanted]
