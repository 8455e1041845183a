"""Requests grouped by route, so that the experts a question chose judge all of its answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from glue.kinds import Running

T = TypeVar("T")
R = TypeVar("R")


def by_route(running: Running, contexts: Sequence[Sequence[int]], requests: Sequence[T],
             run: Callable[[list[T]], list[R]], longest: int) -> list[R]:
    """Run each route's requests together, inside that route; the results stand in the order of the requests.

    contexts  token ids of each request's context; its last `longest` choose, which is what the model can see
    A member without routes runs all requests at once.
    """
    if running.route is None:
        return run(list(requests))
    assert running.pinned is not None, "a member with routes can be pinned to one"
    seen = [tuple(context[-longest:]) for context in contexts]
    distinct = list(dict.fromkeys(seen))  # the answers to one question share its context
    chosen = dict(zip(distinct, running.route([list(context) for context in distinct]), strict=True))
    groups: dict[Hashable, list[int]] = {}
    for k, context in enumerate(seen):
        groups.setdefault(chosen[context], []).append(k)
    results: dict[int, R] = {}
    for route, members in groups.items():
        with running.pinned(route):
            results.update(zip(members, run([requests[k] for k in members]), strict=True))
    return [results[k] for k in range(len(requests))]
