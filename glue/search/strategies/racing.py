"""Greedy selection by races: coefficients start on few items, and only those that may still win see more.

Successive halving as in arXiv:1502.07943, with paired tests before each half is cut, over a coarse part of the grid:
the score of a merge changes smoothly with one coefficient. What lies between is tried on all items, beside the winner
of a member that is kept: on few items the best of neighbours is the luckiest, and a member that is refused needs none.
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


@searching.add("racing", source="arXiv:1502.07943", version=2)
def racing(space: Space, *, order: Order = "accuracy",
           coefficients: Annotated[list[Positive], Field(min_length=1)] | Literal["fine"] = "fine",
           min_gain: NonNegative = 2.0, sweeps: Count = 2, every: Count = 5, first: Share = 0.25,
           doubt: Positive = 2.0) -> Found:
    """As `greedy`, but the coefficients of a member race: what falls behind on some items sees no more of them.

    order, min_gain, sweeps  as in greedy
    coefficients  as in greedy; fine is .05, .1, ... .95
    every   one in so many starts; what lies half as far beside the winner follows, if that is kept. 1: all start
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
        running, share = list(tried[stride // 2::stride]), first
        while running and share < 1:
            running = ahead(running, incumbent, share, purpose)
            running, share = running[:ceil(len(running) / 2)], 2 * share
        winner = kept(space, incumbent, sorted(running, key=tried.index), purpose, min_gain)
        if winner == incumbent:
            return incumbent
        best = kept(space, incumbent, _around(tried, winner, stride // 2), purpose, min_gain)
        return winner if best == incumbent else best

    values = grid(space, FINE if coefficients == "fine" else coefficients, "racing")
    end = walk(space, order, sweeps, race, coefficients=values, adding=space.rule == "add")
    return space.found(space.proven(end) if min_gain else end)


def _around(tried: Sequence[Candidate], winner: Candidate, steps: int) -> Sequence[Candidate]:
    """The winner between what lies so many steps to either side of it, or at the end of the row, in the order given."""
    k = tried.index(winner)
    return [tried[j] for j in sorted({max(k - steps, 0), k, min(k + steps, len(tried) - 1)})]
