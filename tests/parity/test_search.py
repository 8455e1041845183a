"""What searches come to on simulated zoos, and their numeric parts against oracles worked out another way."""

from __future__ import annotations

from math import exp
from statistics import NormalDist
from zlib import crc32

import numpy as np
import pytest
from scipy import linalg

from glue.search import searching
from glue.search.evolution import Evolution
from glue.search.luck import luck
from glue.search.space import FALSE_GAINS, Space

FINE = [k / 20 for k in range(1, 20)]


class Zoo:
    """Results item by item of six members and of whatever is merged from them, over 5 tasks of 80 items.

    Three members are specialists, each of a task of its own; three do harm. An item is right if skill exceeds its
    difficulty; a member is better at some items than at others, and passes that on by its weight, so that merges
    that are like each other are right on the same items. A skill fades as (1 - w)^2 and interferes where weights
    sum to more than 1; each merge has a little noise of its own.

    equal  nobody is a specialist: every merge is truly as good as every member
    """

    def __init__(self, seed, *, equal=False, n=6, items=80):
        rng = np.random.default_rng(seed)
        self.seed, self.equal, self.names = seed, equal, [f"m{k}" for k in range(n)]
        self.tasks = np.repeat(np.arange(5), items)
        self.start, self.skills = -0.5 + rng.normal(0, 0.3, 5), rng.normal(-0.2, 0.15, (n, 5))
        for k in range(n):
            if k < n // 2:
                self.skills[k, k % 5] += rng.uniform(1.8, 3.0)
            else:
                self.skills[k] -= rng.uniform(0.1, 1.0)
        self.own, self.hard = rng.normal(0, 0.6, (n, len(self.tasks))), rng.normal(0, 1, len(self.tasks))

    def result(self, candidate):
        w = np.array([candidate.weights.get(name, 0.0) for name in self.names])
        noise = np.random.default_rng([self.seed, crc32(str(candidate).encode())]).normal(0, 0.15, len(self.tasks))
        if self.equal:
            return (w @ self.own / np.linalg.norm(w) + noise > self.hard).astype(float)
        skill = self.start + (1 - (1 - w) ** 2) @ self.skills - 0.1 * max(0.0, w.sum() - 1) ** 2
        return (skill[self.tasks] + w @ self.own + noise > self.hard).astype(float)

    def __call__(self, candidates, items=None):
        return [self.result(c) if items is None else self.result(c)[items[k]] for k, c in enumerate(candidates)]

    def search(self, strategy, *, rule="add", budget=1000, **params):
        space = Space(self.names, self, self.tasks, rule=rule, budget=budget, layers=6)
        return searching[strategy].bind(params)(space), space


def test_racing_reaches_the_choice_of_the_grid_for_a_fifth_of_its_items():
    """The same members and a score within two paired standard errors, in at least 9 of 10 zoos.

    Over 200 such zoos it is 86 of 100; a grid of 18 coefficients agrees with this one of 19 in 85 of 100.
    """
    reached, shares = 0, []
    for seed in range(10):
        zoo = Zoo(seed)
        grid, space = zoo.search("greedy", coefficients=FINE)
        raced, _ = zoo.search("racing")
        space.results([raced.candidate])
        shares.append(raced.items / grid.items)
        reached += raced.candidate.names == grid.candidate.names and \
            not space.gain(grid.candidate, raced.candidate).convinces(2)
    assert reached >= 9 and max(shares) < 0.2 and np.mean(shares) < 0.17


@pytest.mark.parametrize("strategy", ["greedy", "racing", "coefficients"])
def test_where_specialists_add_up_a_search_proves_a_merge(strategy):
    founds = [Zoo(seed).search(strategy)[0] for seed in range(10)]
    assert sum(found.candidate.merged for found in founds) >= 9


@pytest.mark.parametrize(("strategy", "rule", "zoos"), [
    ("greedy", "add", 60), ("greedy", "interpolate", 60), ("racing", "add", 60), ("uniform", "add", 60),
    ("coefficients", "interpolate", 40), ("evolve", "add", 20), ("joint", "add", 20)])
def test_where_all_are_equally_good_a_merge_is_found_at_most_once_in_twenty_searches(strategy, rule, zoos):
    """The criterion: no merge is truly better than the best member, so every merge that is found is a false gain."""
    merged = sum(Zoo(seed, equal=True, n=4).search(strategy, rule=rule, budget=200)[0].candidate.merged
                 for seed in range(zoos))
    assert merged <= FALSE_GAINS * zoos


def test_without_that_criterion_most_searches_find_a_merge_that_is_no_better():
    for strategy, params in ("greedy", {"min_gain": 0.0}), ("evolve", {"prove": False}):
        found = [Zoo(seed, equal=True, n=4).search(strategy, budget=100, **params)[0] for seed in range(20)]
        assert sum(one.candidate.merged for one in found) > 10


def test_luck_is_the_quantile_of_the_largest_of_independent_or_equal_leads():
    rng = np.random.default_rng(0)
    unlike = rng.normal(size=(20, 4000))
    assert luck(unlike, 0.05, 0) == pytest.approx(NormalDist().inv_cdf(0.95 ** (1 / 20)), abs=0.12)
    alike = np.repeat(unlike[:1], 20, axis=0) * np.arange(1, 21)[:, None]
    assert luck(alike, 0.05, 0) == pytest.approx(NormalDist().inv_cdf(0.95), abs=0.12)
    assert luck(np.zeros((3, 10)), 0.05, 0) == 0


# -- evolution --

def test_evolution_finds_the_lowest_point_of_a_narrow_valley_that_lies_askew():
    rng = np.random.default_rng(0)
    turned, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    goal, lengths = rng.uniform(0.3, 0.7, 6), np.logspace(0, 3, 6)
    evolution = Evolution(6, 9, 1 / 6, np.random.default_rng(1))
    for _ in range(250):
        points = evolution.ask()
        evolution.tell(points[np.argsort([(lengths * (turned @ (point - goal)) ** 2).sum() for point in points])])
    assert np.abs(evolution.mean - goal).max() < 1e-6


def test_the_first_generation_is_normal_around_the_middle_and_stays_in_the_cube():
    points = np.concatenate([Evolution(3, 8, 1 / 6, np.random.default_rng(seed)).ask() for seed in range(500)])
    assert points.min() >= 0 and points.max() <= 1
    assert points.mean(0) == pytest.approx(0.5, abs=0.01) and points.std(0) == pytest.approx(1 / 6, abs=0.006)


def test_a_distribution_that_lies_outside_is_moved_to_the_face_of_the_cube():
    evolution = Evolution(2, 4, 1e-3, np.random.default_rng(0))
    evolution.mean = np.array([2.0, 0.5])
    assert evolution.ask()[:, 0] == pytest.approx(1.0)


def test_evolution_moves_as_the_formulas_of_its_source_say():
    """The tutorial's update, step by step, with roots by scipy in place of eigenvectors."""
    n, popsize = 4, 10
    evolution = Evolution(n, popsize, 0.1, np.random.default_rng(3))
    m, C, sigma, ps, pc = np.full(n, 0.5), np.eye(n), 0.1, np.zeros(n), np.zeros(n)
    w = np.array([np.log(5.5) - np.log(i) for i in (1, 2, 3, 4, 5)])
    w /= w.sum()
    mu = w.sum() ** 2 / (w ** 2).sum()
    cs, cc, c1 = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n), 2 / ((n + 1.3) ** 2 + mu)
    cm = min(1 - c1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
    d = 1 + 2 * max(0, np.sqrt((mu - 1) / (n + 1)) - 1) + cs
    chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n ** 2))
    for g in range(1, 8):
        points = evolution.ask()
        ranked = points[np.argsort(points @ [3, 1, -2, 0.5])]
        evolution.tell(ranked)
        y = [(x - m) / sigma for x in ranked[:5]]
        yw = sum(wi * yi for wi, yi in zip(w, y, strict=True))
        ps = (1 - cs) * ps + np.sqrt(cs * (2 - cs) * mu) * linalg.solve(linalg.sqrtm(C), yw)
        h = float(linalg.norm(ps) / np.sqrt(1 - (1 - cs) ** (2 * g)) < (1.4 + 2 / (n + 1)) * chi)
        pc = (1 - cc) * pc + h * np.sqrt(cc * (2 - cc) * mu) * yw
        C = (1 - c1 - cm + c1 * (1 - h) * cc * (2 - cc)) * C + c1 * np.outer(pc, pc) + \
            cm * sum(wi * np.outer(yi, yi) for wi, yi in zip(w, y, strict=True))
        m, sigma = m + sigma * yw, sigma * exp(cs / d * (linalg.norm(ps) / chi - 1))
        assert evolution.mean == pytest.approx(m, abs=1e-9) and evolution.sigma == pytest.approx(sigma, rel=1e-9)
