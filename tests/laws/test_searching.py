"""What every registered search strategy keeps to, whatever the scores are."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue.errors import MethodError
from glue.search import searching
from glue.search.space import Candidate, Space

STRATEGIES = [method.name for method in searching]
TASKS = np.repeat([0, 1, 2], [8, 8, 4])
SKILLS = {"base": (0, 0, 0), "maths": (3, 0, 0), "code": (0, 3, 0), "facts": (0, 0, 2), "noise": (-1, -1, -1)}
each = pytest.mark.parametrize("strategy", STRATEGIES)


def rugged(seed: int, levels: int):
    """Scores without any sense, the same for the same candidate; few levels make many ties."""
    def evaluate(batch):
        rngs = [np.random.default_rng(crc32(f"{seed} {candidate}".encode())) for candidate in batch]
        return [rng.integers(0, levels, len(TASKS)) / (levels - 1) for rng in rngs]
    return evaluate


def additive(batch):
    """Each item is right once what the members bring to its task exceeds its difficulty; too much spoils it."""
    brought = [sum(weight * np.array(SKILLS[name]) for name, weight in candidate.parts) for candidate in batch]
    return [((b[TASKS] > np.arange(len(TASKS)) % 8 / 3) & (abs(b).sum() < 6)).astype(float) for b in brought]


spaces = st.tuples(st.integers(0, 10**6), st.sampled_from([2, 3, 100]), st.permutations(sorted(SKILLS)),
                   st.integers(1, 5), st.sampled_from(["add", "interpolate"]), st.integers(0, 60),
                   st.sets(st.sampled_from(sorted(SKILLS))))


def run(strategy, drawn, watch=None):
    seed, levels, names, n, rule, extra, neutral = drawn
    scores, names = rugged(seed, levels), sorted(names[:n]) if watch is None else names[:n]
    measured: list[Candidate] = []

    def evaluate(batch):
        measured.extend(batch)
        return scores(batch)

    space = Space(names, evaluate, TASKS, rule=rule, budget=n + extra, neutral=neutral)
    return searching[strategy].bind()(space), space, measured


@each
@given(spaces)
def test_every_single_member_is_measured_and_none_is_better_than_what_is_found(strategy, drawn):
    found, space, measured = run(strategy, drawn)
    singles = [Candidate.single(name) for name in space.names]
    assert set(singles) <= set(measured)
    assert found.value >= max(space.value(single) for single in singles)
    result = rugged(*drawn[:2])([found.candidate])[0]
    assert found.value == pytest.approx(np.mean([result[task == TASKS].mean() for task in range(3)]), abs=1e-12)


@each
@given(spaces)
def test_the_budget_holds_and_nothing_is_measured_twice(strategy, drawn):
    found, space, measured = run(strategy, drawn)
    assert len(measured) == len(set(measured)) == space.budget - space.left <= space.budget
    assert [row.candidate for row in found.log] == measured and all(row.purpose for row in found.log)


@each
@given(spaces)
def test_neither_a_second_run_nor_another_order_of_names_changes_what_is_found(strategy, drawn):
    found, again, moved = (run(strategy, drawn, watch)[0] for watch in (None, None, "in the order drawn"))
    assert found == again and (moved.candidate, moved.value) == (found.candidate, found.value)


@each
@given(spaces)
def test_shares_sum_to_one_and_nothing_neutral_is_added(strategy, drawn):
    _, space, measured = run(strategy, drawn)
    for candidate in measured:
        if candidate.merged and space.rule == "interpolate":
            assert sum(candidate.weights.values()) == pytest.approx(1, abs=1e-12)
            assert min(candidate.weights.values()) > 0
        if candidate.merged and space.rule == "add":
            assert set(candidate.weights) <= set(space.others) and not set(candidate.weights) & set(drawn[-1])


@each
def test_where_members_add_up_a_merge_beats_the_best_of_them(strategy):
    space = Space(list(SKILLS), additive, TASKS, rule="add", budget=200, neutral={"base"})
    found = searching[strategy].bind()(space)
    assert found.candidate.merged == (strategy != "best") and (found.value > 0.5) == (strategy != "best")


@each
def test_with_nothing_to_add_the_base_itself_is_the_answer(strategy):
    space = Space(["base"], additive, TASKS, rule="add", budget=9, neutral={"base"})
    assert searching[strategy].bind()(space).candidate == Candidate.single("base") and space.left == 8


def test_a_budget_below_the_number_of_members_is_refused():
    with pytest.raises(MethodError, match="a budget of 4 cannot measure its 5 members.*\n.*5 or more"):
        Space(list(SKILLS), additive, TASKS, rule="add", budget=4)
