"""What a search strategy sees: members by name, a way to measure candidates in batches, a budget, a memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

import numpy as np

from glue.errors import MethodError

Rule = Literal["add", "interpolate"]


@dataclass(frozen=True, order=True)
class Candidate:
    """One member as it is, or a merge of members by weight. Equal whatever the order of the members was.

    parts  (name, weight) by name; weights of zero are left out
    """

    parts: tuple[tuple[str, float], ...]
    merged: bool

    @staticmethod
    def single(name: str) -> Candidate:
        """The member itself, untouched by any merge method."""
        return Candidate(((name, 1.0),), False)

    @staticmethod
    def merge(weights: Mapping[str, float]) -> Candidate:
        """The merge of the members with these weights."""
        parts = tuple(sorted((name, float(weight)) for name, weight in weights.items() if weight))
        assert parts, "a merge has at least one member with a weight"
        return Candidate(parts, True)

    @property
    def weights(self) -> dict[str, float]:
        """Name to weight; 1 for a member as it is."""
        return dict(self.parts)

    def __str__(self) -> str:
        return " + ".join(f"{weight:.3g} {name}" for name, weight in self.parts) if self.merged else self.parts[0][0]


class Row(NamedTuple):
    """One measurement: of what, how good, what for."""

    candidate: Candidate
    value: float
    purpose: str


class Gain(NamedTuple):
    """How much better one candidate is than another: difference of macro means, and its paired standard error."""

    value: float
    error: float

    def convinces(self, least: float) -> bool:
        """Whether it is above zero by at least `least` standard errors; with 0, as in the paper, a tie convinces."""
        if least == 0:
            return self.value >= 0
        # the item that alone makes the gain is worth one standard error exactly; rounding must not decide it
        return self.value > 0 and self.value >= least * self.error * (1 - 1e-9)


@dataclass(frozen=True)
class Found:
    """What a strategy came to, its macro mean on the items of the search, and everything that was measured."""

    candidate: Candidate
    value: float
    log: tuple[Row, ...]


class Space:
    """Members, how candidates made of them are measured, and how often that may be done.

    names     the members, in the order of the recipe
    evaluate  candidates -> results [items] in 0..1 of each, measured side by side as one batch
    tasks     [items], which task an item belongs to; the macro mean is the mean over tasks of the mean over items
    rule      add: a merge adds weight * (member - base) to a base; interpolate: weights are shares that sum to 1
    budget    how many candidates may be measured; at least one for each member. What is known already is free
    neutral   members that add nothing, such as the base; they count under the rule add only
    """

    def __init__(self, names: Sequence[str], evaluate: Callable[[Sequence[Candidate]], list[np.ndarray]],
                 tasks: np.ndarray, *, rule: Rule, budget: int, neutral: Collection[str] = frozenset()):
        if budget < len(names):
            raise MethodError(f"a search with a budget of {budget} cannot measure its {len(names)} members once each",
                              fix=f"give it a budget of {len(names)} or more; what is beyond that goes to merges")
        assert names and len(set(names)) == len(names), "a search has at least one member, and each once"
        self.names, self.rule, self.budget, self.left = tuple(names), rule, budget, budget
        self.others = tuple(name for name in names if rule == "interpolate" or name not in neutral)
        self.log: list[Row] = []
        self._evaluate = evaluate
        _, self._task, self._items = np.unique(np.asarray(tasks), return_inverse=True, return_counts=True)
        self._known: dict[Candidate, np.ndarray] = {}
        self._values: dict[Candidate, float] = {}

    def results(self, candidates: Iterable[Candidate], purpose: str = "") -> dict[Candidate, np.ndarray]:
        """Results [items] of the candidates, in their order; those that the budget does not reach are left out."""
        wanted = list(dict.fromkeys(candidates))
        fresh = [candidate for candidate in wanted if candidate not in self._known][:self.left]
        measured = self._evaluate(fresh) if fresh else []
        assert len(measured) == len(fresh), f"{len(fresh)} candidates were given, {len(measured)} results came back"
        for candidate, result in zip(fresh, measured, strict=True):
            result = np.asarray(result, dtype=np.float64)
            assert result.shape == self._task.shape, f"results are {result.shape}, there are {len(self._task)} items"
            assert ((result >= 0) & (result <= 1)).all(), f"results of {candidate} are not all within 0 and 1"
            self._known[candidate] = result
            self._values[candidate] = float(self._by_task(result).mean())
            self.log.append(Row(candidate, self._values[candidate], purpose))
        self.left -= len(fresh)
        return {candidate: self._known[candidate] for candidate in wanted if candidate in self._known}

    def value(self, candidate: Candidate) -> float:
        """The macro mean of a candidate that has been measured."""
        return self._values[candidate]

    def gain(self, a: Candidate, b: Candidate) -> Gain:
        """How much better a is than b, item by item; both have been measured."""
        differences = self._known[a] - self._known[b]
        means = self._by_task(differences)
        spread = self._by_task((differences - means[self._task]) ** 2)  # a task of one item has no spread to show
        return Gain(float(means.mean()), sqrt(float((spread / np.maximum(self._items - 1, 1)).sum())) / len(means))

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """The measured candidate with the highest macro mean; the first of those that have it."""
        return max(candidates, key=self.value)

    def singles(self) -> list[Candidate]:
        """Every member as it is, measured, best first; by name where they are equal."""
        found = self.results((Candidate.single(name) for name in self.names), "member as it is")
        return sorted(found, key=lambda candidate: (-self.value(candidate), candidate))

    def together(self, weights: Iterable[float]) -> list[Candidate]:
        """All members that add something, each time with one weight; under the rule interpolate the plain average."""
        if not self.others:
            return []
        shares = [weight for weight in weights if weight] if self.rule == "add" else [1 / len(self.others)]
        return [Candidate.merge(dict.fromkeys(self.others, share)) for share in shares]

    def found(self, candidate: Candidate) -> Found:
        """The end of a search."""
        return Found(candidate, self.value(candidate), tuple(self.log))

    def _by_task(self, results: np.ndarray) -> np.ndarray:
        """Mean over the items of each task: [items] -> [tasks]."""
        return np.bincount(self._task, weights=results) / self._items
