"""Greedy selection after the heuristic of Model-GLUE: one member after the other is tried, and kept if it helps.

Departures from the paper, whose own procedure is the strategy `paper`: the paired interval of a gain must lie above 0;
members that were refused are tried again; under the rule add the incumbent keeps its weights and the next member comes
on top; a merge whose lead over the best member may be luck is not the answer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from glue.errors import MethodError
from glue.family import Count, Field, NonNegative, Positive
from glue.search import searching
from glue.search.space import Found, Space
from glue.search.walk import Order, grid, kept, walk


@searching.add("greedy", source="arXiv:2410.05357", version=2)
def greedy(space: Space, *, order: Order = "accuracy",
           coefficients: Annotated[list[Positive], Field(min_length=1)] | Literal["grid", "average"] = "grid",
           min_gain: NonNegative = 2.0, sweeps: Count = 2) -> Found:
    """Start from the best member; try each next one at every coefficient, as one batch; keep the best if it gains.

    order         accuracy: best member first, by name where equal; given: as in the recipe, after the best;
                  similarity, dissimilarity: the member most or least similar to the incumbent, found anew each time
                  from its flat weights; shapley: who adds most to plain merges of some of the others first, for at
                  most half of the budget
    coefficients  rule add: the weight of the member that is added, .2 to .9 by default. Rule interpolate: the share
                  that the incumbent keeps, .1 to .9 by default; average: the running average of all that were kept
    min_gain      paired standard errors by which a candidate must be ahead; 2: its 95 % interval lies above 0. With 0
                  not being behind is enough, and the best merge is the answer however small its lead
    sweeps        how often those that were refused are tried again: some help only beside what was kept after them

    Equal candidates: the one with the least of the new member. Under the rule add the first member is tried at every
    coefficient too, since a merge method may do better with less than all of it.
    """
    adding = space.rule == "add"
    if coefficients == "average" and adding:
        raise MethodError("greedy search cannot average where members are added to a base",
                          fix="leave 'coefficients' out, or use a merge method whose weights are shares: linear")
    values = [] if coefficients == "average" else grid(space, coefficients, "greedy")
    end = walk(space, order, sweeps, lambda incumbent, tried, purpose: kept(space, incumbent, tried, purpose, min_gain),
               coefficients=values, adding=adding)
    return space.found(space.proven(end) if min_gain else end)
