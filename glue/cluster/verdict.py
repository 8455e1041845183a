"""The verdict on a pair of members: merge, merge with care, or do not merge, and why.

A rule over facts, with these thresholds:

UNRELATED  A cosine of weights below 0.2. Columns of two models that were initialised apart have cosines around 0, with
           a spread of 1 / sqrt(rows) that the mean over columns and tensors makes far smaller; a common ancestor keeps
           them near 1. In between there is next to nothing.
OPPOSED    A cosine of changes below -0.3. The average of two changes of one size keeps (1 + cosine) / 2 of their
           square: half where they are independent, all where they are one, about a third here, nothing at -1.
AGAINST    A cosine of changes below -0.05: below what independent changes of large matrices show by chance.
AGREE      Signs of changes that agree in less than 45 % of entries; chance is 50 %.
UNEVEN     Changes that differ five times in size: with equal weights the larger decides everything.
ROUNDED    A cosine above 1 - 2e-6 between members of different types: rounding to bf16 alone loses about 6e-7.

Weights say what can be averaged; they do not say what is good. A member that was taught wrong answers from the same
ancestor looks like one that was taught right ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isinf, isnan
from typing import Literal

Word = Literal["merge", "merge with care", "do not merge"]
WORDS: tuple[Word, ...] = ("merge", "merge with care", "do not merge")
UNRELATED, OPPOSED, AGAINST, AGREE, UNEVEN, ROUNDED = 0.2, -0.3, -0.05, 0.45, 5.0, 1 - 2e-6
NAN = float("nan")


@dataclass(frozen=True)
class Facts:
    """What is known of two members. NaN and "" stand for what is not.

    cosine    of their weights, -1 to 1: the mean over columns
    apart     a difference in build with which no merge makes sense
    differs   differences that a merge survives if something is done about them, each in words
    equal     every weight is the same                 retyped  they are stored in different types
    aligned   cosine once the neurons and heads of one are put into the order of the other; only for hidden twins
    base      the member that changes are measured from
    is_base   which of the two is that base
    change    cosine of their changes from the base
    agree     share of entries in which the signs of these changes agree, 0 to 1
    uneven    the larger change over the smaller, in norm, at least 1
    """

    cosine: float = NAN
    apart: str = ""
    differs: tuple[str, ...] = ()
    equal: bool = False
    retyped: bool = False
    aligned: float = NAN
    base: str = ""
    is_base: str = ""
    change: float = NAN
    agree: float = NAN
    uneven: float = NAN


@dataclass(frozen=True)
class Verdict:
    """One of WORDS, why in words for people, and the cause in one word for machines."""

    word: Word
    reason: str
    cause: str


def verdict(facts: Facts, *, threshold: float = 0.95) -> Verdict:
    """What to do with a pair. The gravest reason decides the word; cares are all told.

    threshold  the cosine above which weights count as near, that of families
    """
    return _against(facts) or _careful(facts, threshold) or Verdict("merge", _fit(facts), "near")


def _against(facts: Facts) -> Verdict | None:
    """The first reason not to merge."""
    def no(cause: str, reason: str) -> Verdict:
        return Verdict("do not merge", reason, cause)

    cosine = facts.cosine
    if facts.apart:
        return no("build", facts.apart)
    if facts.equal:
        return no("copy", "one is a copy of the other: every weight is equal, so there is nothing to gain")
    if facts.retyped and cosine > ROUNDED:
        return no("copy", "one is the other in another type of numbers: equal up to rounding, nothing to gain")
    if facts.aligned > ROUNDED:
        return no("copy", f"one is the other with its neurons in another order: cosine {shown(cosine)} as they are, "
                          f"{facts.aligned:.4f} once aligned; nothing to gain")
    if not isnan(facts.aligned):
        return None
    if isnan(cosine):
        return no("unknown", "their weights cannot be compared: some are not finite numbers")
    if cosine < UNRELATED:
        return no("unrelated", f"unrelated: cosine {shown(cosine)}, as between models initialised apart")
    if facts.change < OPPOSED:
        return no("opposed", f"opposed: their changes to {facts.base} have cosine {shown(facts.change)}, "
                             "so that a merge undoes what each has learnt")
    return None


def _careful(facts: Facts, threshold: float) -> Verdict | None:
    """Everything that asks for care, one after the other; None where nothing does."""
    cares = list(_cares(facts, threshold))
    if not cares:
        return None
    return Verdict("merge with care", "; ".join(reason for _, reason in cares), cares[0][0])


def _cares(facts: Facts, threshold: float) -> Iterator[tuple[str, str]]:
    twins = not isnan(facts.aligned)
    if twins:
        yield "twin", (f"twins hidden by permutation: cosine {shown(facts.cosine)} as they are, {facts.aligned:.3f} "
                       "once aligned; align one to the other first")
    for difference in facts.differs:
        yield "build", difference
    if facts.is_base:
        yield "base", (f"{facts.is_base} is what the other comes from: their average only takes back part of what "
                       "that one has learnt")
    if not twins and facts.cosine <= threshold:
        yield "far", f"not near: cosine {facts.cosine:.3f}, not above {threshold:g}"
    if facts.change < AGAINST:
        yield "against", (f"their changes to {facts.base} pull apart (cosine {shown(facts.change)}): use a method that "
                          "settles signs, such as ties")
    if facts.agree < AGREE:
        yield "signs", (f"signs of their changes to {facts.base} agree in {facts.agree:.0%} of entries, less than by "
                        "chance: use a method that settles signs, such as ties")
    if isinf(facts.uneven):
        yield "uneven", f"one has not changed from {facts.base} at all"
    elif facts.uneven > UNEVEN:
        yield "uneven", (f"one has changed {facts.uneven:.1f} times as much as the other, and decides an even merge: "
                         "weigh them")


def _fit(facts: Facts) -> str:
    """Why a pair may be merged without more ado."""
    told = f"near: cosine {facts.cosine:.3f}"
    if isnan(facts.change):
        return told
    how = "go the same way" if facts.change > 0.3 else "hardly interfere"
    return f"{told}; their changes to {facts.base} {how} (cosine {shown(facts.change)})"


def shown(cosine: float) -> str:
    """Two digits, and no minus before nothing."""
    return f"{cosine:.2f}".replace("-0.00", "0.00")
