"""What searches come to on simulated zoos, and their numeric parts against oracles worked out another way."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from zlib import crc32

import numpy as np
import pytest
from scipy import optimize, stats

from glue.search import searching
from glue.search.candidate import Candidate
from glue.search.luck import luck
from glue.search.space import FALSE_GAINS, Space

RECORDED = Path(__file__).parents[1] / "fixtures"  # by `python -m benchmarks.zoos --record`, of zoos that are trained
FINE = [k / 20 for k in range(1, 20)]


class Zoo:
    """Results item by item of six members and of whatever is merged from them, over 5 tasks of 80 items.

    Three members are specialists, each of a task of its own; three do harm. An item is right if skill exceeds its
    difficulty; a member is better at some items than at others, and passes that on by its weight, so that merges
    that are like each other are right on the same items. A skill fades as (1 - w)^2 and interferes where weights
    sum to more than 1; each merge has a little noise of its own, about as much as in trained zoos: merges whose
    coefficients are .05 apart differ on 1.6 % of their items, .2 apart on 4 % (there on 1.1 to 1.6 % and 4 to 6 %).

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
        noise = np.random.default_rng([self.seed, crc32(str(candidate).encode())]).normal(0, 0.05, len(self.tasks))
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
    """The same members and a score within two paired standard errors, in at least 9 of 10 zoos, at a margin of one.

    Over 100 such zoos it is 94; over those of benchmarks/zoos, which are trained, see benchmarks/boards/racing.md.
    """
    reached, shares = 0, []
    for seed in range(10):
        zoo = Zoo(seed)
        grid, space = zoo.search("greedy", coefficients=FINE, min_gain=1.0)
        raced, _ = zoo.search("racing", min_gain=1.0)
        space.results([raced.candidate])
        shares.append(raced.items / grid.items)
        reached += raced.candidate.names == grid.candidate.names and \
            not space.gain(grid.candidate, raced.candidate).convinces(2)
    assert reached >= 9 and max(shares) < 0.2 and np.mean(shares) < 0.17


class Recorded:
    """What the grid and racing asked of a trained zoo: eight members, 6 tasks of 200 items.

    A search that asks for something else fails on a result of -1, or on a candidate that is not there: record again.
    """

    def __init__(self, file):
        self.file = np.load(file)
        self.told = json.loads(str(self.file["told"]))
        self.results = dict(zip(map(Candidate.unspelled, self.told["candidates"]), self.file["results"], strict=True))

    def __call__(self, candidates, items=None):
        return [self.results[c] if items is None else self.results[c][items[k]] for k, c in enumerate(candidates)]

    def search(self, strategy, **params):
        space = Space(self.told["names"], self, self.file["tasks"], rule="add", budget=1000,
                      neutral={self.told["base"]}, seed=self.told["seed"], layers=4)
        return searching[strategy].bind(params)(space), space


@pytest.mark.parametrize("zoo", [0, 1])
def test_racing_reaches_the_choice_of_the_grid_in_zoos_that_were_trained(zoo):
    recorded = Recorded(RECORDED / f"zoo-{zoo}.npz")
    grid, _ = recorded.search("greedy", coefficients=FINE, min_gain=1.0)
    raced, space = recorded.search("racing", min_gain=1.0)
    space.results([grid.candidate])
    assert raced.candidate.names == grid.candidate.names and raced.items / grid.items < 0.18
    assert not space.gain(grid.candidate, raced.candidate).convinces(2)
    short = {name.removeprefix("tiny_zoo/A-") for name in raced.candidate.names}
    assert {"trans", "facts", "kind"} <= short and not {"noise", "chat", "lora"} & short


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

def evolved(loss, *, genes=6, seed=0, budget=2000, **params):
    """Where `evolve` ends on a loss of weights [genes], and everything that it tried [k, genes], in order."""
    names, tried = [f"m{k:02}" for k in range(genes)], []

    def evaluate(batch):
        for candidate in batch:
            if candidate.merged:
                tried.append([candidate.weights.get(name, 0.0) for name in names])
            yield np.full(2, np.exp(-loss(np.array(tried[-1]))) if candidate.merged else 0.0)

    space = Space(names, evaluate, [0, 0], rule="add", budget=budget, seed=seed)
    found = searching["evolve"].bind(params)(space).candidate
    return np.array([found.weights.get(name, 0.0) for name in names]), np.array(tried)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**33])
def test_evolution_finds_the_lowest_point_of_a_narrow_valley_that_lies_askew(seed):
    """A valley a hundred times steeper across than along; along it a gene is as exact as it is written down."""
    rng = np.random.default_rng(7)
    turned, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    goal, lengths = rng.uniform(0.3, 0.7, 6), np.logspace(0, 2, 6)
    weights, tried = evolved(lambda at: 0.1 * lengths @ (turned @ (at - goal)) ** 2, seed=seed)
    assert np.abs(weights - goal).max() < 0.003 and len(tried) < 1200


def test_evolution_ends_where_the_gradients_of_scipy_end():
    """Also where that is on a face of the cube: the third gene had better be below 0."""
    centre = np.array([0.2, 0.6, -0.3, 0.8])

    def loss(at):
        far = at - centre
        return float(np.log(np.exp(3 * far).sum() + np.exp(-3 * far).sum()) + (far[0] + far[1] * far[2]) ** 2)

    wanted = optimize.minimize(loss, np.full(4, 0.5), method="L-BFGS-B", bounds=[(0, 1)] * 4).x
    weights, _ = evolved(loss, genes=4)
    assert wanted[2] == 0 and weights[2] == 0 and weights == pytest.approx(wanted, abs=0.004)


def test_the_first_generation_is_normal_around_the_middle_and_cut_off_at_the_ends():
    """What lies outside of the cube is drawn again: one tail in every 185 standard deviations of 1/4."""
    first = np.concatenate([evolved(lambda at: 0.0, genes=3, seed=seed, budget=10, sigma=1 / 4)[1].ravel()
                            for seed in range(300)])
    assert len(first) == 300 * 3 * 7 and first.min() >= 0 and first.max() <= 1
    assert stats.kstest(first, stats.truncnorm(-2, 2, 0.5, 1 / 4).cdf).pvalue > 0.05
