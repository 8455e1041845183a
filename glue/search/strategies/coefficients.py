"""Coordinate search: the weight of one member at a time, around and around, until nothing helps or the budget ends."""

from __future__ import annotations

from typing import Annotated

from glue.family import Field, NonNegative
from glue.search import searching
from glue.search.space import Candidate, Found, Space


@searching.add("coefficients")
def coefficients(space: Space, *, values: Annotated[list[NonNegative], Field(min_length=1)]
                 = [0.0, 0.2, 0.35, 0.5, 0.7, 0.9],  # noqa: B006 - read only; a tuple is no YAML value
                 min_gain: NonNegative = 1.0) -> Found:
    """Start from the best merge of all members with one weight; then set each weight, best member first, in turn.

    values    weights to try, the smallest where equal; 0 leaves a member out. Under the rule interpolate they are
              divided by their sum
    min_gain  paired standard errors by which a change must be ahead of what it changes

    The best single member is the answer if no merge is better.
    """
    singles = space.singles()
    order = [name for single in singles for name in single.weights if name in space.others]
    grid = sorted(values)
    started = space.results(space.together(grid), "all members with one weight")
    if not started:
        return space.found(singles[0])
    incumbent, before = space.best(started), None
    while incumbent != before:
        before = incumbent
        for name in order:
            changed = [{**incumbent.weights, name: c} for c in grid]
            merges = [_merge(space, weights) for weights in changed if any(weights.values())]
            ahead = space.best(space.results(merges, f"how much of {name}") or [incumbent])
            gain = space.gain(ahead, incumbent)
            if gain.value > 0 and gain.convinces(min_gain):  # strictly ahead, so that the turns come to an end
                incumbent = ahead
    return space.found(space.best([singles[0], incumbent]))


def _merge(space: Space, weights: dict[str, float]) -> Candidate:
    total = sum(weights.values()) if space.rule == "interpolate" else 1.0
    return Candidate.merge({name: weight / total for name, weight in weights.items()})
