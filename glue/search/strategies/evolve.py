"""Evolutionary search: weights, and other parameters, by member and layer group, as CMA-ES moves them."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Annotated, Any, Literal

import numpy as np

from glue.errors import MethodError, did_you_mean
from glue.family import Count, Field, Positive
from glue.search import searching
from glue.search.candidate import WEIGHT, Candidate
from glue.search.space import Found, Space

Range = Annotated[list[float], Field(min_length=2, max_length=2)]
DIGITS = 3  # of a gene: what is written down is exactly what was measured, and a member may well have no weight
STILL = 10  # generations without a candidate that is new end a search
SEEDS = 2**32  # that the library's generator takes


@searching.add("evolve", source="arXiv:2410.05357", version=2)
def evolve(space: Space, *, groups: Count = 1, weight: Range = [0.0, 1.0],  # noqa: B006 - read only
           also: dict[str, Range] = {},  # noqa: B006 - read only
           popsize: Annotated[int, Field(ge=4)] | Literal["by_length"] = "by_length",
           sigma: Positive = 1 / 6, prove: bool = True) -> Found:
    """The best of what CMA-ES tries, a generation at a time, until the budget is spent.

    groups   blocks of consecutive layers, each with weights of its own; where there is more than one, everything
             outside of layers is one group more. The paper's programs have 1 or 2
    weight   from and to; the search starts in the middle
    also     the same for other parameters of the merge method, by name: {density: [0.01, 1]}. What takes a value for
             each member is a gene for each
    popsize  at least 4; by_length: round(4 + 3 ln(genes)), as in one of the paper's programs; the other has 15
    sigma    first standard deviation, as a share of each range
    prove    the best single member is the answer unless the merge is better than luck among all that were tried;
             false, as in the paper: unless it is better

    Under the rule interpolate the weights of a group are divided by their sum. The paper tries 200 or 500 candidates
    with seed 42; here budget and seed are those of the step. What moves is the library `cmaes`, as in the paper: a
    point outside of the ranges is drawn again.
    """
    from cmaes import CMA

    genome = Genome(space, groups, {WEIGHT: weight, **also})
    single = space.singles()[0]
    if not space.others:
        return space.found(single)
    size = round(4 + 3 * log(genome.length)) if popsize == "by_length" else popsize
    middle, cube = np.full(genome.length, 0.5), np.tile([0.0, 1.0], (genome.length, 1))
    evolution = CMA(middle, sigma, bounds=cube, seed=space.seed % SEEDS, population_size=size)
    tried: list[Candidate] = [single]
    still = generation = 0
    while still < STILL:
        generation += 1
        points, left = [evolution.ask() for _ in range(size)], space.left
        candidates = [genome.candidate(point) for point in points]
        made = [candidate for candidate in candidates if candidate]
        results = space.results(made, f"generation {generation}")
        tried += results
        if any(candidate not in results for candidate in made):
            break  # the budget is spent
        # the lowest is the best; weights that are all zero make no candidate, and come last
        losses = [-space.value(candidate) if candidate else 1.0 for candidate in candidates]
        evolution.tell(list(zip(points, losses, strict=True)))
        still = still + 1 if space.left == left else 0
    best = space.best(tried)
    return space.found(space.proven(best) if prove else best)


class Genome:
    """What the genes of a point stand for: in every layer group the parameters, one gene a member or one for all.

    length  how many genes there are
    """

    def __init__(self, space: Space, groups: int, ranges: Mapping[str, list[float]]):
        known = {WEIGHT: True, **space.parameters}
        for word, (low, high) in ranges.items():
            if word not in known:
                raise MethodError(f"the merge method has no parameter '{word}' that can be searched"
                                  f"{did_you_mean(word, known)}", fix=f"it has {', '.join(known)}")
            least = 0.0 if word == WEIGHT and space.rule == "interpolate" else low
            if not least <= low < high:
                raise MethodError(f"'{word}' cannot be searched from {low:g} to {high:g}",
                                  fix="give the smaller value first; weights that are shares start at 0 or above")
        self._space, self._ranges, self._groups = space, ranges, space.grouped(groups)
        self._names = sorted(space.others)  # a gene has its place whatever the order in the recipe
        self._by_member = {word: known[word] for word in ranges}
        self._counts = [len(space.others) if by_member else 1 for by_member in self._by_member.values()]
        self.length = self._groups * sum(self._counts)

    def candidate(self, point: np.ndarray) -> Candidate | None:
        """The candidate of a point [genes] within 0 and 1; None where weights that have to sum to 1 are all 0."""
        genes = iter(np.split(point, np.cumsum(self._counts * self._groups)[:-1]))
        rows = [{word: self._values(word, next(genes)) for word in self._ranges} for _ in range(self._groups)]
        tables = [row.pop(WEIGHT) for row in rows]
        return self._space.merge(tables, {word: [row[word] for row in rows] for word in rows[0]})

    def _values(self, word: str, genes: np.ndarray) -> Any:
        low, high = self._ranges[word]
        values = [round(float(low + gene * (high - low)), DIGITS) for gene in genes]
        return dict(zip(self._names, values, strict=True)) if self._by_member[word] else values[0]
