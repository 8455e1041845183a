"""Coordinate search by layer group: how much of each member in the first layers, in the last, outside of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from glue.family import Count, Field, NonNegative
from glue.search import searching
from glue.search.candidate import Candidate
from glue.search.space import Found, Space
from glue.search.turns import turns

Coordinate = tuple[str, int | None]  # a member, and the group in which its weight changes; None is everywhere


@searching.add("joint")
def joint(space: Space, *, groups: Count = 3, values: Annotated[list[NonNegative], Field(min_length=1)]
          = [0.0, 0.2, 0.35, 0.5, 0.7, 0.9],  # noqa: B006 - read only; a tuple is no YAML value
          min_gain: NonNegative = 2.0) -> Found:
    """As `coefficients`; then, from what that came to, set each weight in one layer group after the other, in turn.

    groups    blocks of consecutive layers; everything outside of layers is one group more
    values    weights to try, the smallest where equal; 0 leaves a member out of a group. Under the rule interpolate
              they are divided by their sum
    min_gain  paired standard errors by which a change must be ahead, 2 for a 95 % interval above 0

    The best single member is the answer unless the merge is better than luck among all that were tried.
    """
    parts = space.grouped(groups)
    order = [name for single in space.singles() for name in single.names if name in space.others]
    grid = sorted(values)
    started = space.results(space.together(grid), "all members with one weight")
    if not started:
        return space.found(space.singles()[0])

    def changed(incumbent: Candidate, coordinate: Coordinate) -> tuple[str, Iterable[Candidate]]:
        name, group = coordinate
        tables = incumbent.tables(incumbent.groups if group is None else parts)
        merges = (space.merge([{**table, name: value} if group in (None, k) else table
                                     for k, table in enumerate(tables)]) for value in grid)
        where = "" if group is None else f" in group {group + 1} of {parts}"
        return f"how much of {name}{where}", [merge for merge in merges if merge]

    everywhere: list[Coordinate] = [(name, None) for name in order]
    by_group: list[Coordinate] = [(name, group) for group in range(parts) for name in order]
    incumbent = turns(space, space.best(started), everywhere, changed, min_gain)
    return space.found(space.proven(turns(space, incumbent, by_group, changed, min_gain)))
