"""Greedy selection, the heuristic of Model-GLUE: one member after the other is tried, and kept if it helps.

Under the rule interpolate this is the published search (coefficients: grid or average; min_gain: 0; sweeps: 1).
Departures: a gain must be worth one paired standard error unless min_gain is 0; the rule add, where the incumbent
keeps its weights and the next member comes on top; the defects of the published code are not here: the first member
is not tried again, and what is kept is the candidate that was best, with its own weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from glue.errors import MethodError
from glue.family import Count, Field, NonNegative, Positive
from glue.search import searching
from glue.search.space import Candidate, Found, Space

ADDED = (0.2, 0.35, 0.5, 0.7, 0.9)
KEPT = tuple(k / 10 for k in range(9, 0, -1))


@searching.add("greedy", source="arXiv:2410.05357")
def greedy(space: Space, *, order: Literal["accuracy", "given"] = "accuracy",
           coefficients: Annotated[list[Positive], Field(min_length=1)] | Literal["grid", "average"] = "grid",
           min_gain: NonNegative = 1.0, sweeps: Count = 2) -> Found:
    """Start from the best member; try each next one at every coefficient, as one batch; keep the best if it gains.

    order         accuracy: best member first, by name where equal; given: as in the recipe, after the best
    coefficients  rule add: the weight of the member that is added, .2 to .9 by default. Rule interpolate: the share
                  that the incumbent keeps, .1 to .9 by default; average: the running average of all that were kept
    min_gain      paired standard errors by which a candidate must be ahead; 0: not being behind is enough
    sweeps        how often those that were refused are tried again: some help only beside what was kept after them

    Equal candidates: the one with the least of the new member. Under the rule add the first member is tried at every
    coefficient too, since a merge method may do better with less than all of it.
    """
    shares = _coefficients(space, coefficients)
    singles = space.singles()
    incumbent = singles[0]
    first, = incumbent.weights
    if space.rule == "add" and first in space.others:
        tried = (Candidate.merge({first: c}) for c in shares)
        incumbent = _kept(space, incumbent, tried, f"how much of {first}", min_gain)
    names = [name for single in singles for name in single.weights] if order == "accuracy" else space.names
    waiting = [name for name in names if name != first and name in space.others]
    accepted = 1
    for _ in range(sweeps):
        refused = []
        for name in waiting:
            tried = (_joined(space, incumbent, name, c) for c in shares or [accepted / (accepted + 1)])
            ahead = _kept(space, incumbent, tried, f"{name} joins {incumbent}", min_gain)
            if ahead == incumbent:
                refused.append(name)
            else:
                incumbent, accepted = ahead, accepted + 1
        if len(refused) in (0, len(waiting)):
            break
        waiting = refused
    return space.found(incumbent)


def _coefficients(space: Space, given: list[float] | Literal["grid", "average"]) -> list[float]:
    """Coefficients, those that bring the least of the new member first; none where each step has its own."""
    adding = space.rule == "add"
    if given == "average" and adding:
        raise MethodError("greedy search cannot average where members are added to a base",
                          fix="leave 'coefficients' out, or use a merge method whose weights are shares: linear")
    if isinstance(given, str):
        return [] if given == "average" else list(ADDED if adding else KEPT)
    if not adding and max(given) >= 1:
        raise MethodError(f"greedy search cannot keep a share of {max(given):g} and have room for another member",
                          fix="where members are interpolated, coefficients lie between 0 and 1")
    return sorted(given, reverse=not adding)


def _joined(space: Space, incumbent: Candidate, name: str, c: float) -> Candidate:
    """The incumbent with one more member; weights are those of the members that went in, never of a merged model."""
    # a member that adds nothing may be where the search starts from; it is no part of what is added
    weights = {part: weight for part, weight in incumbent.parts if part in space.others}
    if space.rule == "add":
        return Candidate.merge({**weights, name: c})
    return Candidate.merge({**{part: c * weight for part, weight in weights.items()}, name: 1 - c})


def _kept(space: Space, incumbent: Candidate, tried: Iterable[Candidate], purpose: str, min_gain: float) -> Candidate:
    """The best of what was tried if it is convincingly ahead, else the incumbent; also when the budget is spent."""
    results = space.results(tried, purpose)
    if not results:
        return incumbent
    ahead = space.best(results)
    return ahead if space.gain(ahead, incumbent).convinces(min_gain) else incumbent
