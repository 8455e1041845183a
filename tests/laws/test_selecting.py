"""What every registered selector keeps to, whatever the pool; and what QOCS and QWCS are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from glue.refine import selecting
from glue.refine.pool import Pool

SELECTORS = [method.name for method in selecting]
CHOOSING = [method.name for method in selecting if not method.traits.get("all")]
each = pytest.mark.parametrize("selector", SELECTORS)
choosing = pytest.mark.parametrize("selector", CHOOSING)


def pool(seed: int, n: int, clusters: int, size: int, levels: int = 1000) -> Pool:
    """Any pool; few levels make values and losses that are equal, and places that are copies."""
    rng = np.random.default_rng([seed, n])
    return Pool(size, seed, rng.integers(0, clusters, n), rng.integers(-levels, levels, clusters) / levels,
                rng.integers(0, levels, (n, 3)) / levels, rng.integers(0, levels, n) / levels)


pools = st.builds(pool, st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 12), st.integers(1, 80),
                  st.sampled_from([1, 3, 1000]))


def chosen(selector: str, some: Pool, **params) -> np.ndarray:
    return selecting[selector].bind(params)(some)


def test_the_selectors_of_the_paper_and_what_they_have_to_beat_are_there():
    assert {"qocs", "qwcs", "random", "k_center", "loss", "full"} <= set(SELECTORS)


@choosing
@given(pools)
def test_as_many_different_examples_as_are_wanted_are_chosen(selector, some):
    found = chosen(selector, some)
    assert found.dtype.kind == "i" and len(found) == min(some.size, len(some)) == len(set(found.tolist()))
    assert ((found >= 0) & (found < len(some))).all()


@each
@given(pools)
def test_all_are_chosen_where_all_are_wanted(selector, some):
    assert sorted(chosen(selector, replace(some, size=len(some)))) == list(range(len(some)))


@each
@given(pools)
def test_the_seed_decides(selector, some):
    assert np.array_equal(chosen(selector, some), chosen(selector, replace(some)))


@pytest.mark.parametrize("selector", ["qocs", "qwcs", "random", "k_center"])
def test_another_seed_decides_otherwise(selector):
    some = pool(0, 200, 5, 60)
    assert set(chosen(selector, some)) != set(chosen(selector, replace(some, seed=1)))


@choosing
@given(pools, st.integers(1, 80))
def test_a_smaller_choice_begins_a_larger_one(selector, some, more):
    larger = replace(some, size=some.size + more)
    assert np.array_equal(chosen(selector, larger)[:some.wanted], chosen(selector, some))


@choosing
def test_only_what_a_selector_says_it_needs_is_looked_at(selector):
    some = pool(3, 50, 4, 20)
    need = selecting[selector].traits.get("needs")
    bare = replace(some, **{name: None for name in ("values", "places", "losses") if name != need})
    if need != "values":  # who is in which cluster does not matter either
        bare = replace(bare, cluster=np.zeros(50, dtype=int))
    assert np.array_equal(chosen(selector, bare), chosen(selector, some))


# QOCS and QWCS

@given(pools)
def test_qocs_takes_the_best_clusters_whole_and_a_part_of_one_at_most(some):
    found = chosen("qocs", some)
    taken = np.bincount(some.cluster[found], minlength=len(some.values))
    whole = np.bincount(some.cluster, minlength=len(some.values))
    parts = [k for k in range(len(whole)) if 0 < taken[k] < whole[k]]
    assert len(parts) <= 1
    for k in np.flatnonzero(taken):
        assert all(taken[other] == whole[other] for other in np.flatnonzero(some.values > some.values[k]))


@given(pools)
def test_with_a_large_factor_qwcs_takes_what_qocs_takes(some):
    if len(set(some.values)) == len(some.values):
        assert np.array_equal(chosen("qwcs", some, factor=1e12), chosen("qocs", some))


def test_with_no_factor_qwcs_draws_evenly_from_clusters_of_any_size():
    sizes = [400, 100, 200, 300]
    some = Pool(60, 0, np.repeat(range(4), sizes), np.array([5.0, -1.0, 0.0, 2.0]))
    drawn = sum(np.bincount(some.cluster[chosen("qwcs", replace(some, seed=seed), factor=0.0)], minlength=4)
                for seed in range(50))
    assert stats.chisquare(drawn).pvalue > 0.01 and drawn.sum() == 3000


def test_qwcs_draws_clusters_by_the_exponential_of_their_values_in_standard_deviations():
    values = np.array([0.0, 1.0, 2.0, 5.0])
    some = Pool(1, 0, np.repeat(range(4), 50), values)
    drawn = np.bincount([some.cluster[chosen("qwcs", replace(some, seed=seed), factor=0.7)[0]] for seed in range(4000)],
                        minlength=4)
    odds = np.exp(0.7 * (values - values.mean()) / values.std())
    assert stats.chisquare(drawn, odds / odds.sum() * 4000).pvalue > 0.01
    scaled = replace(some, size=100, values=values * 1e-6 + 3)  # neither scale nor origin of the value matters
    assert np.array_equal(chosen("qwcs", scaled), chosen("qwcs", replace(some, size=100)))


def test_a_cluster_without_examples_is_never_drawn_and_nothing_runs_for_ever():
    some = Pool(99, 0, np.array([0, 0, 2, 2]), np.array([-50.0, 900.0, -50.0]))
    assert sorted(chosen("qwcs", some, factor=1e9)) == sorted(chosen("qocs", some)) == [0, 1, 2, 3]


# what has to be beaten

def test_k_center_leaves_nothing_farther_than_twice_the_best_and_no_copy_before_all_are_covered():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(6, 4)) * 20
    places = np.concatenate([center + rng.normal(size=(9, 4)) * 0.01 for center in centers])
    some = Pool(6, 3, np.zeros(108, dtype=int), places=np.concatenate([places, places]))
    found = chosen("k_center", some)
    assert sorted(k % 54 // 9 for k in found) == list(range(6))


def test_loss_takes_the_most_or_the_least_surprising():
    losses = np.random.default_rng(0).normal(size=40)
    some = Pool(10, 0, np.zeros(40, dtype=int), losses=losses)
    order = np.argsort(losses)
    assert chosen("loss", some).tolist() == order[::-1][:10].tolist()
    assert chosen("loss", some, keep="low").tolist() == order[:10].tolist()
