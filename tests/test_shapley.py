"""Shapley values: their axioms, what blocks and truncation cost, and that nothing is asked twice, whatever happens."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue.errors import MethodError
from glue.refine.journal import Journal
from glue.refine.shapley import Walk, shapley

GROUND = "everything else"


class Asked:
    """A game that knows what it was asked."""

    def __init__(self, worth: Callable[[frozenset[int]], float]):
        self.worth, self.calls = worth, list[list[frozenset[int]]]()

    def __call__(self, subsets: Sequence[frozenset[int]]) -> list[float]:
        self.calls.append(list(subsets))
        return [self.worth(subset) for subset in subsets]

    @property
    def subsets(self) -> list[frozenset[int]]:
        return [subset for call in self.calls for subset in call]


def rugged(n: int, seed: int = 0) -> Callable[[frozenset[int]], float]:
    """Any value for any subset."""
    table = np.random.default_rng([seed, n]).normal(size=2 ** n)
    return lambda subset: float(table[sum(1 << i for i in subset)])


def saturating(n: int, seed: int = 0, bad: float = 0.0) -> Callable[[frozenset[int]], float]:
    """Players that bring less the more there are; with `bad`, that share of them harms."""
    rng = np.random.default_rng([seed, n])
    brings = rng.gamma(2.0, size=n) * np.where(rng.random(n) < bad, -0.5, 1)
    return lambda subset: 1 - math.exp(-3 * sum(brings[i] for i in subset) / n)


def by_orders(n: int, worth: Callable[[frozenset[int]], float]) -> np.ndarray:
    """The definition, order by order."""
    found = np.zeros(n)
    for order in permutations(range(n)):
        for k, i in enumerate(order):
            found[i] += worth(frozenset(order[:k + 1])) - worth(frozenset(order[:k]))
    return found / math.factorial(n)


# S1: efficiency

@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7), st.booleans(), st.floats(0, 0.3),
       st.none() | st.integers(2, 60), st.integers(0, 99))
def test_values_sum_to_what_all_are_worth_more_than_nobody(n, chains, block, antithetic, tolerance, most, seed):
    worth = saturating(n, seed, bad=0.3)
    found = shapley(n, Asked(worth), chains=chains, block=block, antithetic=antithetic, tolerance=tolerance, most=most,
                    exact=False, seed=seed)
    assert found.mean.sum() == pytest.approx(worth(frozenset(range(n))) - worth(frozenset()), abs=1e-12)
    assert most is None or found.fits <= most


# S2: exact enumeration, symmetry, null player, linearity

@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_enumeration_is_the_mean_over_all_orders(n):
    game = Asked(rugged(n))
    found = shapley(n, game)
    assert np.allclose(found.mean, by_orders(n, rugged(n)), atol=1e-12) and found.exact and not found.error.any()
    assert found.fits == len(game.subsets) == len(set(game.subsets)) == 2 ** n and len(game.calls) == 1


def test_sampled_orders_come_to_the_enumeration_within_their_errors():
    exact = shapley(8, Asked(rugged(8))).mean
    found = shapley(8, Asked(rugged(8)), chains=4000, exact=False)
    assert (np.abs(found.mean - exact) < 3 * found.error).all() and 0 < found.error.max() < 0.05
    assert (found.low < exact).sum() >= 6 and (exact < found.high).sum() >= 6


def test_95_of_100_intervals_hold_the_value():
    n, worth = 6, rugged(6)
    exact, held = shapley(n, Asked(worth)).mean, []
    for seed in range(60):
        found = shapley(n, Asked(worth), chains=8, exact=False, seed=seed, antithetic=False)
        held += ((found.low <= exact) & (exact <= found.high)).tolist()
    assert 0.9 < np.mean(held) < 0.99


@pytest.mark.parametrize("more", [{}, {"exact": False, "chains": 3}])
def test_who_adds_nothing_gets_nothing_and_who_adds_the_same_gets_the_same(more):
    def worth(subset: frozenset[int]) -> float:  # 0 and 1 do the same, 2 does nothing
        return math.sqrt(len(subset & {0, 1})) + len(subset & {3, 4}) ** 2

    found = shapley(5, Asked(worth), **more).mean
    assert found[2] == 0
    if not more:
        assert found[0] == pytest.approx(found[1], abs=1e-15) and found[3] == pytest.approx(found[4], abs=1e-15)


@pytest.mark.parametrize("more", [{}, {"exact": False, "chains": 3}, {"exact": False, "chains": 4, "block": 3}])
def test_values_of_a_sum_of_games_are_the_sums_of_their_values(more):
    one, other = rugged(7, 1), rugged(7, 2)
    found = shapley(7, Asked(lambda subset: 2 * one(subset) - 3 * other(subset)), **more).mean
    apart = 2 * shapley(7, Asked(one), **more).mean - 3 * shapley(7, Asked(other), **more).mean
    assert np.allclose(found, apart, atol=1e-12)


def test_players_under_other_numbers_are_worth_the_same():
    moved = [3, 1, 5, 0, 2, 4]
    worth = rugged(6)
    found = shapley(6, Asked(lambda subset: worth(frozenset(moved[i] for i in subset)))).mean
    assert np.allclose(found, shapley(6, Asked(worth)).mean[moved], atol=1e-15)


def test_a_sum_of_what_each_brings_is_told_by_one_order():
    brings = np.random.default_rng(0).normal(size=30)
    found = shapley(30, Asked(lambda subset: sum(brings[i] for i in subset)), chains=1)
    assert np.allclose(found.mean, brings, atol=1e-12) and found.fits == 31 and not found.exact
    assert np.isinf(found.error).all() and np.isinf(found.high).all()


# S3: blocks

def test_blocks_that_are_drawn_anew_come_to_what_they_are_expected_to():
    """For what sums up, a player in a block of b gets its own share and the mean of the others for the rest."""
    n, b = 12, 4
    brings = np.random.default_rng(0).normal(size=n)
    found = shapley(n, Asked(lambda subset: sum(brings[i] for i in subset)), chains=6000, block=b, exact=False,
                    antithetic=False)
    others = (brings.sum() - brings) / (n - 1)
    assert (np.abs(found.mean - (brings + (b - 1) * others) / b) < 4 * found.error).all()


def test_a_block_is_worth_the_same_to_each_of_its_players_and_the_last_may_be_smaller():
    found = shapley(5, Asked(rugged(5)), chains=1, block=2, exact=False, antithetic=False)
    assert found.fits == 4 and sorted(np.unique(found.mean, return_counts=True)[1]) == [1, 2, 2]
    assert Walk(np.arange(5), 2).gone == [0, 2, 4, 5]


# S4: truncation and early ends

@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.2])
def test_truncation_moves_no_contribution_by_more_than_its_tolerance_and_saves_fits(tolerance):
    whole = shapley(40, Asked(saturating(40)), chains=6)
    cut = shapley(40, Asked(saturating(40)), chains=6, tolerance=tolerance)
    assert np.abs(cut.mean - whole.mean).max() <= tolerance and cut.fits < whole.fits
    assert shapley(40, Asked(lambda subset: 1.0), chains=6, tolerance=tolerance).fits == 2 + 6  # a middle an order


def test_what_one_gains_and_the_next_loses_is_not_taken_for_nothing():
    """Both ends of an order are alike here; its middle tells them apart."""
    worth = Asked(lambda subset: float(len(subset & {0, 1, 2, 3}) - len(subset & {4, 5, 6, 7})))
    found = shapley(8, worth, chains=200, tolerance=0.5, exact=False)
    assert (found.mean[:4] > 0.5).all() and (found.mean[4:] < -0.5).all()


def test_antithetic_orders_halve_what_position_does_to_a_value():
    """For a square of a sum, a pair of opposite orders is exact and two independent orders are not."""
    brings = np.random.default_rng(0).normal(size=20)

    def worth(subset: frozenset[int]) -> float:
        return float(sum(brings[i] for i in subset)) ** 2

    exact = brings * brings.sum()
    assert np.allclose(shapley(20, Asked(worth), chains=2).mean, exact, atol=1e-12)
    assert np.abs(shapley(20, Asked(worth), chains=2, antithetic=False).mean - exact).max() > 0.1


def test_it_ends_once_it_is_precise_enough_and_not_before_two_independent_looks():
    calls = {precision: shapley(30, Asked(saturating(30)), chains=200, precision=precision)
             for precision in (1.0, 0.4, 0.2)}
    assert calls[1.0].fits < calls[0.4].fits < calls[0.2].fits < 2 + 200 * 29
    for precision, found in calls.items():
        assert np.sqrt(np.mean(found.error ** 2)) <= precision * found.mean.std() and np.isfinite(found.error).all()
    more = shapley(30, Asked(saturating(30)), chains=1000)
    assert np.corrcoef(calls[0.2].mean, more.mean)[0, 1] > 0.95


def test_a_budget_holds_and_an_order_that_it_cuts_off_counts_only_if_it_is_the_first():
    for most in (2, 7, 19, 60, 61, 100):
        game = Asked(saturating(20))
        found = shapley(20, game, chains=10, most=most)
        assert found.fits == len(game.subsets) <= most
    whole = shapley(20, Asked(saturating(20)), chains=2)
    assert np.array_equal(shapley(20, Asked(saturating(20)), chains=10, most=whole.fits + 5).mean, whole.mean)
    assert len(set(shapley(20, Asked(saturating(20)), chains=10, most=2).mean)) == 1


@pytest.mark.parametrize("given, why", [
    ({"n": 20, "exact": True}, "1048576 values"), ({"n": 3, "most": 1}, "budget of 1"),
    ({"n": 4, "exact": True, "most": 15}, "the budget is 15")])
def test_what_cannot_be_asked_is_refused(given, why):
    with pytest.raises(MethodError, match=why):
        shapley(given.pop("n"), Asked(rugged(4)), **given)


def test_a_value_that_is_no_number_is_told():
    with pytest.raises(MethodError, match="a subset of 2 players has the value nan"):
        shapley(2, Asked(lambda subset: math.nan if len(subset) == 2 else 0.0))


# memory

def test_nothing_is_asked_twice_and_what_can_be_asked_together_is():
    game = Asked(saturating(20))
    shapley(20, game, chains=8)
    assert len(game.subsets) == len(set(game.subsets)) and len(game.calls) == 1 + math.ceil(math.log2(20))


def test_a_seed_decides_and_another_one_decides_otherwise():
    one, again, other = (shapley(20, Asked(saturating(20)), chains=4, seed=seed).mean for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


# S6: journals

def test_a_journal_answers_for_its_context_alone_and_leaves_a_torn_line_out(tmp_path):
    file = tmp_path / "values.journal"
    one = Journal(file, GROUND)
    one.add(frozenset({3, 1}), 0.1 + 0.2)
    one.add(frozenset({1, 3}), 9.0)
    with open(file, "a") as stream:
        stream.write('{"key": "tor')
    again = Journal(file, GROUND)
    assert again.get([1, 3]) == 0.1 + 0.2 and again.get([1]) is None and Journal(file, "other").get([1, 3]) is None
    again.add(frozenset({1}), 2.0)
    assert Journal(file, GROUND).get({1}) == 2.0 and len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("when", [0, 1, 5, 30, 70])
def test_a_game_that_was_cut_off_asks_only_the_rest_and_comes_to_the_same_table(tmp_path, when):
    whole = shapley(20, Asked(saturating(20)), chains=8, tolerance=0.01, precision=0.2, most=120)
    done: list[frozenset[int]] = []

    def cut(subsets: Sequence[frozenset[int]]):
        for subset in subsets:
            if len(done) == when:
                raise KeyboardInterrupt
            done.append(subset)
            yield saturating(20)(subset)

    file, given = tmp_path / "j", {"chains": 8, "tolerance": 0.01, "precision": 0.2, "most": 120}
    with pytest.raises(KeyboardInterrupt):
        shapley(20, cut, journal=Journal(file, GROUND), **given)
    rest = Asked(saturating(20))
    found = shapley(20, rest, journal=Journal(file, GROUND), **given)
    assert not set(rest.subsets) & set(done) and len(rest.subsets) + len(done) == found.fits == whole.fits
    assert all(np.array_equal(getattr(found, name), getattr(whole, name)) for name in ("mean", "error", "low", "high"))


KILLED = """import sys, time; from pathlib import Path
from glue.refine.journal import Journal; from glue.refine.shapley import shapley
sys.path.insert(0, sys.argv[2])
from test_shapley import saturating
worth, log = saturating(20), open(sys.argv[1] + '.asked', 'a', buffering=1)
def value(subsets):
    for subset in subsets:
        log.write(f'{sorted(subset)}\\n')
        time.sleep(0.01)
        yield worth(subset)
found = shapley(20, value, chains=6, journal=Journal(Path(sys.argv[1]), 'k'))
print(found.fits, found.mean.tobytes().hex())"""


def test_after_kill_9_the_table_is_the_same_and_at_most_what_was_in_flight_is_asked_again(tmp_path):
    def started(file: str) -> subprocess.Popen:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / file), str(Path(__file__).parent)],
                                stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})

    first = started("cut")
    journal = tmp_path / "cut"
    until = time.monotonic() + 60
    while not journal.exists() or journal.read_text().count("\n") < 25:
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {json.loads(line)["key"] for line in journal.read_text().splitlines()}
    again, whole = started("cut"), started("whole")
    assert again.communicate()[0] == whole.communicate()[0] != ""
    asked = (tmp_path / "cut.asked").read_text().splitlines()
    assert len(asked) - len(set(asked)) <= 1 and 25 <= len(before) < len(set(asked))
    assert set(asked) == set((tmp_path / "whole.asked").read_text().splitlines())


def worth_here(subset: frozenset[int]) -> float:
    """What a worker process can find by its name."""
    return saturating(20)(subset)


def test_two_workers_give_the_table_of_one(tmp_path):
    from glue.workers import Workers

    tables = []
    for number in (0, 2):
        journal = Journal(tmp_path / f"j{number}", GROUND)
        with Workers(number) as workers:
            def value(subsets, workers=workers, journal=journal):
                return workers.map("tests.test_shapley:worth_here", [(subset,) for subset in subsets],
                                   each=lambda k, found: journal.add(subsets[k], found))

            tables.append(shapley(20, value, chains=4, journal=journal))
    assert np.array_equal(tables[0].mean, tables[1].mean) and tables[0].fits == tables[1].fits
    lines = [sorted((tmp_path / f"j{number}").read_text().splitlines()) for number in (0, 2)]
    assert lines[0] == lines[1] and len(lines[0]) == tables[0].fits
