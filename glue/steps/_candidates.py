"""Candidates of a search, made and asked in memory: what a worker does, and what it keeps from one to the next.

No candidate touches the disk. Its tensors come from the same targets that write the result of the search, and go
straight into one model that stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from glue.family import Choice
from glue.kinds import Dtype, Place
from glue.member import Member, canonical
from glue.steps import Measured
from glue.steps.merge import source_of, sources_of

if TYPE_CHECKING:
    from glue.evaluate.fast import Prepared
    from glue.kinds import Running
    from glue.kinds.model import Skeleton
    from glue.merge.variants import Variants
    from glue.search.candidate import Candidate

LAYER = re.compile(r"\.(\d+)\.")  # the first number in a tensor's name is its layer
SEARCHES = 8  # that a worker remembers: those of several families go on side by side
PARTS = 16  # of the items, as tokens, that it remembers of each


@dataclass(frozen=True)
class Ground:
    """What all candidates of one search have in common.

    key     of everything that results depend on, but for the candidate and the items
    layers  of each member
    place   where candidates are merged and asked
    """

    key: str
    members: tuple[Member, ...] = field(compare=False)
    base: Member | None = field(compare=False)
    merge: Choice = field(compare=False)
    dtype: str | None = field(compare=False)
    suite: Measured = field(compare=False)
    seed: int = field(compare=False)
    layers: int = field(compare=False)
    place: Place = field(compare=False, default=Place())

    @staticmethod
    def of(members: list[Member], base: Member | None, merge: Choice, dtype: str | None, suite: Measured,
           seed: int, place: Place = Place()) -> Ground:  # noqa: B008 - a value
        """Reads headers, and the items."""
        digests = suite.digests()
        told = [[member.name, member.path, member.digest] for member in (*members, *([base] if base else []))]
        key = canonical([told, base is None, merge.spelled(), dtype, seed, place.device, place.dtype,
                         [[repr(task), digests[task.name]] for task in suite.suite.tasks]])
        return Ground(key, tuple(members), base, merge, dtype, suite, seed, layers_of(members[0]), place)

    @property
    def frame(self) -> Member:
        """The member whose configuration and tokenizer a merge takes over."""
        return self.base or self.members[0]

    def member(self, name: str) -> Member:
        """The member of that name."""
        return next(member for member in self.members if member.name == name)

    def variants(self) -> Variants:
        """The merges of these members; their files are opened here."""
        from glue.merge.variants import Variants

        return Variants(self.merge, sources_of(list(self.members)), source_of(self.base), seed=self.seed,
                        out_dtype=self.dtype, device=self.place.device)

    def setting(self, candidate: Candidate) -> Callable[[str], Mapping[str, Any]]:
        """The merge method's parameters for each tensor, by its name; members without a weight there take no part."""
        from glue.search.candidate import group_of

        names = [member.name for member in self.members if member.name in candidate.names]

        @lru_cache(None)
        def of_group(group: int) -> Mapping[str, Any]:
            told = candidate.arguments(group, names)
            rows = {word: dict(zip(names, value, strict=True)) for word, value in told.items()
                    if isinstance(value, list)}
            taking = [name for name in names if rows["weight"][name]]
            return {**told, **{word: {name: row[name] for name in taking} for word, row in rows.items()}}

        return lambda tensor: of_group(group_of(layer_of(tensor), self.layers, candidate.groups))


def measure(ground: Ground, candidate: Candidate, items: np.ndarray | None = None) -> np.ndarray:
    """In a worker: results [k] of one candidate on some of the items, or on all of them."""
    from glue.evaluate.fast import score

    held = opened(ground)
    running = held.assembled(candidate) if candidate.merged else ground.place.load(ground.member(candidate.names[0]))
    results = score(running, held.prepared(running, items))
    return np.concatenate(list(results.values()))


class Opened:
    """What a worker keeps of a search: its members mapped, and its items as tokens."""

    def __init__(self, ground: Ground):
        self.ground = ground
        self._variants: Variants | None = None
        self._prepared: dict[tuple[str, bytes], Prepared] = {}

    def assembled(self, candidate: Candidate) -> Running:
        """The candidate in this worker's one model of its architecture."""
        from glue.kinds.frame import architecture
        from glue.merge.variants import marks

        ground = self.ground
        self._variants = self._variants or ground.variants()
        merge = self._variants.merge(ground.setting(candidate)).glanced()
        told = {name: (ground.key, mark) for name, mark in marks(merge).items()}
        skeleton = _skeleton(architecture(ground.frame), ground.place.device, ground.place.dtype)
        return ground.place.settle(skeleton.filled(ground.frame, merge, told))

    def prepared(self, running: Running, items: np.ndarray | None) -> Prepared:
        """Some of the items as tokens, those of one task after those of the other."""
        from glue.evaluate.fast import prepare

        key = running.member.version, b"" if items is None else items.tobytes()
        if key not in self._prepared:
            tasks, asked = self.ground.suite.suite.tasks, self.ground.suite.items()
            if items is not None:
                asked = _some(asked, items)
            while len(self._prepared) >= PARTS:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[key] = prepare(running.tokenizer, [task for task in tasks if asked[task.name]], asked)
        return self._prepared[key]


def _some(asked: Mapping[str, list], items: np.ndarray) -> dict[str, list]:
    """Of the items of each task, those of these indices, which count through all tasks, in ascending order."""
    found, first = {}, 0
    for task, some in asked.items():
        found[task] = [some[k - first] for k in items if first <= k < first + len(some)]
        first += len(some)
    return found


@lru_cache(maxsize=SEARCHES)
def opened(ground: Ground) -> Opened:
    """What this worker keeps of a search."""
    return Opened(ground)


@lru_cache(maxsize=1)  # a model is large
def _skeleton(architecture: str, device: str, dtype: Dtype) -> Skeleton:
    from glue.kinds.model import Skeleton

    return Skeleton(device, dtype)


def layer_of(tensor: str) -> int | None:
    """The layer that a tensor belongs to; None for what stands outside of the layers."""
    found = LAYER.search(tensor)
    return int(found[1]) if found else None


def layers_of(member: Member) -> int:
    """How many layers a member has, as the names of its tensors tell; reads headers only."""
    from glue.kinds import weights

    return 1 + max((layer for layer in map(layer_of, weights(member).headers) if layer is not None), default=-1)


def alike(members: list[Member]) -> np.ndarray:
    """In a worker: how alike the MLPs of the members are, [n, n]; Model-GLUE's order goes by these."""
    from glue.cluster.similarity import similarity
    from glue.kinds import weights

    return similarity([weights(member) for member in members], part="mlp")
