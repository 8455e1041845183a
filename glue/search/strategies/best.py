"""No merge at all: the member that does best by itself. What every other strategy has to beat."""

from __future__ import annotations

from glue.search import searching
from glue.search.space import Found, Space


@searching.add("best", merges=False)
def best(space: Space) -> Found:
    """The best single member; the first by name where several are."""
    return space.found(space.singles()[0])
