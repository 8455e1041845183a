"""Everything at once with one weight: the tuned baseline that knows nothing of single members."""

from __future__ import annotations

from typing import Annotated

from glue.family import Field, Positive
from glue.search import searching
from glue.search.space import Found, Space


@searching.add("uniform", source="arXiv:2212.04089", version=2)
def uniform(space: Space, *, coefficients: Annotated[list[Positive], Field(min_length=1)]
            = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]) -> Found:  # noqa: B006 - read only; a tuple is no YAML value
    """All members with the same weight, the best of these; or the best single member unless that is beyond luck better.

    coefficients  rule add: the weights to try, the smallest where equal; under the rule interpolate there is one
                  merge, the plain average
    """
    single = space.singles()[0]
    tried = space.results(space.together(sorted(coefficients)), "all members with one weight")
    return space.found(space.proven(space.best([single, *tried])))
