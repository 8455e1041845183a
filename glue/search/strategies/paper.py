"""The heuristic searches of Model-GLUE as published: by accuracy or similarity, coefficients or running average.

Not here are the defects of the published code: the first member is not merged with itself; what is kept is the
candidate that was best, with its own weights; a merge over a base works, its weights being shares; the similarity to
the incumbent comes from its flat weights, with no model read again.
"""

from __future__ import annotations

from typing import Literal

from glue.search import searching
from glue.search.space import Found, Space
from glue.search.walk import KEPT, Order, kept, walk


@searching.add("paper", source="arXiv:2410.05357")
def paper(space: Space, *, order: Order = "accuracy", coefficients: Literal["grid", "average"] = "grid") -> Found:
    """Start from the best member; interpolate with each next one, once; keep what is not behind.

    order         accuracy, the paper's default; similarity or dissimilarity to the incumbent, in every round anew; or
                  as in greedy
    coefficients  grid: the incumbent keeps .1 to .9, the larger where equal; average: the running average of what
                  was kept

    The weight of the i-th that was kept is (1 - c_i) times all c_j of those kept after it; they sum to 1. Noise is not
    asked about: `greedy` does.
    """
    end = walk(space, order, 1, lambda incumbent, tried, purpose: kept(space, incumbent, tried, purpose, 0.0),
               coefficients=KEPT if coefficients == "grid" else (), adding=False)
    return space.found(end)
