"""Intervals that cover, comparisons that pair, and no claim without an error."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue.errors import SuiteError
from glue.evaluate.statistics import average, difference, mcnemar, proportion, wilson

results = st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), min_size=1, max_size=30).map(np.array)
tasks = st.dictionaries(st.sampled_from("abc"), results, min_size=1)


def test_wilson_is_what_scipy_gives():
    from scipy.stats import binomtest

    for successes, n, level in [(0, 10, 0.95), (10, 10, 0.95), (7, 20, 0.95), (199, 200, 0.99), (1, 1, 0.9)]:
        theirs = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
        assert wilson(successes, n, level) == pytest.approx((successes / n, theirs.low, theirs.high), abs=1e-12)


def test_wilson_agrees_with_the_published_interval():
    found = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_shares_get_the_t_interval_of_scipy():
    from scipy.stats import ttest_1samp

    shares = np.random.default_rng(0).random(40)
    theirs = ttest_1samp(shares, 0).confidence_interval(0.95)
    assert proportion(shares) == pytest.approx((shares.mean(), theirs.low, theirs.high), abs=1e-12)


def test_the_bootstrap_of_one_task_is_that_of_scipy_widened_for_the_small_sample():
    from scipy.stats import bootstrap

    shares = np.random.default_rng(1).random(12) ** 2
    theirs = bootstrap((shares,), np.mean, n_resamples=100_000, method="percentile", vectorized=True,
                       rng=np.random.default_rng(2)).confidence_interval
    ours, mean, wider = average({"a": shares}, resamples=100_000), shares.mean(), np.sqrt(12 / 11)
    assert (ours.value - ours.low) / wider == pytest.approx(mean - theirs.low, rel=0.02)
    assert (ours.high - ours.value) / wider == pytest.approx(theirs.high - mean, rel=0.02)


def test_the_average_weighs_tasks_and_not_items_and_their_order_does_not_count():
    a, b = np.ones(10), np.array([0.0, 1, 0, 0] * 25)
    found = average({"a": a, "b": b})
    assert found.value == pytest.approx((1 + 0.25) / 2)
    rng = np.random.default_rng(0)
    c, d = rng.random(20), rng.random(30)
    assert average({"c": c, "d": d}) == average({"d": d, "c": c})


def test_the_same_seed_gives_the_same_interval():
    by_task = {"a": np.random.default_rng(0).random(50)}
    assert average(by_task, seed=3) == average(by_task, seed=3) != average(by_task, seed=4)


def drawn(rng, chances, n):
    return {str(k): (rng.random(n) < chance).astype(float) for k, chance in enumerate(chances)}


def test_the_average_covers_the_truth_as_often_as_it_says():
    rng, chances = np.random.default_rng(0), [0.25, 0.5, 0.7, 0.9]
    intervals = [average(drawn(rng, chances, 100), resamples=1000, seed=k) for k in range(1000)]
    covered = np.mean([found.low <= np.mean(chances) <= found.high for found in intervals])
    assert 0.93 <= covered <= 0.97


def test_the_proportion_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    counted = [proportion(rng.random(60) < 0.7) for _ in range(2000)]
    shared = [proportion(rng.beta(2, 3, 60)) for _ in range(2000)]
    assert 0.93 <= np.mean([found.low <= 0.7 <= found.high for found in counted]) <= 0.97
    assert 0.93 <= np.mean([found.low <= 0.4 <= found.high for found in shared]) <= 0.97


def siblings(rng, n, tasks, ahead):
    """Two members that agree on most items; the first is right this share of items more often."""
    a, b = {}, {}
    for k in range(tasks):
        both, chance = rng.integers(0, 2, n).astype(float), rng.random(n)
        won, lost = chance < 0.1 + ahead / 2, chance > 0.9 + ahead / 2
        a[str(k)], b[str(k)] = np.where(won, 1, np.where(lost, 0, both)), np.where(won, 0, np.where(lost, 1, both))
    return a, b


def test_the_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [difference(*siblings(rng, 100, 3, 0.05), resamples=1000, seed=k) for k in range(1000)]
    assert 0.93 <= np.mean([found.low <= 0.05 <= found.high for found in intervals]) <= 0.97


def test_pairing_is_narrower_than_two_intervals_of_members_that_agree():
    a, b = siblings(np.random.default_rng(0), 200, 3, 0.05)
    paired, one, other = difference(a, b), average(a), average(b)
    unpaired = np.hypot(one.high - one.low, other.high - other.low)
    assert paired.high - paired.low < 0.7 * unpaired
    assert paired.value == pytest.approx(one.value - other.value, abs=1e-12)


def test_a_comparison_turned_around_is_the_comparison_turned_around():
    a, b = siblings(np.random.default_rng(0), 200, 3, 0.05)
    there, back = difference(a, b), difference(b, a)
    assert (-back.value, -back.high, -back.low) == pytest.approx(there, abs=0.005)


@given(tasks)
def test_no_average_and_no_difference_from_oneself_is_certain(by_task):
    ours, none = average(by_task, resamples=200), difference(by_task, by_task, resamples=200)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1 and ours.low < ours.high
    assert -1 <= none.low < none.value == 0 < none.high <= 1


@given(results)
def test_no_proportion_is_certain(one):
    found = proportion(one)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


def test_a_task_that_is_all_right_is_bounded_as_wilson_does():
    assert average({"a": np.ones(20)}) == pytest.approx(wilson(20, 20), abs=1e-12)
    assert average({"a": np.zeros(20)}) == pytest.approx(wilson(0, 20), abs=1e-12)
    two = average({"a": np.ones(20), "b": np.ones(20)})
    assert two.high == 1 and 1 - two.low == pytest.approx((1 - wilson(20, 20).low) / np.sqrt(2), abs=1e-12)


def test_members_that_never_differ_could_still_differ_on_as_many_items_as_wilson_allows():
    found, unseen = difference({"a": np.ones(50)}, {"a": np.ones(50)}), wilson(0, 50).high
    assert found == pytest.approx((0, -unseen, unseen), abs=1e-12)


def test_mcnemar_counts_the_items_on_which_two_members_differ():
    a, b = np.array([1] * 9 + [0] * 2 + [1] * 30), np.array([0] * 9 + [1] * 2 + [1] * 30)
    exact = 2 * sum(Fraction(comb(11, k), 2 ** 11) for k in range(3))
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(float(exact), abs=1e-15)
    assert mcnemar(a, a) == 1 and mcnemar([1, 0], [0, 1]) == 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(SuiteError, match="tasks of two members differ: b on one side"):
        difference({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(SuiteError, match="on 2 and on 3 items of a"):
        difference({"a": np.ones(2)}, {"a": np.ones(3)})
    with pytest.raises(SuiteError, match="these results are shares"):
        mcnemar(np.array([0.5, 1]), np.array([1, 1]))
    with pytest.raises(SuiteError, match="results go from 0 to 37"):
        proportion(np.array([0, 37.0]))
    with pytest.raises(SuiteError, match="without items"):
        average({"a": np.array([])})
    with pytest.raises(SuiteError, match="no task to average"):
        average({})
