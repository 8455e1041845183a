"""Comparisons over a board: no false winners, true ones found, ranks within what could be."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from glue.errors import SuiteError
from glue.evaluate.comparisons import apart, comparisons, detectable, holm, leaders, ranks, resampled
from glue.evaluate.statistics import average, difference, mcnemar

UNEQUAL = (20, 60, 200)


def board(rng, chances, items, alike=0.6):
    """Members that are right with their chance; on this share of items they are so for the same reason."""
    members = {f"m{place}": {} for place in range(len(chances))}
    for task, n in enumerate(items):
        common = rng.random(n)
        for place, chance in enumerate(chances):
            luck = np.where(rng.random(n) < alike, common, rng.random(n))
            members[f"m{place}"][str(task)] = (luck < chance).astype(float)
    return members


def gained(rng, n, tasks, ahead, turned=0.04):
    """Two members that differ on a share `turned` of items, on which the first is right this much more often."""
    a, b = {}, {}
    for task in range(tasks):
        common, luck = (rng.random(n) < 0.7).astype(float), rng.random(n)
        won, lost = luck < (turned + ahead) / 2, luck > 1 - (turned - ahead) / 2
        a[str(task)], b[str(task)] = np.select([won, lost], [1, 0], common), np.select([won, lost], [0, 1], common)
    return a, b


def test_holm_is_the_closed_test_of_bonferroni():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(5) ** 4
        groups = [set(group) for size in range(1, 6) for group in combinations(range(5), size)]
        alone = [(group, min(1, len(group) * p[list(group)].min())) for group in groups]
        closed = [max(bound for group, bound in alone if one in group) for one in range(5)]
        assert holm(p) == pytest.approx(closed, abs=1e-15)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and len(holm([])) == 0


@pytest.mark.parametrize("chance", [0.5, 0.9])
@pytest.mark.parametrize("items", [(100,), UNEQUAL, (50,) * 6], ids=str)
def test_among_equal_members_a_false_winner_appears_on_less_than_5_of_100_boards(items, chance):
    rng = np.random.default_rng(0)
    false = [comparisons(board(rng, [chance] * 10, items))[0].corrected < 0.05 for _ in range(200)]
    assert np.mean(false) < 0.05


def test_a_gain_of_two_points_is_found_by_pairs_and_not_without():
    rng, found, alone = np.random.default_rng(0), [], []
    for _ in range(100):
        a, b = gained(rng, 200, 6, 0.02)
        (first,) = comparisons({"a": a, "b": b})
        found.append(first.better == "a" and first.p < 0.05)
        one, other = average(a), average(b)
        alone.append(one.value - other.value > np.hypot(one.value - one.low, other.high - other.value))
        assert (difference(a, b).low > 0) == found[-1] or first.p == pytest.approx(0.05, abs=0.02)
    assert np.mean(found) >= 0.85 and np.mean(alone) <= 0.1


def test_one_task_of_right_and_wrong_is_compared_by_mcnemars_test():
    members = board(np.random.default_rng(0), [0.5, 0.7], (80,))
    (one,) = comparisons(members)
    assert one.p == one.corrected == mcnemar(members["m0"]["0"], members["m1"]["0"])
    assert (one.better, one.worse) == ("m1", "m0")
    assert one.gap == pytest.approx(members["m1"]["0"].mean() - members["m0"]["0"].mean(), abs=1e-12)


def test_the_p_value_of_an_average_is_that_of_turning_every_difference_around():
    rng = np.random.default_rng(0)
    for _ in range(60):
        won, lost = rng.integers(0, 5, (2, 2))
        a = {str(n): np.arange(n) < k for n, k in zip((20, 60), won, strict=True)}
        b = {str(n): np.arange(n) >= n - k for n, k in zip((20, 60), lost, strict=True)}
        parts = np.repeat([1 / 40, 1 / 120], won + lost)
        if not len(parts):
            continue
        (one,) = comparisons({"a": a, "b": b})
        sums = np.abs(np.array(list(product([1, -1], repeat=len(parts)))) @ parts)
        exact = np.mean(sums >= one.gap - 1e-9)
        assert one.p >= 0.9 * exact or exact > 0.06
        assert one.p <= 2.5 * exact + 0.02


def test_members_against_one_are_corrected_for_so_many_only():
    members = board(np.random.default_rng(0), [0.5, 0.5, 0.8, 0.9], UNEQUAL)
    found = comparisons(members, against="m0")
    assert len(found) == 3 and all("m0" in one[:2] for one in found)
    assert [one.corrected for one in found] == pytest.approx(holm([one.p for one in found]))
    assert {one.better for one in found if one.corrected < 0.05} == {"m2", "m3"}


def test_leaders_are_those_whom_no_other_is_shown_to_beat():
    rng = np.random.default_rng(0)
    assert leaders(board(rng, [0.5, 0.5, 0.9, 0.6], (100, 200))) == ["m2"]
    assert set(leaders(board(rng, [0.3, 0.3, 0.7, 0.7], (100, 200)))) == {"m2", "m3"}
    same = board(rng, [0.5], UNEQUAL)["m0"]
    assert leaders({"b": same, "a": same}) == ["a", "b"]


def test_what_a_task_counts_for_counts_in_every_comparison():
    rng = np.random.default_rng(3)
    one, other = ({"t": rng.random(n) < p, "u": rng.random(n) < q} for n, p, q in ((200, 0.8, 0.3), (200, 0.5, 0.6)))
    members = {"one": {task: some.astype(float) for task, some in one.items()},
               "other": {task: some.astype(float) for task, some in other.items()}}
    for counts, first in (({"t": 0.9, "u": 0.1}, "one"), ({"t": 0.1, "u": 0.9}, "other")):
        assert leaders(members, weights=counts) == [first]
        assert {name: rank[:] for name, rank in ranks(members, weights=counts).items()} == \
            {name: (1, 1, 1) if name == first else (2, 2, 2) for name in members}
        found = comparisons(members, weights=counts)[0]
        gap = difference(members[first], members[found.worse], weights=counts)
        assert found.gap == pytest.approx(gap.value) and gap.low > 0 and found.corrected < 0.001
    items = {"t": 100, "u": 100}
    assert detectable(items, 0.2, weights={"t": 0.5, "u": 0.5}) == pytest.approx(detectable(items, 0.2))
    assert detectable(items, 0.2, weights={"t": 1.0, "u": 0.0}) == pytest.approx(detectable({"t": 100}, 0.2))


def test_an_interval_of_ranks_covers_all_ranks_of_equal_members():
    rng = np.random.default_rng(0)
    whole = [[found.best == 1 and found.worst == 6 for found in
              ranks(board(rng, [0.6] * 6, UNEQUAL), resamples=500, seed=seed).values()] for seed in range(300)]
    assert np.mean(whole) >= 0.93


def test_an_interval_of_ranks_covers_the_true_rank():
    rng, chances = np.random.default_rng(0), [0.9, 0.8, 0.78, 0.6, 0.6, 0.4]
    true = [(1, 1), (2, 2), (3, 3), (4, 5), (4, 5), (6, 6)]
    covered, widths = [], []
    for seed in range(300):
        found = list(ranks(board(rng, chances, (100, 200)), resamples=500, seed=seed).values())
        covered.append([one.best <= low and high <= one.worst for one, (low, high) in zip(found, true, strict=True)])
        widths.append([one.worst - one.best for one in found])
    assert np.mean(covered, axis=0).min() >= 0.95
    assert np.mean(widths, axis=0) == pytest.approx([0.3, 1, 1, 1, 1, 0], abs=0.35)


def test_ranks_have_their_value_within_and_share_the_best_of_ties():
    same = board(np.random.default_rng(0), [0.5, 0.9], UNEQUAL)
    found = ranks({"a": same["m0"], "b": same["m1"], "c": same["m0"]})
    assert found == {"a": (2, 2, 3), "b": (1, 1, 1), "c": (2, 2, 3)}
    assert ranks({"alone": same["m0"]}) == {"alone": (1, 1, 1)}


def test_the_same_seed_gives_the_same_ranks():
    members = board(np.random.default_rng(0), np.linspace(0.5, 0.7, 8), UNEQUAL)
    assert ranks(members, seed=3) == ranks(members, seed=3)


def test_the_paired_bootstrap_spreads_like_that_of_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    tasks = [np.stack([results["0"] for results in board(rng, [0.6, 0.7], (n,)).values()], 1) for n in (40, 150)]
    ours = resampled(tasks, 20_000, rng)
    theirs = [bootstrap(tuple(task.T), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True, vectorized=True,
                        n_resamples=20_000, method="percentile", rng=rng).standard_error for task in tasks]
    assert (ours[:, 0] - ours[:, 1]).std() == pytest.approx(np.hypot(*theirs) / 2, rel=0.03)
    assert ours.mean(0) == pytest.approx(np.mean([task.mean(0) for task in tasks], axis=0), abs=0.003)


def test_what_a_suite_detects_is_found_as_often_as_its_power_says():
    rng, least = np.random.default_rng(0), detectable({"0": 200, "1": 200, "2": 200}, 0.2)
    found = [difference(*gained(rng, 200, 3, least, turned=0.2)).low > 0 for _ in range(400)]
    assert 0.75 <= np.mean(found) <= 0.87


def test_a_suite_of_four_times_the_items_detects_half_the_difference():
    assert detectable({"a": 400, "b": 80}, {"a": 0.1, "b": 0.3}) == pytest.approx(
        detectable({"a": 100, "b": 20}, {"a": 0.1, "b": 0.3}) / 2, rel=1e-12)
    assert detectable({"a": 1200}, 0.2) == pytest.approx((1.959964 + 0.841621) * np.sqrt(0.2 / 1200), rel=1e-6)


def test_apart_is_the_share_of_items_that_one_of_two_members_has_right():
    results = {"a": [1, 1, 0, 0], "b": [1, 0, 1, 0], "c": [1, 1, 0, 1]}
    assert apart({name: {"t": np.array(one)} for name, one in results.items()}) == {"t": 0.5}  # of 1/2, 1/4 and 3/4


def test_what_cannot_be_compared_is_refused():
    members = board(np.random.default_rng(0), [0.5, 0.5], UNEQUAL)
    short = {"m0": members["m0"], "m1": {**members["m1"], "2": members["m1"]["2"][1:]}}
    for compare in (comparisons, leaders, ranks, apart):
        with pytest.raises(SuiteError, match="on 200 and on 199 items of 2"):
            compare(short)
    with pytest.raises(SuiteError, match="no member to compare"):
        ranks({})
    with pytest.raises(SuiteError, match="one member alone"):
        apart({"m0": members["m0"]})
    with pytest.raises(SuiteError, match="without items"):
        detectable({}, 0.2)
