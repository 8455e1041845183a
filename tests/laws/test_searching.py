"""What every registered search strategy keeps to, whatever the scores are."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue.errors import MethodError
from glue.search import searching
from glue.search.candidate import Candidate
from glue.search.space import Space

STRATEGIES = [method.name for method in searching]
TASKS = np.repeat([0, 1, 2], [8, 8, 4])
SKILLS = {"base": (0, 0, 0), "maths": (3, 0, 0), "code": (0, 3, 0), "facts": (0, 0, 2), "noise": (-1, -1, -1)}
each = pytest.mark.parametrize("strategy", STRATEGIES)


def rugged(seed: int, levels: int):
    """Scores without any sense, the same for the same candidate; few levels make many ties."""
    def score(candidate):
        rng = np.random.default_rng(crc32(f"{seed} {candidate}".encode()))
        return rng.integers(0, levels, len(TASKS)) / (levels - 1)
    return score


def additive(candidate):
    """Each item is right once what the members bring to its task exceeds its difficulty; too much spoils it."""
    brought = sum(weight * np.array(SKILLS[name]) for name, weight in candidate.parts)
    return ((brought[TASKS] > np.arange(len(TASKS)) % 8 / 3) & (abs(brought).sum() < 6)).astype(float)


class Scorer:
    """Results of a score function, and the (candidate, item) pairs that were asked for, in order."""

    def __init__(self, score):
        self.score, self.asked = score, []

    def __call__(self, candidates, items=None):
        for k, candidate in enumerate(candidates):
            some = np.arange(len(TASKS)) if items is None else items[k]
            self.asked += [(candidate, int(item)) for item in some]
            yield self.score(candidate)[some]


spaces = st.tuples(st.integers(0, 10**6), st.sampled_from([2, 3, 100]), st.permutations(sorted(SKILLS)),
                   st.integers(1, 5), st.sampled_from(["add", "interpolate"]), st.integers(0, 60),
                   st.sets(st.sampled_from(sorted(SKILLS))), st.integers(0, 500))


def run(strategy, drawn, *, shuffled=False, **more):
    seed, levels, names, n, rule, extra, neutral, items = drawn
    names = names[:n] if shuffled else sorted(names[:n])
    scorer = Scorer(rugged(seed, levels))
    space = Space(names, scorer, TASKS, rule=rule, budget=n + extra, neutral=neutral, layers=7, seed=seed,
                  item_budget=n * len(TASKS) + items, **more)
    return searching[strategy].bind()(space), space, scorer.asked


@each
@given(spaces)
def test_every_single_member_is_measured_and_none_is_better_than_what_is_found(strategy, drawn):
    found, space, asked = run(strategy, drawn)
    singles = [Candidate.single(name) for name in space.names]
    assert {(single, item) for single in singles for item in range(len(TASKS))} <= set(asked)
    assert found.value >= max(space.value(single) for single in singles)
    result = rugged(*drawn[:2])(found.candidate)
    assert found.value == pytest.approx(np.mean([result[task == TASKS].mean() for task in range(3)]), abs=1e-12)


@each
@given(spaces)
def test_the_budgets_hold_and_nothing_is_measured_twice(strategy, drawn):
    found, space, asked = run(strategy, drawn)
    assert len(asked) == len(set(asked)) == found.items == space.item_budget - space.items_left <= space.item_budget
    assert len({candidate for candidate, _ in asked}) == found.candidates == space.budget - space.left <= space.budget
    assert all(row.purpose and row.items for row in found.log)


@each
@given(spaces)
def test_neither_a_second_run_nor_another_order_of_names_changes_what_is_found(strategy, drawn):
    found, again, moved = (run(strategy, drawn, shuffled=shuffled)[0] for shuffled in (False, False, True))
    assert found == again and (moved.candidate, moved.value) == (found.candidate, found.value)


@each
@given(spaces, st.floats(0, 1))
def test_a_search_that_was_cut_off_goes_on_to_the_same_end_and_measures_only_the_rest(strategy, drawn, when):
    measured = []
    whole, _, asked = run(strategy, drawn, record=lambda *result: measured.append(result))
    known = {}
    for candidate, items, results in measured[:int(when * len(measured))]:
        known.setdefault(candidate, np.full(len(TASKS), np.nan))[items] = results
    rest = []
    found, _, more = run(strategy, drawn, known=known, record=lambda *result: rest.append(result))
    assert found == whole and more == asked[len(asked) - len(more):]
    assert [(c, list(i), list(r)) for c, i, r in measured[len(measured) - len(rest):]] == \
        [(c, list(i), list(r)) for c, i, r in rest] and len(rest) == len(measured) - int(when * len(measured))


@each
@given(spaces)
def test_shares_sum_to_one_and_nothing_neutral_is_added(strategy, drawn):
    _, space, asked = run(strategy, drawn)
    for candidate in {candidate for candidate, _ in asked if candidate.merged}:
        if space.rule == "interpolate":
            for table in candidate.tables(candidate.groups):
                assert sum(table.values()) == pytest.approx(1, abs=1e-12) and min(table.values()) > 0
        else:
            assert set(candidate.names) <= set(space.others) and not set(candidate.names) & set(drawn[6])


@each
def test_where_members_add_up_a_merge_beats_the_best_of_them(strategy):
    space = Space(list(SKILLS), Scorer(additive), TASKS, rule="add", budget=200, neutral={"base"}, layers=3)
    found = searching[strategy].bind()(space)
    assert found.candidate.merged == (strategy != "best") and (found.value > 0.49) == (strategy != "best")


@each
def test_with_nothing_to_add_the_base_itself_is_the_answer(strategy):
    space = Space(["base"], Scorer(additive), TASKS, rule="add", budget=9, neutral={"base"}, layers=3)
    assert searching[strategy].bind()(space).candidate == Candidate.single("base") and space.left == 8


def test_a_budget_below_the_number_of_members_is_refused():
    with pytest.raises(MethodError, match="a budget of 4 cannot measure its 5 members.*\n.*5 or more"):
        Space(list(SKILLS), Scorer(additive), TASKS, rule="add", budget=4)
    with pytest.raises(MethodError, match="may evaluate 99 items cannot measure its 5 members on 20.*\n.*100 or more"):
        Space(list(SKILLS), Scorer(additive), TASKS, rule="add", budget=5, item_budget=99)
