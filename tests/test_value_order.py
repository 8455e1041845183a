"""The order of Shapley values in a search: who adds most beside the others is tried first, within the budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pytest

from glue.errors import MethodError
from glue.search import searching
from glue.search.candidate import Candidate
from glue.search.space import Rule, Space
from glue.search.worth import by_worth
from glue.steps.search import _worth

ITEMS = 200


def space(worth: dict[str, float], *, rule: Rule = "add", budget: int = 100, **more) -> Space:
    """Members who are each worth so much, in the sum, and alone all alike."""
    def evaluate(candidates: Sequence[Candidate], items: Sequence[np.ndarray] = ()) -> Iterable[np.ndarray]:
        for candidate, some in zip(candidates, items or [np.arange(ITEMS)] * len(candidates), strict=True):
            value = 0.5
            if candidate.merged:
                value += sum(worth[name] * min(1.0, weight * len(worth)) for name, weight in candidate.parts)
            yield (some < round(ITEMS * value)).astype(float)

    return Space(list(worth), evaluate, np.zeros(ITEMS), rule=rule, budget=budget, shapley=partial(_worth, 0), **more)


WORTH = {"a": -0.1, "b": 0.02, "c": 0.2, "d": 0.1}


@pytest.mark.parametrize("rule", ["add", "interpolate"])
def test_who_adds_most_comes_first_where_all_are_alike_alone(rule):
    place = space(WORTH, rule=rule)
    assert [single.names[0] for single in place.singles()] == ["a", "b", "c", "d"]
    assert by_worth(place) == ["c", "d", "b", "a"]
    assert place.budget - place.left == 4 + 11  # every member, and every merge of two or more


def test_the_order_in_the_recipe_and_what_was_measured_before_change_nothing():
    backwards = space(dict(reversed(WORTH.items())))
    assert by_worth(backwards) == by_worth(space(WORTH))
    left = backwards.left
    assert by_worth(backwards) == ["c", "d", "b", "a"] and backwards.left == left


def test_of_many_members_orders_are_drawn_within_half_of_the_budget():
    many = {f"m{k:02}": 0.02 * k / 14 for k in range(14)}
    place = space(many, budget=200)
    place.singles()
    left = place.left
    order = by_worth(place)
    assert left - place.left <= left // 2
    assert np.corrcoef([order.index(name) for name in many], range(14))[0, 1] < -0.9
    items = space(many, budget=200, item_budget=100 * ITEMS)
    items.singles()
    before = items.items_left
    by_worth(items)
    assert 0 < before - items.items_left <= before // 2


def test_the_base_is_no_player_and_one_member_alone_needs_no_order():
    place = space(WORTH, neutral=frozenset("a"))
    assert by_worth(place) == ["c", "d", "b"]
    assert by_worth(space({"a": 0.1})) == ["a"]


def test_a_budget_that_is_too_small_is_told_with_one_that_is_enough():
    place = space(WORTH, budget=10)
    with pytest.raises(MethodError, match="give it a budget of 14 or more"):
        by_worth(place)
    assert by_worth(space(WORTH, budget=14))[0] == "c"
    with pytest.raises(MethodError, match="order: accuracy"):
        by_worth(Space(["a", "b"], lambda some: [np.ones(4) for _ in some], np.zeros(4), rule="add", budget=9))


@pytest.mark.parametrize("name", ["greedy", "racing", "paper"])
def test_a_search_tries_members_in_that_order(name):
    rule: Rule = "interpolate" if name == "paper" else "add"
    place = space(WORTH, rule=rule)
    found = searching.choose({name: {"order": "shapley"}})(place)
    tried = [row.purpose.split(" joins ")[0] for row in found.log if " joins " in row.purpose]
    assert list(dict.fromkeys(tried))[:2] == ["c", "d"]
    assert found.candidates <= place.budget
