"""How sure a score is: intervals over per-item results that are never of zero width.

Results are shares within 0 and 1, mostly 0 or 1. Tasks are averaged with equal weight, whatever their size; results of
two members are compared item by item. An end of an interval is the farthest mean that a score test does not refuse:
of all distributions of results with that mean, one for each task, the likeliest is taken, and the mean may be as many
of its standard errors away as the level says. One task of right and wrong gets the interval of Wilson (1927), pairs of
them that of Tango (1998). Where all items are right, the likeliest distribution with a lower mean still has some wrong
ones, so no interval is empty.

A percentile bootstrap knows no results but those it saw: of a member that is right on 98 of 100 items, its 95 %
intervals over 190 items cover 88 %. comparisons.py bootstraps where many members are compared at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

from glue.errors import SuiteError

Weights = Mapping[str, float] | None  # task to what its mean counts for; None: all the same, in sum 1


class Interval(NamedTuple):
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """The Wilson score interval of a proportion; successes may be a sum of shares, for which it is wide enough too."""
    assert 0 <= successes <= n and n > 0, f"{successes} successes of {n}"
    z2 = quantile((1 + level) / 2) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def proportion(results: np.ndarray, level: float = 0.95) -> Interval:
    """The mean of one task: Wilson where every result is 0 or 1, or all are equal; Student's t otherwise.

    results  [items]
    """
    results = checked(results)
    n, mean = len(results), float(results.mean())
    if np.isin(results, (0, 1)).all() or np.ptp(results) == 0:
        return wilson(min(float(results.sum()), n), n, level)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + level) / 2)) * float(results.std(ddof=1)) / sqrt(n)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def average(by_task: Mapping[str, np.ndarray], *, weights: Weights = None, level: float = 0.95) -> Interval:
    """The mean over tasks of the mean over items.

    by_task  task to results [items]
    weights  task to what its mean counts for in the sum; equal shares of 1 where there are none
    """
    return _scored({task: checked(by_task[task]) for task in sorted(by_task)}, 0.0, weights, level)


def difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], *, weights: Weights = None,
               level: float = 0.95) -> Interval:
    """How much better a is than b, macro-averaged; both on the same items in the same order.

    a, b     task to results [items]
    weights  as of `average`
    Raises SuiteError where tasks or numbers of items differ.
    """
    return _scored(dict(sorted(pairs(a, b).items())), -1.0, weights, level)


def unbounded(by_task: Mapping[str, np.ndarray], *, level: float = 0.95) -> Interval:
    """The mean over tasks of the mean over items of any numbers, such as losses, with the normal interval of its error.

    by_task  task to [items], two or more each
    """
    if not by_task or min(map(len, by_task.values())) < 2:
        raise SuiteError("an error is known of two items or more", fix="measure on a larger split")
    found = [np.asarray(by_task[task], dtype=np.float64) for task in sorted(by_task)]
    mean = float(np.mean([some.mean() for some in found]))
    half = quantile((1 + level) / 2) * sqrt(sum(float(some.var(ddof=1)) / len(some) for some in found)) / len(found)
    return Interval(mean, mean - half, mean + half)


def pairs(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """task to a - b [items]. Raises SuiteError where tasks or numbers of items differ."""
    if set(a) != set(b):
        raise SuiteError(f"the tasks of two members differ: {', '.join(sorted(set(a) ^ set(b)))} on one side only",
                         fix="evaluate both on the same suite")
    return {task: _paired(a[task], b[task], task) for task in a}


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p value that two members are right equally often, from the items on which one of them is.

    a, b  [items] of 0 or 1
    """
    from scipy.stats import binomtest

    differences = _paired(a, b, "the task")
    if not np.isin(np.concatenate([a, b]), (0, 1)).all():
        raise SuiteError("McNemar's test counts right and wrong answers; these results are shares",
                         fix="compare shares with `difference`")
    ahead, behind = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0


def factors(tasks: Sequence[str], weights: Weights) -> np.ndarray:
    """What the mean of each task is multiplied by before all are averaged [tasks]: 1 where tasks count equally."""
    return np.ones(len(tasks)) if weights is None else len(tasks) * np.array([weights[task] for task in tasks])


def _scored(by_task: Mapping[str, np.ndarray], lowest: float, weights: Weights, level: float) -> Interval:
    """The macro mean within the ends of its score interval.

    by_task  of [items], within lowest and 1
    """
    if not by_task:
        raise SuiteError("there is no task to average over", fix="name a suite with at least one task")
    counts, z = factors(list(by_task), weights), quantile((1 + level) / 2)
    tasks = list(zip(by_task.values(), counts, strict=True))
    value = float(np.mean([count * results.mean() for results, count in tasks]))
    low = lowest * counts.mean() + _lower_end([count * (results - lowest) for results, count in tasks], z)
    high = counts.mean() - _lower_end([count * (1 - results) for results, count in tasks], z)
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _lower_end(tasks: Sequence[np.ndarray], z: float) -> float:
    """The lowest macro mean that a score test does not refuse, of results that cannot be below 0."""
    from scipy.optimize import brentq

    found = [np.unique(results, return_counts=True) for results in tasks]
    shape = len(tasks), max(len(seen) for seen, _ in found)
    values, counts = np.ones(shape), np.zeros(shape)
    for row, (seen, times) in enumerate(found):
        values[row, :len(seen)], counts[row, :len(seen)] = seen, times
    n = counts.sum(1)
    mean = float(((values * counts).sum(1) / n).mean())
    # t tasks are fitted with t means where one is asked for; nothing is lost with one task, one item each with many
    free = n - (len(tasks) - 1) / len(tasks)

    def refused(pull: float) -> float:
        """Above 0 where the test refuses the distributions that are pulled down so much; -1 where they are as seen."""
        means, variances = _pulled(values, counts, pull)
        away, allowed = (mean - means.mean()) ** 2, z * z * float((variances / free).sum()) / len(tasks) ** 2
        return (away - allowed) / (away + allowed) if away > 0 else -1.0

    if mean <= 0:
        return 0.0
    most = float(n.sum())
    while refused(most) < 0:
        most *= 4
    pull = float(brentq(refused, 1e-9, most, xtol=1e-10 * most, rtol=1e-12))
    return float(_pulled(values, counts, pull)[0].mean())


def _pulled(values: np.ndarray, counts: np.ndarray, pull: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each task's likeliest distribution, when its mean costs `pull` of log likelihood a unit.

    That is c / (norm + pull * v) of each value v seen c times; where these come to less than 1, the rest lies at 0.

    values, counts  [tasks, distinct values], values at least 0, padded with values of 1 and counts of 0
    pull            above 0
    """
    n, costs = counts.sum(1), pull * values
    # all three are below the norm, and 1 / sum of shares is concave in it, whence Newton's steps only rise
    norm = np.maximum((counts - costs).max(1), n - (costs * counts).sum(1) / n).clip(0)
    with np.errstate(divide="ignore"):
        inside = np.divide(counts, costs).sum(1) > 1
    for _ in range(100):
        spread = norm[:, None] + costs
        shares = counts / np.where(spread > 0, spread, 1)
        total = shares.sum(1)
        step = np.where(inside, total * (total - 1) / (shares / np.where(spread > 0, spread, 1)).sum(1), 0)
        norm = norm + step.clip(0)
        if not (step > 1e-13 * n).any():
            break
    means = (shares * values).sum(1)
    return means, ((shares * values ** 2).sum(1) - means ** 2).clip(0)


def checked(results: np.ndarray) -> np.ndarray:
    """Results of one task as numbers [items]. Raises SuiteError where there are none, or they are not shares of 1."""
    results = np.asarray(results, dtype=np.float64)
    assert results.ndim == 1, f"results are one number an item, not {results.shape}"
    if not len(results):
        raise SuiteError("a task without items has no score", fix="look at the split: it is empty")
    if not ((results >= 0) & (results <= 1)).all():
        raise SuiteError(f"results go from {results.min():g} to {results.max():g}; they are shares within 0 and 1",
                         fix="divide the metric by the most it can be")
    return results


def _paired(a: np.ndarray, b: np.ndarray, task: str) -> np.ndarray:
    a, b = checked(a), checked(b)
    if len(a) != len(b):
        raise SuiteError(f"two members were scored on {len(a)} and on {len(b)} items of {task}",
                         fix="evaluate both on the same split: only the same items can be compared one by one")
    return a - b


def quantile(chance: float) -> float:
    """Below which a standard normal number lies with this chance."""
    from scipy.special import ndtri

    return float(ndtri(chance))
