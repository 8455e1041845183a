"""The order of members by what each is worth beside the others, as plain merges of subsets show on dev items."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from glue.errors import MethodError
from glue.search.candidate import Candidate
from glue.search.space import Space

PART = 2  # a search may spend one in so many of the candidates that it has left to find its order
ENUMERATED = 12  # members of which all subsets may be tried


def by_worth(space: Space) -> list[str]:
    """The members that a merge may hold, the most worthy first; by accuracy, then by name, where equal.

    A subset is worth what the plain average of its members scores (under the rule add: of what they add to the base),
    one alone what it scores as it is, nobody the mean of these: over all orders that moves everybody by the same, and
    in few it would favour who is last. What is measured counts against the budgets. Raises MethodError where half of
    these do not reach one order of the members.
    """
    singles = [name for single in space.singles() for name in single.names if name in space.others]
    names = sorted(singles)  # so that the order in the recipe changes nothing
    if len(names) < 2:
        return names
    if space.shapley is None:
        raise MethodError("a search in the order of Shapley values needs somebody who computes them",
                          fix="give it `shapley`, or write  order: accuracy")
    n = len(names)
    merges = 2 ** n - n - 1  # of all subsets: singles are measured, and nobody needs no measuring
    left = min(space.left, space.items_left // space.size)
    most = 2 ** n if n <= ENUMERATED and merges <= left // PART else left // PART
    if most < n + 1:
        enough = space.budget - left + PART * min(merges, n + 1)
        raise MethodError(f"a search that may try {left} candidates more cannot find the order of {n} members with "
                          f"half of these", fix=f"give it a budget of {enough} or more, or write  order: accuracy")

    nobody = fsum(space.value(Candidate.single(name)) for name in names) / n

    def value(subsets: Sequence[frozenset[int]]) -> list[float]:
        tried = [_merged([names[k] for k in sorted(subset)]) for subset in subsets]
        space.results([candidate for candidate in tried if candidate], "who is worth what")
        return [space.value(candidate) if candidate else nobody for candidate in tried]

    at = dict(zip(names, space.shapley(n, value, most), strict=True))
    return sorted(singles, key=lambda name: -at[name])


def _merged(names: Sequence[str]) -> Candidate | None:
    if len(names) < 2:
        return Candidate.single(names[0]) if names else None
    return Candidate.merge(dict.fromkeys(names, 1 / len(names)))
