"""The walk that greedy searches share: members join an incumbent one after the other, each if it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from glue.errors import MethodError
from glue.search.candidate import Candidate
from glue.search.space import Space
from glue.search.worth import by_worth

Order = Literal["accuracy", "similarity", "dissimilarity", "shapley", "given"]
Choose = Callable[[Candidate, Sequence[Candidate], str], Candidate]  # incumbent, what is tried, what for -> the next
ADDED = (0.2, 0.35, 0.5, 0.7, 0.9)
KEPT = tuple(k / 10 for k in range(9, 0, -1))


def walk(space: Space, order: Order, sweeps: int, choose: Choose, *, coefficients: Sequence[float], adding: bool,
         ) -> Candidate:
    """What the best single member has become when every other member has been tried.

    order         accuracy: best member first, by name where equal; given: as in the recipe; similarity, dissimilarity:
                  in every round the member most or least similar to the incumbent, the better member where equal;
                  shapley: who adds most to plain merges of some of the others first
    sweeps        how often those that were refused are tried again
    choose        the incumbent if nothing that is tried convinces, also when the budget is spent
    coefficients  adding: weights of the next member, on top of the incumbent's. Else shares that the incumbent keeps;
                  none for the running average. The first is taken where candidates are equal
    """
    ranked = [name for single in space.singles() for name in single.names]
    incumbent = space.singles()[0]
    first = ranked[0]
    if adding and first in space.others:  # a merge method may do better with less than all of it
        tried = [Candidate.merge({first: c}) for c in coefficients]
        incumbent = choose(incumbent, tried, f"how much of {first}")
    listed = {"given": lambda: space.names, "shapley": lambda: by_worth(space)}.get(order, lambda: ranked)()
    queue = [name for name in listed if name != first and name in space.others]
    waiting, accepted = queue, 1
    for _ in range(sweeps):
        refused, left = set(), list(waiting)
        while left:
            name = _next(space, incumbent, left, order)
            left.remove(name)
            tried = [joined(space, incumbent, name, c, adding) for c in coefficients or [accepted / (accepted + 1)]]
            ahead = choose(incumbent, tried, f"{name} joins {incumbent}")
            if ahead == incumbent:
                refused.add(name)
            else:
                incumbent, accepted = ahead, accepted + 1
        if len(refused) in (0, len(waiting)):
            break
        waiting = [name for name in queue if name in refused]
    return incumbent


def joined(space: Space, incumbent: Candidate, name: str, c: float, adding: bool) -> Candidate:
    """The incumbent with one more member; weights are those of the members that went in, never of a merged model."""
    # a member that adds nothing may be where the search starts from; it is no part of a merge
    weights = {part: weight for part, weight in incumbent.parts if part in space.others}
    if adding:
        return Candidate.merge({**weights, name: c})
    return Candidate.merge({**{part: c * weight for part, weight in weights.items()}, name: 1 - c})


def kept(space: Space, incumbent: Candidate, tried: Sequence[Candidate], purpose: str, min_gain: float) -> Candidate:
    """The best of what is tried, on all items, if it is ahead by so many paired standard errors; else the incumbent."""
    results = space.results(tried, purpose)
    if not results:
        return incumbent
    ahead = space.best(results)
    return ahead if space.gain(ahead, incumbent).convinces(min_gain) else incumbent


def grid(space: Space, given: list[float] | Literal["grid"], strategy: str) -> list[float]:
    """Coefficients for the rule of the space, those that bring the least of the next member first."""
    adding = space.rule == "add"
    if isinstance(given, str):
        return list(ADDED if adding else KEPT)
    if not adding and max(given) >= 1:
        raise MethodError(f"{strategy} search cannot keep a share of {max(given):g} and have room for another member",
                          fix="where members are interpolated, coefficients lie between 0 and 1")
    return sorted(given, reverse=not adding)


def _next(space: Space, incumbent: Candidate, waiting: list[str], order: Order) -> str:
    """Similar to the incumbent is the mean, by flat weights, of how similar each of its members is.

    For one cosine of flat models of equal length this orders as the cosine to the merged model does, which the paper
    computes anew in every round.
    """
    if order in ("accuracy", "shapley", "given"):
        return waiting[0]
    if space.similarity is None:
        raise MethodError(f"a search in the order of {order} needs to know how similar its members are",
                          fix="give it the similarity of its members, or write  order: accuracy")
    at = {name: k for k, name in enumerate(space.names)}
    near = {name: sum(weight * float(space.similarity[at[part], at[name]]) for part, weight in incumbent.parts)
            for name in waiting}
    ranked = [name for single in space.singles() for name in single.names if name in near]
    return (max if order == "similarity" else min)(ranked, key=near.__getitem__)
