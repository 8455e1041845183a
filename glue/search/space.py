"""What a search strategy sees: members by name, a way to measure candidates in batches, budgets, a memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal, NamedTuple, Protocol

import numpy as np

from glue.errors import MethodError
from glue.search.candidate import Candidate, Values
from glue.search.luck import luck

Rule = Literal["add", "interpolate"]
FALSE_GAINS = 0.05  # the share of searches that may end with a merge where all that was tried is equally good
FEWEST = 2  # items of a task in a sample: one alone shows no spread
Record = Callable[[Candidate, np.ndarray, np.ndarray], None]


# how many players, the values of several subsets, how many subsets at most -> what each player is worth
Shapley = Callable[[int, Callable[[Sequence[frozenset[int]]], Sequence[float]], int], Sequence[float]]


class Evaluate(Protocol):
    """Results within 0..1 of each candidate, measured side by side: of all items, or of the items named for each.

    items  one ascending list of indices for each candidate; left out where every candidate is asked for all items
    """

    def __call__(self, candidates: Sequence[Candidate], items: Sequence[np.ndarray] = ..., /) -> Iterable[np.ndarray]:
        ...


class Row(NamedTuple):
    """One measurement: of what, how good it is on all its items so far, what for, and how many items it took."""

    candidate: Candidate
    value: float
    purpose: str
    items: int


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

    @property
    def candidates(self) -> int:
        """How many candidates were measured, on some items or all."""
        return len({row.candidate for row in self.log})

    @property
    def items(self) -> int:
        """How many items were evaluated, over all candidates."""
        return sum(row.items for row in self.log)


class Space:
    """Members, how candidates made of them are measured, and how often that may be done.

    names        the members, in the order of the recipe
    evaluate     see Evaluate; results are recorded and remembered as they are taken from what it returns
    tasks        [items], which task an item belongs to; the macro mean is the mean over tasks of the mean over items
    rule         add: a merge adds weight * (member - base) to a base; interpolate: weights are shares that sum to 1
    budget       how many candidates may be measured; at least one for each member. What is remembered is free
    neutral      members that add nothing, such as the base; they count under the rule add only
    item_budget  how many items may be evaluated over all candidates; enough for `budget` candidates where left out
    seed         of whatever a strategy draws
    parameters   other parameters of the merge method that a strategy may set, and whether each is set by member
    layers       of the members; 0 where layers cannot be told apart
    similarity   [n, n] of the members
    shapley      computes what players are worth, see Shapley; only the order of that name asks it
    known        results [items] of a search that was cut off, NaN where there are none. They count as if they were
                 measured now, so that the search goes the same way, but are neither evaluated nor recorded again
    record       told (candidate, items, results) of whatever is evaluated, once
    """

    def __init__(self, names: Sequence[str], evaluate: Evaluate | Callable[[Sequence[Candidate]], Iterable[np.ndarray]],
                 tasks: np.ndarray | Sequence, *, rule: Rule, budget: int, neutral: Collection[str] = frozenset(),
                 item_budget: int | None = None, seed: int = 0, parameters: Mapping[str, bool] | None = None,
                 layers: int = 0, similarity: np.ndarray | None = None, shapley: Shapley | None = None,
                 known: Mapping[Candidate, np.ndarray] | None = None, record: Record | None = None):
        if budget < len(names):
            raise MethodError(f"a search with a budget of {budget} cannot measure its {len(names)} members once each",
                              fix=f"give it a budget of {len(names)} or more; what is beyond that goes to merges")
        assert names and len(set(names)) == len(names), "a search has at least one member, and each once"
        _, self._task, self._counts = np.unique(np.asarray(tasks), return_inverse=True, return_counts=True)
        self._all = np.arange(len(self._task))
        everything = len(names) * len(self._all)
        self.item_budget = budget * len(self._all) if item_budget is None else item_budget
        if self.item_budget < everything:
            raise MethodError(f"a search that may evaluate {item_budget} items cannot measure its {len(names)} members "
                              f"on {len(self._all)} items each", fix=f"let it evaluate {everything} or more")
        self.names, self.rule, self.budget, self.left = tuple(names), rule, budget, budget
        self.items_left, self.seed = self.item_budget, seed
        self.parameters, self.layers, self.similarity = dict(parameters or {}), layers, similarity
        self.shapley, self.size = shapley, len(self._all)
        self.others = tuple(name for name in names if rule == "interpolate" or name not in neutral)
        self.log: list[Row] = []
        self._evaluate, self._record = evaluate, record
        self._before = dict(known or {})
        self._known: dict[Candidate, np.ndarray] = {}
        self._values: dict[Candidate, float] = {}

    # -- measuring --

    def results(self, candidates: Iterable[Candidate], purpose: str = "",
                items: np.ndarray | None = None) -> dict[Candidate, np.ndarray]:
        """Results of the candidates, in their order, on the items that are named or all of them.

        Only what is not remembered is measured; candidates that the budgets do not reach are left out.
        """
        wanted = list(dict.fromkeys(candidates))
        items = self._all if items is None else np.asarray(items)
        fresh = self._afforded({candidate: self._lacking(candidate, items) for candidate in wanted})
        self._measure(fresh, purpose)
        return {candidate: self._known[candidate][items] for candidate in wanted
                if candidate in self._known and not np.isnan(self._known[candidate][items]).any()}

    def sample(self, share: float) -> np.ndarray:
        """Indices of this share of the items of every task, ascending; a larger share holds what a smaller one does."""
        def some(task: int) -> np.ndarray:
            mine = np.random.default_rng([self.seed, task]).permutation(np.flatnonzero(self._task == task))
            return mine[:max(FEWEST, ceil(share * len(mine)))]

        return np.sort(np.concatenate([some(task) for task in range(len(self._counts))]))

    def _lacking(self, candidate: Candidate, items: np.ndarray) -> np.ndarray:
        have = self._known.get(candidate)
        return items if have is None else items[np.isnan(have[items])]

    def _afforded(self, lacking: Mapping[Candidate, np.ndarray]) -> dict[Candidate, np.ndarray]:
        """What is lacking, in order, as far as the budgets go; they are charged."""
        fresh = {}
        for candidate, items in lacking.items():
            new = candidate not in self._known
            if len(items) and len(items) <= self.items_left and self.left >= new:
                fresh[candidate] = items
                self.left, self.items_left = self.left - new, self.items_left - len(items)
        return fresh

    def _measure(self, fresh: Mapping[Candidate, np.ndarray], purpose: str) -> None:
        for candidate, items in fresh.items():
            row = self._known.setdefault(candidate, np.full(len(self._all), np.nan))
            if candidate in self._before:
                row[items] = self._before[candidate][items]
        missing = {candidate: items[np.isnan(self._known[candidate][items])] for candidate, items in fresh.items()}
        missing = {candidate: items for candidate, items in missing.items() if len(items)}
        whole = all(len(items) == len(self._all) for items in missing.values())
        asked = (list(missing),) if whole else (list(missing), list(missing.values()))
        measured = self._evaluate(*asked) if missing else []
        for (candidate, items), result in zip(missing.items(), measured, strict=True):
            result = np.asarray(result, dtype=np.float64)
            assert result.shape == items.shape, f"results are {result.shape}, there are {len(items)} items"
            assert ((result >= 0) & (result <= 1)).all(), f"results of {candidate} are not all within 0 and 1"
            self._known[candidate][items] = result
            if self._record:
                self._record(candidate, items, result)
        for candidate, items in fresh.items():
            self._values[candidate] = float(self._by_task(self._known[candidate])[0].mean())
            self.log.append(Row(candidate, self._values[candidate], purpose, len(items)))

    # -- comparing --

    def value(self, candidate: Candidate) -> float:
        """The macro mean of a candidate over the items that it has been measured on."""
        return self._values[candidate]

    def gain(self, a: Candidate, b: Candidate, items: np.ndarray | None = None) -> Gain:
        """How much better a is than b, item by item, on these items or on all that both have been measured on."""
        differences = self._known[a] - self._known[b]
        if items is not None:
            some = np.full(len(self._all), np.nan)
            some[items] = differences[items]
            differences = some
        means, moves = self._by_task(differences)
        return Gain(float(means.mean()), sqrt(float((moves ** 2).sum())))

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """The measured candidate with the highest macro mean; the first of those that have it."""
        return max(candidates, key=self.value)

    def singles(self) -> list[Candidate]:
        """Every member as it is, measured, best first; by name where they are equal."""
        found = self.results((Candidate.single(name) for name in self.names), "member as it is")
        return sorted(found, key=lambda candidate: (-self.value(candidate), candidate))

    def proven(self, candidate: Candidate) -> Candidate:
        """The candidate if its lead over the best single member is more than luck, else that member.

        The best of many that are equally good looks better than they are, and min_gain does not ask how many were
        tried. The criterion: where all merges are truly as good as the best member, at most one search in twenty
        ends with a merge.
        """
        single = self.singles()[0]
        merges = [known for known in self._known if known.merged]
        if candidate not in merges:
            return single
        gain = self.gain(candidate, single)
        moves = np.stack([self._by_task(self._known[merge] - self._known[single])[1] for merge in merges])
        return candidate if gain.value > 0 and gain.convinces(luck(moves, FALSE_GAINS, self.seed)) else single

    # -- candidates --

    def together(self, weights: Iterable[float]) -> list[Candidate]:
        """All members that add something, each time with one weight; under the rule interpolate the plain average."""
        if not self.others:
            return []
        shares = [weight for weight in weights if weight] if self.rule == "add" else [1 / len(self.others)]
        return [Candidate.merge(dict.fromkeys(self.others, share)) for share in shares]

    def merge(self, tables: Sequence[Mapping[str, float]],
              others: Mapping[str, Values | Sequence[Values]] | None = None) -> Candidate | None:
        """The merge with these weights by group; under the rule interpolate each group's are divided by their sum.

        None where there is nothing to merge, or nothing in a group whose weights have to sum to 1.
        """
        if self.rule == "interpolate":
            totals = [sum(table.values()) for table in tables]
            if not all(totals):
                return None
            tables = [{name: weight / total for name, weight in table.items()}
                      for table, total in zip(tables, totals, strict=True)]
        return Candidate.merge(tables, others) if any(any(table.values()) for table in tables) else None

    def grouped(self, blocks: int) -> int:
        """How many layer groups so many blocks make, with what lies outside of layers. Raises MethodError."""
        if blocks > 1 and self.layers < blocks:
            what = f"have {self.layers} layers" if self.layers else "have no layers that can be told apart"
            raise MethodError(f"a search by {blocks} blocks of layers finds that its members {what}",
                              fix=f"ask for  groups: {max(self.layers, 1)}  or fewer")
        return blocks + 1 if blocks > 1 else 1

    def found(self, candidate: Candidate) -> Found:
        """The end of a search."""
        assert not np.isnan(self._known[candidate]).any(), "what is found has been measured on all items"
        return Found(candidate, self.value(candidate), tuple(self.log))

    def _by_task(self, results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean over the items of each task [tasks], and what each item adds to the macro mean beyond that [items].

        Squares of the second sum to the squared standard error of the macro mean. Items that are NaN are left out,
        and tasks of which there is no other; a task of one item shows no error.
        """
        counted = ~np.isnan(results)
        task, kept = self._task[counted], results[counted]
        counts = np.bincount(task, minlength=len(self._counts))
        means = np.bincount(task, weights=kept, minlength=len(counts)) / np.maximum(counts, 1)
        moves = np.zeros(len(results))
        moves[counted] = (kept - means[task]) / np.sqrt(counts * np.maximum(counts - 1, 1))[task]
        return means[counts > 0], moves / np.count_nonzero(counts)
