"""One zoo: what racing came to beside what the grid came to, and how many answers each asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glue.evaluate.statistics import Interval, difference
from glue.member import Member, Table
from glue.plan import Plan
from glue.search.candidate import Candidate
from glue.steps import Measured
from glue.steps.search import JOURNAL, SEARCH_NOTE, Journal

SHARE = 1 / 5  # of the grid's answers is what racing may ask for
Results = Mapping[str, np.ndarray]  # task -> [items]


@dataclass(frozen=True)
class Search:
    """What a search found on dev items.

    answers  how many it asked for        candidates  how many it measured, on some items or all
    value    macro mean of what it found
    """

    candidate: Candidate
    answers: int
    candidates: int
    value: float


@dataclass(frozen=True)
class Compared:
    """Racing and the grid on one zoo.

    members    of the zoo                items  of the dev splits
    dev, test  how much better is what racing found than what the grid found, item by item
    gain       how much better is what the grid found than the best member, on test items
    """

    seed: int
    members: int
    items: int
    grid: Search
    raced: Search
    dev: Interval
    test: Interval
    gain: Interval

    @property
    def share(self) -> float:
        """Answers that racing asked for, as a share of the grid's."""
        return self.raced.answers / self.grid.answers

    @property
    def alike(self) -> bool:
        """Whether both found the same members."""
        return self.raced.candidate.names == self.grid.candidate.names

    @property
    def level(self) -> bool:
        """Whether racing is not behind by more than noise, on dev items: the 95 % interval reaches 0."""
        return self.dev.high >= 0

    @property
    def reached(self) -> bool:
        """Whether racing reached the grid's choice for no more than its share of the answers."""
        return self.alike and self.level and self.share <= SHARE


def compare(plan: Plan) -> Compared:
    """The searches `best`, `grid` and `raced` of a plan that is done, and their table `scored`."""
    tasks = {task.line.name: task for task in plan}
    suite: Measured = tasks["grid"].arguments["suite"]
    sizes = {task: len(items) for task, items in suite.items().items()}
    (grid, wide), (raced, fast) = (_search(tasks[name].folder(plan.zoo), sizes) for name in ("grid", "raced"))
    scored = _scored(plan["scored"])
    best_test, wide_test, fast_test = (scored[plan[name].name] for name in ("best", "grid", "raced"))
    return Compared(plan.recipe.seed, len(tasks["grid"].arguments["members"]), sum(sizes.values()), grid, raced,
                    difference(fast, wide), difference(fast_test, wide_test), difference(wide_test, best_test))


def _search(folder: Path, sizes: Mapping[str, int]) -> tuple[Search, Results]:
    """What a search says of itself, and what it measured of the candidate that it found."""
    told = json.loads((folder / SEARCH_NOTE).read_text())
    candidate = Candidate.unspelled(told["candidate"])
    results = Journal(folder / JOURNAL).known(sum(sizes.values()))[candidate]
    by_task = dict(zip(sizes, np.split(results, np.cumsum(list(sizes.values()))[:-1]), strict=True))
    return Search(candidate, told["items"], told["evaluated"], told["value"]), by_task


def _scored(table: Member) -> Mapping[str, Results]:
    """Member -> what it scored, by task."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for row in Table.read(table).rows:
        found.setdefault(row.member, {})[row.task] = np.asarray(row.results)
    return found
