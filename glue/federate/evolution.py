"""CMA-ES as a value: a normal distribution over points, and what it becomes when points drawn from it were judged.

As in Hansen's tutorial (arXiv:1604.00772), with weights below zero for the worse half, and the constants that it gives
for so many points. The package `cmaes` makes the same of the same points. It is not used here, because what it has
learnt can neither be sent nor taken up again, and because a round has as many points as clients have answered.

Departs from it: points are drawn with the symmetric root of the covariance, which, unlike its eigenvectors, does not
jump where rounding differs.

Letters: d dimensions, k points, z draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TINY = 1e-8  # what keeps a division from being one by nothing


@dataclass(frozen=True)
class Belief:
    """Where good points are thought to be: a normal distribution, and where it has been going.

    mean        [d] fp64        sigma  its overall width        covariance  [d, d], its shape
    drift       [d], the path of the mean, by which sigma is set
    way         [d], the path along which the shape is stretched
    generation  how often it was taught
    """

    mean: np.ndarray
    sigma: float
    covariance: np.ndarray
    drift: np.ndarray
    way: np.ndarray
    generation: int = 0

    @staticmethod
    def around(mean: np.ndarray, sigma: float) -> Belief:
        """In the beginning: a ball."""
        d = len(mean)
        return Belief(mean.astype(np.float64), float(sigma), np.eye(d), np.zeros(d), np.zeros(d))

    def steps(self, z: np.ndarray) -> np.ndarray:
        """From the mean to points, in units of sigma: standard normal draws [k, d] as the covariance stretches them."""
        return z.astype(np.float64) @ powered(self.covariance, 0.5)

    def points(self, steps: np.ndarray) -> np.ndarray:
        """Where steps [..., d] lead, fp64."""
        return self.mean + self.sigma * steps.astype(np.float64)

    def lengths(self, steps: np.ndarray) -> np.ndarray:
        """Of steps [..., d], in widths of the distribution along their way. [...]"""
        return np.linalg.norm(steps @ powered(self.covariance, -0.5), axis=-1)


@dataclass(frozen=True)
class Pace:
    """How much k judged points teach in d dimensions.

    weights  [k], best point first; those above zero sum to 1        chosen  how many points these are, in effect
    """

    weights: np.ndarray
    chosen: float
    one: float  # share of the covariance that the path renews in a generation
    many: float  # and that the points renew
    path: float  # share of the path that is renewed
    drift: float  # share of the other path that is renewed
    damping: float  # of the change of sigma

    @staticmethod
    def of(k: int, d: int) -> Pace:
        """The tutorial's defaults. k is 2 at least."""
        raw = math.log((k + 1) / 2) - np.log(np.arange(1, k + 1))
        better, worse = raw[:k // 2], raw[k // 2:]
        chosen, against = better.sum()**2 / (better**2).sum(), worse.sum()**2 / (worse**2).sum()
        one = 2 / ((d + 1.3)**2 + chosen)
        many = min(1 - one - TINY, 2 * (chosen - 2 + 1 / chosen) / ((d + 2)**2 + chosen))
        # at most so much against the worse half that the covariance stays positive
        below = min(1 + one / many if many else math.inf, 1 + 2 * against / (chosen + 2),
                    (1 - one - many) / (d * many) if many else math.inf)
        drift = (chosen + 2) / (d + chosen + 5)
        weights = np.where(raw >= 0, raw / raw[raw > 0].sum(), below * raw / -raw[raw < 0].sum())
        return Pace(weights, chosen, one, many, (4 + chosen / d) / (d + 4 + 2 * chosen / d), drift,
                    1 + 2 * max(0.0, math.sqrt((chosen - 1) / (d + 1)) - 1) + drift)


def taught(belief: Belief, points: np.ndarray, losses: np.ndarray, spread: float | None = None) -> Belief:
    """The belief after points [k, d] with these losses [k], the lower the better; of equals the first is better.

    spread  how wide the points lie, where that is not the belief's sigma
    """
    k, d = points.shape
    pace, spread = Pace.of(k, d), belief.sigma if spread is None else spread
    y = (points[np.argsort(losses, kind="stable")] - belief.mean) / spread
    back = powered(belief.covariance, -0.5)
    step = pace.weights[:k // 2] @ y[:k // 2]
    drift = ((1 - pace.drift) * belief.drift
             + math.sqrt(pace.drift * (2 - pace.drift) * pace.chosen) * back @ step)
    length, usual = float(np.linalg.norm(drift)), math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
    grown = math.exp(pace.drift / pace.damping * (length / usual - 1))
    generation = belief.generation + 1
    # a path that is too long is of a sigma that is too small, and says nothing of the shape
    steady = length / math.sqrt(1 - (1 - pace.drift)**(2 * (generation + 1))) < (1.4 + 2 / (d + 1)) * usual
    way = (1 - pace.path) * belief.way
    if steady:
        way = way + math.sqrt(pace.path * (2 - pace.path) * pace.chosen) * step
    shares = np.where(pace.weights >= 0, pace.weights,
                      pace.weights * d / (np.linalg.norm(y @ back, axis=1)**2 + TINY))
    kept = 1 - pace.one - pace.many * pace.weights.sum() + pace.one * (not steady) * pace.path * (2 - pace.path)
    covariance = kept * belief.covariance + pace.one * np.outer(way, way) + pace.many * (y.T * shares) @ y
    return Belief(belief.mean + spread * step, belief.sigma * grown, (covariance + covariance.T) / 2, drift, way,
                  generation)


def powered(covariance: np.ndarray, exponent: float) -> np.ndarray:
    """A symmetric power of a covariance [d, d]; what rounding has made negative counts as next to nothing."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.where(values < 0, TINY**2, values)**exponent) @ vectors.T
