"""Requests grouped by who answers them, so that the experts a question chose judge all of its answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from os.path import commonprefix
from typing import Any, TypeVar

from glue.kinds import Running

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound=Hashable)


def by_expert(running: Running, contexts: Sequence[str], requests: Sequence[T],
              run: Callable[[Running, list[T]], list[R]]) -> list[R]:
    """Let each request be run by the member that answers it; the results stand in the order of the requests.

    contexts  the text that chooses, of each request; the same for all requests that belong together
    A member that answers everything itself runs all requests at once.
    """
    if running.choose is None:
        return run(running, list(requests))
    distinct = list(dict.fromkeys(contexts))
    chosen = dict(zip(distinct, running.choose(distinct), strict=True))
    return _grouped([chosen[text] for text in contexts], requests, lambda i, some: run(running.experts[i], some))


def by_route(running: Running, contexts: Sequence[Sequence[int]], requests: Sequence[T],
             run: Callable[[list[T]], list[R]], longest: int) -> list[R]:
    """Run each route's requests together, inside that route; the results stand in the order of the requests.

    contexts  token ids of each request's context; its last `longest` choose, which is what the model can see
    A member without routes runs all requests at once.
    """
    if running.route is None:
        return run(list(requests))
    seen = [tuple(context[-longest:]) for context in contexts]
    distinct = list(dict.fromkeys(seen))  # the answers to one question share its context
    chosen = dict(zip(distinct, running.route([list(context) for context in distinct]), strict=True))

    def inside(route: Hashable, some: list[T]) -> list[R]:
        assert running.pinned is not None, "a member with routes can be pinned to one"
        with running.pinned(route):
            return run(some)

    return _grouped([chosen[context] for context in seen], requests, inside)


def _grouped(keys: Sequence[K], requests: Sequence[T], run: Callable[[K, list[T]], list[R]]) -> list[R]:
    """What `run` makes of the requests of each key, in the order of the requests."""
    groups: dict[K, list[int]] = {}
    for k, key in enumerate(keys):
        groups.setdefault(key, []).append(k)
    results: dict[int, R] = {}
    for key, places in groups.items():
        results.update(zip(places, run(key, [requests[k] for k in places]), strict=True))
    return [results[k] for k in range(len(requests))]


def document_texts(requests: Sequence[Any]) -> list[str]:
    """For each request of lm-eval the text that its document is known by: what its contexts have in common.

    Mostly all requests of a document have one context. Where each choice has its own (winogrande), it is what they
    begin with, so that no choice decides; contexts without text, which some metrics add, are passed over.
    """
    together: dict[Any, list[str]] = {}
    for request in requests:
        together.setdefault(_document(request), []).append(request.args[0])
    shared = {key: commonprefix([text for text in some if text.strip()]) for key, some in together.items()}
    return [shared[_document(request)] for request in requests]


def _document(request: Any) -> tuple[Any, ...]:
    """What tells a document from others; a request that belongs to none stands for itself."""
    return (request.task_name, request.doc_id) if request.doc_id is not None else (request.args[0],)
