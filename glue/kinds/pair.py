"""The two small models of a proxy as sources, on one set of weights where the tuned one is an adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from glue.kinds import Dtype, Running
from glue.kinds.local_source import Local
from glue.kinds.proxy import members
from glue.kinds.proxy import pair as loaded
from glue.member import Member


def pair_sources(proxy: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> tuple[Local, Local]:
    """The tuned small model of a proxy, and the untuned one. The large member is not touched."""
    _, before, after = members(proxy)
    small, tuned, switch = loaded(before, after, device=device, dtype=dtype)
    if tuned is not None:
        return Local(tuned), Local(small)
    assert switch is not None, "a pair is two models, or one and a switch"
    on = Local(replace(small, member=after, model=_inside(small, switch.on)))
    return on, Local(replace(small, model=_inside(small, switch.off)), on.lock)


def _inside(running: Running, context: Callable[[], AbstractContextManager]) -> Any:
    """Its model, to whoever runs it: always inside the context."""
    return _Within(running.model, context)


class _Within:
    """A model that runs inside a context, and is itself in everything else."""

    def __init__(self, model: Any, context: Any):
        self._model, self._context = model, context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **asked: Any) -> Any:
        with self._context():
            return self._model(**asked)
