"""How sure a score is: intervals and paired comparisons over per-item results that are never of zero width.

Results are shares within 0 and 1, mostly 0 or 1. Tasks are averaged with equal weight, whatever their size. Bootstraps
resample items within each task, keep pairs together, and take their generator from the seed. Where all results of a
task are equal a resample shows nothing; then the items that were not seen are bounded as Wilson does: among n equal
results the share of other ones can be up to z^2 / (n + z^2).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import NamedTuple

import numpy as np

from glue.errors import SuiteError

RESAMPLES = 4000
BATCH = 1 << 22  # random counts that are drawn at a time


class Interval(NamedTuple):
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """The Wilson score interval of a proportion; successes may be a sum of shares, for which it is wide enough too."""
    assert 0 <= successes <= n and n > 0, f"{successes} successes of {n}"
    z2 = _z(level) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def proportion(results: np.ndarray, level: float = 0.95) -> Interval:
    """The mean of one task: Wilson where every result is 0 or 1, or all are equal; Student's t otherwise.

    results  [items]
    """
    results = _checked(results)
    n, mean = len(results), float(results.mean())
    if np.isin(results, (0, 1)).all() or np.ptp(results) == 0:
        return wilson(min(float(results.sum()), n), n, level)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + level) / 2)) * float(results.std(ddof=1)) / sqrt(n)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def average(by_task: Mapping[str, np.ndarray], *, level: float = 0.95, resamples: int = RESAMPLES,
            seed: int = 0) -> Interval:
    """The mean over tasks of the mean over items, with a bootstrap over the items of each task.

    by_task  task to results [items]
    """
    return _bootstrapped({task: _checked(results) for task, results in by_task.items()}, 0.0, level, resamples, seed)


def difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], *, level: float = 0.95,
               resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """How much better a is than b, macro-averaged; both on the same items in the same order.

    a, b  task to results [items]
    Raises SuiteError where tasks or numbers of items differ.
    """
    if set(a) != set(b):
        raise SuiteError(f"the tasks of two members differ: {', '.join(sorted(set(a) ^ set(b)))} on one side only",
                         fix="evaluate both on the same suite")
    return _bootstrapped({task: _paired(a[task], b[task], task) for task in a}, -1.0, level, resamples, seed)


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


def _bootstrapped(by_task: Mapping[str, np.ndarray], lowest: float, level: float, resamples: int,
                  seed: int) -> Interval:
    """Macro mean with percentile ends; tasks without spread widen them by what may not have been seen.

    by_task  task to [items], within lowest and 1
    """
    if not by_task:
        raise SuiteError("there is no task to average over", fix="name a suite with at least one task")
    rng = np.random.default_rng(seed)
    z2 = _z(level) ** 2
    moved, down, up = np.zeros(resamples), 0.0, 0.0
    for task in sorted(by_task):
        results = by_task[task]
        n, mean = len(results), results.mean()
        if np.ptp(results) == 0:
            unseen = z2 / (n + z2)
            down, up = down + (unseen * (mean - lowest)) ** 2, up + (unseen * (1 - mean)) ** 2
        else:
            # a resample of n spreads like (n - 1) / n of the truth
            moved += (_resampled(results, resamples, rng) - mean) * sqrt(n / (n - 1))
    value = float(np.mean([by_task[task].mean() for task in sorted(by_task)]))
    low, high = np.quantile(moved, [(1 - level) / 2, (1 + level) / 2])
    below = sqrt(min(low, 0.0) ** 2 + down) / len(by_task)
    above = sqrt(max(high, 0.0) ** 2 + up) / len(by_task)
    return Interval(value, max(lowest, value - below), min(1.0, value + above))


def _resampled(results: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of resamples [resamples]; counts of the distinct values are drawn, not items: the same, and fast."""
    values, counts = np.unique(results, return_counts=True)
    step = max(1, BATCH // len(values))
    return np.concatenate([rng.multinomial(len(results), counts / len(results), size=min(step, resamples - start))
                           @ values for start in range(0, resamples, step)]) / len(results)


def _checked(results: np.ndarray) -> np.ndarray:
    results = np.asarray(results, dtype=np.float64)
    assert results.ndim == 1, f"results are one number an item, not {results.shape}"
    if not len(results):
        raise SuiteError("a task without items has no score", fix="look at the split: it is empty")
    if not ((results >= 0) & (results <= 1)).all():
        raise SuiteError(f"results go from {results.min():g} to {results.max():g}; they are shares within 0 and 1",
                         fix="divide the metric by the most it can be")
    return results


def _paired(a: np.ndarray, b: np.ndarray, task: str) -> np.ndarray:
    a, b = _checked(a), _checked(b)
    if len(a) != len(b):
        raise SuiteError(f"two members were scored on {len(a)} and on {len(b)} items of {task}",
                         fix="evaluate both on the same split: only the same items can be compared one by one")
    return a - b


def _z(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))
