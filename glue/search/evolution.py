"""CMA-ES, the (mu/mu_w, lambda) evolution strategy with covariance adaptation, on the unit cube: arXiv:1604.00772.

Letters are those of the source: N genes, m mean, C covariance, ps and pc the evolution paths. Only the better half of
a generation has a say in C. Points outside of the cube are drawn anew, and moved to its face where that does not help.
"""

from __future__ import annotations

from math import exp, sqrt

import numpy as np

REDRAWS = 10  # for each gene


class Evolution:
    """A normal distribution of points that moves to where points are good; it starts in the middle of the cube.

    genes    N
    popsize  points in a generation
    sigma    first standard deviation of every gene
    rng      all that is random
    """

    def __init__(self, genes: int, popsize: int, sigma: float, rng: np.random.Generator):
        self.popsize, self.sigma, self._rng = popsize, sigma, rng
        n = genes
        better = np.log((popsize + 1) / 2) - np.log(np.arange(1, popsize // 2 + 1))
        self._w = better / better.sum()
        mass = self._mass = 1 / float((self._w ** 2).sum())
        self._cs, self._cc = (mass + 2) / (n + mass + 5), (4 + mass / n) / (n + 4 + 2 * mass / n)
        self._c1 = 2 / ((n + 1.3) ** 2 + mass)
        self._cmu = min(1 - self._c1, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
        self._damping = 1 + 2 * max(0.0, sqrt((mass - 1) / (n + 1)) - 1) + self._cs
        self._length = sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # expected, of a standard normal vector
        self.mean, self._covariance = np.full(n, 0.5), np.eye(n)
        self._ps, self._pc, self._told = np.zeros(n), np.zeros(n), 0

    def ask(self) -> np.ndarray:
        """A generation of points [popsize, genes] within 0 and 1."""
        root, _ = self._roots()
        return np.stack([self._point(root) for _ in range(self.popsize)])

    def tell(self, ranked: np.ndarray) -> None:
        """Move to where the points of a generation were good; they come best first [popsize, genes]."""
        n, mass = len(self.mean), self._mass
        _, inverse = self._roots()
        steps = (ranked[:len(self._w)] - self.mean) / self.sigma
        step = self._w @ steps
        self._told += 1
        self._ps = (1 - self._cs) * self._ps + sqrt(self._cs * (2 - self._cs) * mass) * (inverse @ step)
        length = float(np.linalg.norm(self._ps))
        # a path that has grown too fast is no news about C
        calm = length / sqrt(1 - (1 - self._cs) ** (2 * self._told)) < (1.4 + 2 / (n + 1)) * self._length
        self._pc = (1 - self._cc) * self._pc + calm * sqrt(self._cc * (2 - self._cc) * mass) * step
        stays = 1 - self._c1 - self._cmu + (not calm) * self._c1 * self._cc * (2 - self._cc)
        self._covariance = stays * self._covariance + self._c1 * np.outer(self._pc, self._pc) \
            + self._cmu * (steps.T * self._w) @ steps
        self.mean = self.mean + self.sigma * step
        self.sigma *= exp(min(1.0, self._cs / self._damping * (length / self._length - 1)))

    def _point(self, root: np.ndarray) -> np.ndarray:
        for _ in range(REDRAWS * len(self.mean)):
            point = self.mean + self.sigma * (root @ self._rng.standard_normal(len(self.mean)))
            if ((point >= 0) & (point <= 1)).all():
                return point
        return point.clip(0, 1)

    def _roots(self) -> tuple[np.ndarray, np.ndarray]:
        """The symmetric root of C and its inverse: unlike eigenvectors they have no sign to choose."""
        values, vectors = np.linalg.eigh(self._covariance)
        lengths = np.sqrt(np.maximum(values, 1e-20))
        return (vectors * lengths) @ vectors.T, (vectors / lengths) @ vectors.T
