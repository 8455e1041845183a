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


def test_many_results_in_the_middle_have_the_interval_of_scipys_bootstrap():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    shares, counted = rng.random(400), (rng.random(500) < 0.6).astype(float)
    for results in (shares, counted):
        theirs = bootstrap((results,), np.mean, n_resamples=50_000, method="BCa", rng=rng).confidence_interval
        assert average({"a": results}) == pytest.approx((results.mean(), theirs.low, theirs.high), abs=0.002)


def test_one_task_of_right_and_wrong_has_wilsons_interval():
    for successes, n in [(0, 10), (10, 10), (7, 20), (199, 200), (1, 1), (81, 263)]:
        results = np.arange(n) < successes
        assert average({"a": results}) == pytest.approx(wilson(successes, n), abs=1e-9)


def test_one_task_of_pairs_has_tangos_interval():
    def score(d, ahead, behind, n):
        """Tango 1998: how many standard errors what was found is from d."""
        b = -ahead - behind + (2 * n - ahead + behind) * d
        q = (np.sqrt(b * b + 8 * n * behind * d * (1 - d)) - b) / (4 * n)
        return (ahead - behind - n * d) / np.sqrt(n * (2 * q + d * (1 - d)))

    for ahead, behind, n in [(12, 2, 50), (3, 9, 40), (1, 0, 200), (60, 45, 1000)]:
        a, b = np.arange(n) < ahead, (np.arange(n) >= ahead) & (np.arange(n) < ahead + behind)
        found = difference({"a": a}, {"a": b})
        assert score(found.low, ahead, behind, n) == pytest.approx(1.959964, abs=1e-5)
        assert score(found.high, ahead, behind, n) == pytest.approx(-1.959964, abs=1e-5)


def test_an_end_of_the_average_is_as_far_as_the_likeliest_tasks_with_that_average_allow():
    from scipy.optimize import minimize_scalar

    right, n = np.array([17, 27]), np.array([20, 80])
    found = average({"a": np.arange(20) < 17, "b": np.arange(80) < 27})
    for end in (found.low, found.high):
        def unlikely(one, end=end):
            chances = np.array([one, 2 * end - one])
            return -(right * np.log(chances) + (n - right) * np.log(1 - chances)).sum()

        bounds = (max(1e-9, 2 * end - 1 + 1e-9), min(1 - 1e-9, 2 * end - 1e-9))
        one = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        chances = np.array([one, 2 * end - one])
        error = np.sqrt((chances * (1 - chances) / (n - 0.5)).sum()) / 2  # half an item for the second task's own mean
        assert abs(found.value - end) / error == pytest.approx(1.959964, abs=1e-4)


def test_the_average_weighs_tasks_and_not_items_and_their_order_does_not_count():
    a, b = np.ones(10), np.array([0.0, 1, 0, 0] * 25)
    found = average({"a": a, "b": b})
    assert found.value == pytest.approx((1 + 0.25) / 2)
    rng = np.random.default_rng(0)
    c, d = rng.random(20), rng.random(30)
    assert average({"c": c, "d": d}) == average({"d": d, "c": c})


def test_wilson_covers_the_truth_as_often_as_it_says():
    from scipy.stats import binom

    def covered(n, chance):
        found = [wilson(k, n) for k in range(n + 1)]
        return sum(binom.pmf(k, n, chance) for k in range(n + 1) if found[k].low <= chance <= found[k].high)

    chances = np.linspace(0.1, 0.9, 17)
    for n in (100, 200, 500):
        assert all(0.93 <= covered(n, chance) <= 0.97 for chance in chances)
    for n in (20, 30, 50):  # so few answers come in steps of more than a percent of the chance
        exact = [covered(n, chance) for chance in chances]
        assert 0.93 <= np.mean(exact) <= 0.97 and min(exact) >= 0.92
    assert all(covered(n, chance) >= 0.9 for n in (20, 30, 50, 100, 190, 500) for chance in (0.02, 0.05, 0.95, 0.98))


@pytest.mark.parametrize("items", [(20, 60, 200), (30, 50, 100, 400), (50,) * 6], ids=str)
@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9, 0.98, "mixed"])
def test_the_average_covers_the_truth_as_often_as_it_says(items, chance):
    chances = np.linspace(0.2, 0.98, len(items)) if chance == "mixed" else np.full(len(items), chance)
    right = np.random.default_rng(0).binomial(items, chances, size=(1000, len(items)))
    drawn, times = np.unique(right, axis=0, return_counts=True)
    intervals = [average({str(t): np.arange(n) < k for t, (n, k) in enumerate(zip(items, row, strict=True))})
                 for row in drawn]
    covered = np.average([found.low <= chances.mean() <= found.high for found in intervals], weights=times)
    assert covered >= 0.9 if chance == 0.98 else 0.93 <= covered <= 0.97


def test_tasks_that_count_differently_are_covered_as_often_as_it_says():
    items, counts, chances = (50, 100, 200), {"0": 0.5, "1": 0.25, "2": 0.75}, np.array([0.3, 0.6, 0.9])
    right = np.random.default_rng(0).binomial(items, chances, size=(1000, 3))
    truth = float(chances @ list(counts.values()))
    found = [average({str(t): np.arange(n) < k for t, (n, k) in enumerate(zip(items, row, strict=True))},
                     weights=counts) for row in right]
    assert 0.93 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.97
    assert found[0].value == pytest.approx(float(right[0] / items @ list(counts.values())))


def test_equal_weights_are_no_weights_and_a_task_without_weight_does_not_count():
    rng = np.random.default_rng(1)
    a, b = ({task: rng.integers(0, 2, 40).astype(float) for task in "tu"} for _ in range(2))
    half = {"t": 0.5, "u": 0.5}
    assert average(a, weights=half) == average(a) and difference(a, b, weights=half) == difference(a, b)
    doubled = difference(a, b, weights={"t": 1.0, "u": 1.0})
    assert doubled == pytest.approx([2 * end for end in difference(a, b)], abs=1e-9)
    alone = average(a, weights={"t": 1.0, "u": 0.0})
    assert alone.value == a["t"].mean() and alone.high - alone.low < 1.1 * np.ptp(average({"t": a["t"]})[1:])


def test_the_average_of_shares_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [average({"a": rng.beta(2, 3, 20), "b": rng.beta(2, 3, 40)}) for _ in range(1000)]
    assert 0.93 <= np.mean([found.low <= 0.4 <= found.high for found in intervals]) <= 0.97


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
    intervals = [difference(*siblings(rng, 100, 3, 0.05)) for _ in range(1000)]
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
    assert (-back.value, -back.high, -back.low) == pytest.approx(there, abs=1e-9)


@given(tasks)
def test_no_average_and_no_difference_from_oneself_is_certain(by_task):
    ours, none = average(by_task), difference(by_task, by_task)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1 and ours.low < ours.high
    assert -1 <= none.low < none.value == 0 < none.high <= 1


@given(results)
def test_no_proportion_is_certain(one):
    found = proportion(one)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


def test_a_task_that_is_all_right_is_bounded_as_wilson_does():
    assert average({"a": np.ones(20)}) == pytest.approx(wilson(20, 20), abs=1e-9)
    assert average({"a": np.zeros(20)}) == pytest.approx(wilson(0, 20), abs=1e-9)
    two = average({"a": np.ones(20), "b": np.ones(20)})
    assert two.high == 1 and wilson(20, 20).low < two.low == pytest.approx(wilson(39, 39).low, abs=1e-9)


def test_members_that_never_differ_could_still_differ_on_as_many_items_as_wilson_allows():
    found, unseen = difference({"a": np.ones(50)}, {"a": np.ones(50)}), wilson(0, 50).high
    assert found == pytest.approx((0, -unseen, unseen), abs=1e-9)


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
