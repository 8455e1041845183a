"""Greedy selection by races: coefficients start on few items, and only those that may still win see more.

Successive halving as in arXiv:1502.07943, with paired tests before each half is cut, and a grid that is looked at
coarsely first: the score of a merge changes smoothly with one coefficient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, sqrt
from typing import Annotated, Literal

from glue.family import Count, Field, NonNegative, Positive, Share
from glue.search import searching
from glue.search.candidate import Candidate
from glue.search.space import Found, Space
from glue.search.walk import Order, grid, kept, walk

FINE = [k / 20 for k in range(1, 20)]


@searching.add("racing", source="arXiv:1502.07943")
def racing(space: Space, *, order: Order = "accuracy",
           coefficients: Annotated[list[Positive], Field(min_length=1)] | Literal["fine"] = "fine",
           min_gain: NonNegative = 1.0, sweeps: Count = 2, every: Count = 5, first: Share = 0.3,
           doubt: Positive = 2.0) -> Found:
    """As `greedy`, but the coefficients of a member race: what falls behind on some items sees no more of them.

    order, min_gain, sweeps  as in greedy
    coefficients  as in greedy; fine is .05, .1, ... .95
    every   one in so many starts, then what lies beside the best, until both neighbours of the best have; 1: all start
    first   the share of the items that those see. It doubles from round to round, and the better half goes on
    doubt   standard errors of what the items not yet seen can still change. A candidate is out when so many of them
            would not bring it level with the leader, or to where it gains enough on the incumbent

    Members by themselves are measured on all items, and so is whatever is kept.
    """
    def ahead(candidates: Iterable[Candidate], incumbent: Candidate, share: float, purpose: str) -> list[Candidate]:
        """Those that may still win and be kept, best first; where equal, the one with the least of the new member."""
        items, unseen = space.sample(share), doubt * sqrt(1 - share)
        seen = space.results(candidates, purpose, items)
        gains = {candidate: space.gain(candidate, incumbent, items) for candidate in seen}
        able = [candidate for candidate, gain in gains.items()
                if gain.value + unseen * gain.error >= min_gain * sqrt(share) * gain.error]
        able.sort(key=lambda candidate: -gains[candidate].value)
        behind = [space.gain(able[0], candidate, items) for candidate in able]
        return [candidate for candidate, gap in zip(able, behind, strict=True) if gap.value <= unseen * gap.error]

    def race(incumbent: Candidate, tried: Sequence[Candidate], purpose: str) -> Candidate:
        stride = every if len(tried) > every else 1
        begun = tried[stride // 2::stride]
        share, running = first, ahead(begun, incumbent, first, purpose)
        while running and (near := set(_beside(tried, running[0])) - set(begun)):
            begun = sorted({*begun, *near}, key=tried.index)
            running = ahead([candidate for candidate in begun if candidate in near or candidate in running],
                            incumbent, share, purpose)
        while running and share < 0.5:
            share *= 2
            running = ahead(running[:ceil(len(running) / 2)], incumbent, share, purpose)
        return kept(space, incumbent, sorted(running[:ceil(len(running) / 2)], key=tried.index), purpose, min_gain)

    values = grid(space, FINE if coefficients == "fine" else coefficients, "racing")
    end = walk(space, order, sweeps, race, coefficients=values, adding=space.rule == "add")
    return space.found(space.proven(end) if min_gain else end)


def _beside(tried: Sequence[Candidate], candidate: Candidate) -> Sequence[Candidate]:
    k = tried.index(candidate)
    return [*tried[max(k - 1, 0):k], *tried[k + 1:k + 2]]
