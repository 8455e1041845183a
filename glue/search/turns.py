"""Coordinate search: one thing is changed at a time, in turn, around and around, until nothing helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from glue.search.candidate import Candidate
from glue.search.space import Space

T = TypeVar("T")


def turns(space: Space, incumbent: Candidate, coordinates: Sequence[T],
          changed: Callable[[Candidate, T], tuple[str, Iterable[Candidate]]], min_gain: float) -> Candidate:
    """What the incumbent has become when no turn of any coordinate makes it better, or the budget is spent.

    changed   (incumbent, coordinate) -> what for, and the candidates that differ from the incumbent there
    min_gain  paired standard errors by which a change must be ahead of what it changes
    """
    before = None
    while incumbent != before:
        before = incumbent
        for coordinate in coordinates:
            purpose, candidates = changed(incumbent, coordinate)
            ahead = space.best(space.results(candidates, purpose) or [incumbent])
            gain = space.gain(ahead, incumbent)
            if gain.value > 0 and gain.convinces(min_gain):  # strictly ahead, so that the turns come to an end
                incumbent = ahead
    return incumbent

