"""The verdict on a claim, by one rule, from intervals alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from glue.evaluate.statistics import Interval

Verdict = Literal["holds", "holds in direction", "not shown", "cannot be shown here"]
VERDICTS: tuple[Verdict, ...] = ("holds", "holds in direction", "not shown", "cannot be shown here")


def verdict(found: Mapping[int, Sequence[Interval]]) -> Verdict:
    """What intervals say about a claim, all of which have to lie above 0 for it to hold.

    found  seed -> an interval for each thing that the claim shows; nothing where no recipe shows it
    """
    every = [part for some in found.values() for part in some]
    if every and all(part.low > 0 for part in every):
        return "holds"
    if every and all(part.value > 0 for part in every):
        return "holds in direction"
    return "not shown"


def opposed(found: Mapping[int, Sequence[Interval]]) -> int:
    """At how many seeds the opposite is clear: some interval lies below 0."""
    return sum(any(part.high < 0 for part in some) for some in found.values())
