"""Many members compared at a time: who is better than whom, within which ranks, and what a suite is too small to show.

All members are scored on the same items; every comparison is paired, and tasks have equal weight. Claims over a whole
board are corrected, so that in 95 % of boards none of them is false, however the leader was picked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import sqrt
from typing import NamedTuple

import numpy as np

from glue.errors import SuiteError
from glue.evaluate.statistics import Weights, checked, factors, mcnemar, pairs, quantile

Results = Mapping[str, np.ndarray]  # task -> [items]

RESAMPLES = 2000


class Comparison(NamedTuple):
    """Two members by name, how far the better one is ahead, and p values of that: alone, and corrected by Holm."""

    better: str
    worse: str
    gap: float
    p: float
    corrected: float


class Rank(NamedTuple):
    """A place on a board, from 1; members with equal scores share the best of theirs. With the ends of its interval."""

    value: int
    best: int
    worst: int


def holm(p: Sequence[float]) -> np.ndarray:
    """p values corrected for there being many (Holm 1979): the chance of any false claim is kept, however they depend.

    p  [claims]
    """
    alone = np.asarray(p, dtype=np.float64)
    order = np.argsort(alone, kind="stable")
    corrected = np.empty_like(alone)
    corrected[order] = np.minimum(1, np.maximum.accumulate(alone[order] * np.arange(len(alone), 0, -1)))
    return corrected


def comparisons(members: Mapping[str, Results], against: str | None = None, *,
                weights: Weights = None) -> list[Comparison]:
    """Every pair of members, or each with the one that they are measured against; the surest first.

    weights  task to what it counts for, as of `statistics.average`

    One task of right and wrong has McNemar's exact test. Otherwise the sum of differences is held against what turning
    them around at random gives: the normal tail, corrected for the sum going in steps.
    """
    names = list(members)
    chosen = list(combinations(names, 2)) if against is None else [(a, against) for a in names if a != against]
    found = []
    for a, b in chosen:
        gap, p = _tested(pairs(members[a], members[b]), members[a], members[b], weights)
        found.append((a, b, gap, p) if gap >= 0 else (b, a, -gap, p))
    corrected = holm([p for *_, p in found])
    return sorted((Comparison(*row, float(c)) for row, c in zip(found, corrected, strict=True)),
                  key=lambda one: (one.corrected, one.p, -one.gap))


def leaders(members: Mapping[str, Results], level: float = 0.95, *, weights: Weights = None) -> list[str]:
    """The members that no other is shown to be better than, best first; a sole one is a winner."""
    behind = {one.worse for one in comparisons(members, weights=weights) if one.corrected < 1 - level}
    scores = dict(zip(members, _stacked(members, weights)[0], strict=True))
    return sorted(set(members) - behind, key=lambda name: (-scores[name], name))


def ranks(members: Mapping[str, Results], *, level: float = 0.95, resamples: int = RESAMPLES,
          seed: int = 0, weights: Weights = None) -> dict[str, Rank]:
    """The rank of each member, within the ranks that it could have; the interval of one member covers its true rank.

    A member could be as high as the number of those lets it that are surely better, and as low as those that are surely
    worse do. Sure is what lies beyond the largest studentised difference from this member among all others that the
    paired bootstrap finds (Mogstad, Romano, Shaikh and Wilhelm 2024). Bootstrapped ranks themselves would be too sure
    of the order of equal members.
    """
    scores, tasks, counts = _stacked(members, weights)
    moved = resampled(tasks, resamples, np.random.default_rng(seed)) - scores  # [resamples, n]
    found = {}
    for place, name in enumerate(members):
        gaps, raw, careful = scores - scores[place], *_errors(tasks, counts, place)
        away = np.abs(moved - moved[:, place:place + 1])
        most = np.divide(away, raw, out=np.zeros_like(away), where=raw > 0).max(1)
        beyond = careful * float(np.quantile(most, level))
        found[name] = Rank(1 + int((gaps > 1e-12).sum()), 1 + int((gaps > beyond).sum()),
                           len(scores) - int((gaps < -beyond).sum()))
    return found


def detectable(items: Mapping[str, int], apart: Mapping[str, float] | float, *, level: float = 0.95,
               power: float = 0.8, weights: Weights = None) -> float:
    """The smallest difference between two members that a suite shows with this power, as a share of 1.

    items  task to how many there are
    apart  share of items that one of the two has right and the other wrong, of all tasks or by task (see `apart`)
    """
    if not items or min(items.values()) < 1:
        raise SuiteError("a suite without items shows nothing", fix="look at the split: it is empty")
    by_task = dict.fromkeys(items, apart) if isinstance(apart, float | int) else apart
    counts = zip(factors(list(items), weights), items.items(), strict=True)
    spread = sum(count ** 2 * by_task[task] / n for count, (task, n) in counts) / len(items) ** 2
    return (quantile((1 + level) / 2) + quantile(power)) * sqrt(spread)


def apart(members: Mapping[str, Results]) -> dict[str, float]:
    """By task, the mean square of differences between two members: the share of items that just one of them has right.

    The median over all pairs of members.
    """
    together = [pairs(members[a], members[b]) for a, b in combinations(members, 2)]
    if not together:
        raise SuiteError("one member alone is not apart from any other", fix="compare at least two")
    return {task: float(np.median([np.mean(one[task] ** 2) for one in together])) for task in together[0]}


def _tested(differences: Mapping[str, np.ndarray], a: Results, b: Results, of: Weights) -> tuple[float, float]:
    """The macro-averaged difference, and the p value of its being none."""
    from scipy.special import ndtr

    weights = {task: count / (len(differences) * len(one))
               for count, (task, one) in zip(factors(list(differences), of), differences.items(), strict=True)}
    gap = float(sum(weights[task] * one.sum() for task, one in differences.items()))
    (task, only), *more = differences.items()
    if not more and np.isin(np.concatenate([a[task], b[task]]), (0, 1)).all():
        return gap, mcnemar(a[task], b[task])
    parts = np.concatenate([weights[task] * one for task, one in differences.items()])
    parts = np.abs(parts[parts != 0])
    if not len(parts):
        return gap, 1.0
    # turning an item around moves the sum by twice its part; a sum stands for all within half of a usual step
    sure = max(0.0, abs(gap) - float(parts.mean()))
    return gap, float(2 * ndtr(-sure / sqrt(float((parts ** 2).sum()))))


def _stacked(members: Mapping[str, Results], weights: Weights) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Macro scores [n], the results of each task [items, n] times what it counts for, and that [tasks]."""
    names = list(members)
    if not names:
        raise SuiteError("there is no member to compare", fix="score at least one")
    for name in names[1:]:
        pairs(members[names[0]], members[name])
    of = sorted(members[names[0]])
    counts = factors(of, weights)
    tasks = [count * np.stack([checked(members[name][task]) for name in names], 1)
             for task, count in zip(of, counts, strict=True)]
    return np.mean([task.mean(0) for task in tasks], axis=0), tasks, counts


def resampled(tasks: Sequence[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Macro scores of resamples [resamples, n]: items are drawn within each task, the same for all members."""
    total = np.zeros((resamples, tasks[0].shape[1]))
    for results in tasks:
        items = len(results)
        step = max(1, (1 << 22) // items)
        for start in range(0, resamples, step):
            some = min(step, resamples - start)
            drawn = rng.integers(items, size=(some, items)) + items * np.arange(some)[:, None]
            times = np.bincount(drawn.ravel(), minlength=some * items).reshape(some, items)
            total[start:start + some] += times.astype(np.float64) @ results / items
    return total / len(tasks)


def _errors(tasks: Sequence[np.ndarray], counts: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors [n] of the difference of each member from one: as resampled, and with two pairs added to a task.

    One pair either way, as Bonett and Price (2012) do: what was never seen to differ may still differ.
    """
    raw, careful = np.zeros((2, tasks[0].shape[1]))
    for results, count in zip(tasks, counts, strict=True):
        away, n = results - results[:, place:place + 1], len(results)
        squares = ((away - away.mean(0)) ** 2).sum(0)
        raw += squares / n ** 2
        careful += (squares + 2 * count ** 2) / (n * (n + 2))
    return np.sqrt(raw) / len(tasks), np.sqrt(careful) / len(tasks)
