"""Coordinate search: the weight of one member at a time, around and around, until nothing helps or the budget ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from glue.family import Field, NonNegative
from glue.search import searching
from glue.search.candidate import Candidate
from glue.search.space import Found, Space
from glue.search.turns import turns


@searching.add("coefficients", version=2)
def coefficients(space: Space, *, values: Annotated[list[NonNegative], Field(min_length=1)]
                 = [0.0, 0.2, 0.35, 0.5, 0.7, 0.9],  # noqa: B006 - read only; a tuple is no YAML value
                 min_gain: NonNegative = 2.0) -> Found:
    """Start from the best merge of all members with one weight; then set each weight, best member first, in turn.

    values    weights to try, the smallest where equal; 0 leaves a member out. Under the rule interpolate they are
              divided by their sum
    min_gain  paired standard errors by which a change must be ahead, 2 for a 95 % interval above 0

    The best single member is the answer unless the merge is better than luck among all that were tried.
    """
    order = [name for single in space.singles() for name in single.names if name in space.others]
    grid = sorted(values)
    started = space.results(space.together(grid), "all members with one weight")
    if not started:
        return space.found(space.singles()[0])

    def changed(incumbent: Candidate, name: str) -> tuple[str, Iterable[Candidate]]:
        merges = (space.merge([{**incumbent.weights, name: value}]) for value in grid)
        return f"how much of {name}", [merge for merge in merges if merge]

    return space.found(space.proven(turns(space, space.best(started), order, changed, min_gain)))
