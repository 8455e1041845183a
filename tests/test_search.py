"""The space of candidates, and what each strategy does in it."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from glue.errors import MethodError
from glue.search import searching
from glue.search.candidate import Candidate, group_of
from glue.search.space import Gain, Space

TASKS = np.repeat([0, 1], [30, 10])
TABLE = Path(__file__).parents[1] / "benchmarks/paper/model_glue_scores.csv"  # twelve members, six accuracies
SCORES = {row.pop("model_name").split("/")[1]: tuple(map(float, row.values()))
          for row in csv.DictReader(TABLE.open())}
RANKED = ["Synthia-7B-v1.2", "Llama-2-7b-evolcodealpaca", "OpenHermes-7B", "pygmalion-2-7b", "Llama-2-7b-chat-hf",
          "BeingWell_llama2_7b", "MetaMath-7B-V1.0", "vicuna-7b-v1.5", "Platypus2-7B", "Llama-2-7b-WikiChat-fused",
          "dolphin-llama2-7b", "Llama-2-ko-7b-Chat"]
MEANS = [38.70, 38.34, 38.28, 38.26, 37.68, 37.09, 36.81, 36.45, 35.85, 29.45, 28.08, 23.53]


class Landscape:
    """Scores by a function of the candidate; every item of both tasks gets the same, and batches are remembered."""

    def __init__(self, score):
        self.score, self.batches, self.items = score, [], []

    def __call__(self, batch, items=None):
        self.batches.append(list(batch))
        self.items.append([len(TASKS)] * len(batch) if items is None else [len(some) for some in items])
        return [np.full(count, self.score(candidate)) for candidate, count in zip(batch, self.items[-1], strict=True)]

    def space(self, names, rule="add", budget=1000, neutral=(), **more):
        return Space(names, self, TASKS, rule=rule, budget=budget, neutral=frozenset(neutral), **more)


def search(strategy, landscape, names, *, rule="add", budget=1000, neutral=(), more=None, **params):
    return searching[strategy].bind(params)(landscape.space(names, rule, budget, neutral, **more or {}))


def table(better_by=0.0):
    """The twelve as they are from the table; merges score this much more than the best of them, by each member."""
    best = np.mean(SCORES[RANKED[0]])
    return Landscape(lambda c: best + better_by * len(c.parts) if c.merged else float(np.mean(SCORES[c.parts[0][0]])))


def single(name):
    return Candidate.single(name)


# -- candidates and the space --

def test_a_candidate_is_the_same_whatever_the_order_and_without_what_weighs_nothing():
    assert Candidate.merge({"b": 1, "a": 0.5, "c": 0}) == Candidate.merge({"a": 0.5, "b": 1.0})
    assert hash(Candidate.merge({"b": 1, "a": 0.5})) == hash(Candidate.merge({"a": 0.5, "b": 1}))
    assert Candidate.merge({"a": 1}) != single("a") and single("a").weights == {"a": 1}
    assert str(Candidate.merge({"b": 0.35, "a": 0.5})) == "0.5 a + 0.35 b" and str(single("a")) == "a"


def test_the_macro_mean_weighs_tasks_and_not_items():
    space = Space(["a"], lambda batch: [(TASKS == 0).astype(float)], TASKS, rule="add", budget=1)
    assert space.value(next(iter(space.results([single("a")])))) == 0.5


def test_what_is_known_is_free_and_what_the_budget_does_not_reach_is_left_out():
    landscape = Landscape(lambda c: c.parts[0][1])
    space = landscape.space(["a"], budget=3)
    merges = [Candidate.merge({"a": k / 8}) for k in range(1, 6)]
    assert list(space.results([merges[0], merges[0], merges[1]], "first")) == merges[:2] and space.left == 1
    assert list(space.results(merges, "second")) == merges[:3] and space.left == 0
    assert list(space.results([merges[4], merges[1]])) == [merges[1]]
    assert landscape.batches == [merges[:2], merges[2:3]]
    assert [(str(row.candidate), row.value, row.purpose) for row in space.log] == \
        [("0.125 a", 0.125, "first"), ("0.25 a", 0.25, "first"), ("0.375 a", 0.375, "second")]


def test_a_gain_has_the_paired_standard_error_of_the_macro_mean():
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 2, 40).astype(float) for _ in range(2))
    space = Space(["a", "b"], lambda batch: [one, other], TASKS, rule="add", budget=2)
    space.singles()
    gain = space.gain(single("a"), single("b"))
    by_task = [(one - other)[task == TASKS] for task in (0, 1)]
    assert gain.value == pytest.approx(np.mean([d.mean() for d in by_task]), abs=1e-15)
    assert gain.error == pytest.approx(np.sqrt(sum(d.var(ddof=1) / len(d) for d in by_task)) / 2, abs=1e-15)
    back = space.gain(single("b"), single("a"))
    assert back == Gain(-gain.value, gain.error)


def test_a_gain_must_be_worth_its_errors_and_only_the_paper_takes_a_tie():
    assert Gain(0.02, 0.01).convinces(1) and not Gain(0.02, 0.01).convinces(3) and Gain(0.01, 0.01).convinces(1)
    assert not Gain(0.0, 0.0).convinces(1) and Gain(0.0, 0.0).convinces(0) and not Gain(-0.01, 0.0).convinces(0)


def test_one_item_won_is_exactly_one_standard_error():
    for n in range(2, 300):
        results = {single("a"): np.zeros(n), single("b"): np.eye(n)[0]}
        space = Space(["a", "b"], lambda batch, known=results: [known[c] for c in batch], np.zeros(n), rule="add",
                      budget=2)
        space.singles()
        gain = space.gain(single("b"), single("a"))
        assert gain.value == pytest.approx(gain.error, rel=1e-12) and gain.convinces(1)


def test_layers_left_over_are_in_the_last_block_and_what_is_no_layer_is_in_the_group_after_it():
    assert [group_of(layer, 7, 4) for layer in range(7)] == [0, 0, 1, 1, 2, 2, 2] and group_of(None, 7, 4) == 3
    assert [group_of(layer, 6, 3) for layer in range(6)] == [0, 0, 0, 1, 1, 1] and group_of(None, 6, 3) == 2
    assert {group_of(layer, 7, 1) for layer in (0, 6, None)} == {0}


def test_a_candidate_says_what_a_merge_method_is_called_with_in_each_group():
    candidate = Candidate.merge([{"a": 0.5, "b": 0.25}, {"b": 1}, {"a": 1, "c": 0}],
                                {"density": [{"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 0.4, "b": 0.5}, {"a": 0.6}],
                                 "lambda": 0.9})
    assert candidate.groups == 3 and candidate.names == ("a", "b") and candidate.weights == {"a": 0.5, "b": 1.25 / 3}
    assert candidate.arguments(0, ["b", "a"]) == {"weight": [0.25, 0.5], "density": [0.2, 0.1], "lambda": 0.9}
    assert candidate.arguments(1, ["b", "a"]) == {"weight": [1, 0], "density": [0.5, 0.5], "lambda": 0.9}
    assert candidate.tables(3) == [{"a": 0.5, "b": 0.25}, {"b": 1}, {"a": 1}]
    assert str(candidate) == "0.5 a + 0.25 b (density 0.1 a, 0.2 b; lambda 0.9) | 1 b (density 0.5 b; lambda 0.9) | " \
                             "1 a (density 0.6 a; lambda 0.9)"


def test_what_is_said_of_every_group_alike_is_the_same_candidate_as_what_is_said_once():
    assert Candidate.merge([{"b": 0.5, "a": 1}] * 4, {"density": [0.5] * 4}) == \
        Candidate.merge({"a": 1, "b": 0.5}, {"density": 0.5})
    assert Candidate.merge({"a": 1, "b": 0}, {"density": {"a": 0.5, "b": 0.9}}) == \
        Candidate.merge({"a": 1}, {"density": {"a": 0.5, "c": 0.1}})
    assert Candidate.merge({"a": 1}, {"density": 0.5}) != Candidate.merge({"a": 1}, {"density": 0.6})


def test_a_candidate_survives_being_written_down():
    third = 1 / 3
    for candidate in (single("a"), Candidate.merge({"a": third}), Candidate.merge([{"a": third}, {}, {"b": 0.1}]),
                      Candidate.merge({"a": third, "b": 0.7}, {"density": {"a": 0.2, "b": third}, "lambda": third})):
        assert Candidate.unspelled(json.loads(json.dumps(candidate.spelled()))) == candidate
        assert pickle.loads(pickle.dumps(candidate)) == candidate


def test_only_items_that_are_not_known_are_measured_and_every_one_is_charged():
    landscape = Landscape(lambda c: c.parts[0][1])
    space = landscape.space(["a"], budget=3, item_budget=90)
    one, two, three = (Candidate.merge({"a": k / 8}) for k in (1, 2, 3))
    assert list(space.results([one, two], "some", np.array([0, 5, 30]))[two]) == [0.25] * 3
    assert (space.left, space.items_left) == (1, 84) and space.value(two) == 0.25
    assert list(space.results([one, two], "more", np.arange(0, 40, 5))) == [one, two] and space.items_left == 74
    assert len(space.results([one], "all")[one]) == 40 and space.items_left == 42
    assert list(space.results([three, two], "too many")) == [three] and (space.left, space.items_left) == (0, 2)
    assert list(space.results([two, three], "known", np.array([0, 35]))) == [two, three] and space.items_left == 2
    assert landscape.items == [[3, 3], [5, 5], [32], [40]]
    assert [row.items for row in space.log] == [3, 3, 5, 5, 32, 40]


def test_a_sample_has_its_share_of_every_task_and_grows_around_what_it_had():
    space = Landscape(lambda c: 0).space(["a"])
    small, large = space.sample(0.1), space.sample(0.5)
    assert np.bincount(TASKS[small]).tolist() == [3, 2] and np.bincount(TASKS[large]).tolist() == [15, 5]
    assert set(small) < set(large) and list(space.sample(1.0)) == list(range(40)) and (np.diff(large) > 0).all()
    assert list(Landscape(lambda c: 0).space(["a"], seed=1).sample(0.5)) != list(large)


def test_a_gain_on_some_items_is_that_of_a_search_that_has_no_others():
    rng = np.random.default_rng(0)
    results = {single(name): rng.integers(0, 2, 40).astype(float) for name in "ab"}
    items = np.array([0, 3, 4, 9, 31, 36, 39])

    def evaluate(batch, some=None):
        return [results[c] if some is None else results[c][some[k]] for k, c in enumerate(batch)]

    space, part = (Space(["a", "b"], evaluate, TASKS, rule="add", budget=2) for _ in range(2))
    space.singles()
    part.results([single("a"), single("b")], "", items)
    only = Space(["a", "b"], lambda batch: [results[c][items] for c in batch], TASKS[items], rule="add", budget=2)
    only.singles()
    assert space.gain(single("a"), single("b"), items) == part.gain(single("a"), single("b")) == \
        only.gain(single("a"), single("b"))


def test_what_is_recorded_as_it_comes_is_what_a_search_that_was_killed_goes_on_from():
    def evaluate(batch, items=None):
        for candidate in batch:
            if len(journal) == 2:
                raise KeyboardInterrupt
            yield np.full(40, candidate.parts[0][1])

    journal, merges = {}, [Candidate.merge({"a": k / 8}) for k in range(1, 5)]
    space = Space(["a"], evaluate, TASKS, rule="add", budget=4, record=lambda c, items, results:
                  journal.update({c: results}))
    with pytest.raises(KeyboardInterrupt):
        space.results(merges)
    assert list(journal) == merges[:2]
    rest = Landscape(lambda c: c.parts[0][1])
    again = rest.space(["a"], budget=3, known=journal)
    assert list(again.results(merges)) == merges[:3] and rest.batches == [merges[2:3]] and again.left == 0


# -- strategies --

def test_best_is_the_best_and_the_first_by_name_where_equal():
    assert search("best", table(), list(SCORES)).candidate == single(RANKED[0])
    assert search("best", Landscape(lambda c: 0.5), ["c", "b", "a"]).candidate == single("a")


def test_greedy_goes_by_accuracy():
    found = search("greedy", table(better_by=0.01), list(SCORES), rule="interpolate", coefficients="average")
    joined = [row.purpose.split()[0] for row in found.log[12:]]
    assert joined == RANKED[1:] and found.candidate.weights == pytest.approx(dict.fromkeys(RANKED, 1 / 12))


def test_greedy_in_the_given_order_still_starts_from_the_best():
    found = search("greedy", table(better_by=0.01), list(SCORES), rule="interpolate", coefficients="average",
                   order="given")
    assert [row.purpose.split()[0] for row in found.log[12:]] == [name for name in SCORES if name != RANKED[0]]
    assert found.log[12].purpose.endswith(f"joins {RANKED[0]}")


def test_greedy_keeps_what_helps_drops_what_does_not_and_leaves_earlier_weights_alone():
    wanted = {"a": 0.9, "b": 0.5, "c": 0.2}
    values = {"a": 0.40, "b": 0.38, "bad": 0.36, "c": 0.30, "base": 0.1}

    def score(candidate):
        if not candidate.merged:
            return values[candidate.parts[0][0]]
        weights = candidate.weights
        good = sum(0.15 - abs(weights[name] - wanted[name]) / 10 for name in wanted if name in weights)
        return 0.3 + good - 0.2 * ("bad" in weights)

    found = search("greedy", Landscape(score), list(values), neutral={"base"})
    assert found.candidate == Candidate.merge(wanted) and found.value == pytest.approx(0.75)


def test_greedy_tries_all_coefficients_of_a_member_as_one_batch():
    landscape = Landscape(lambda c: 0.5)
    search("greedy", landscape, ["a", "b", "c"], coefficients=[0.9, 0.3])
    assert [len(batch) for batch in landscape.batches] == [3, 2, 2, 2]


def test_greedy_keeps_the_first_member_whole_unless_less_of_it_is_better():
    def score(candidate, half=0.0):
        return 0.2 * len(candidate.parts) + half * (candidate.weights.get("a") == 0.5)

    assert search("greedy", Landscape(score), ["a", "b"]).candidate == Candidate.merge({"a": 1, "b": 0.2})
    assert search("greedy", Landscape(lambda candidate: score(candidate, 0.1)), ["a", "b"]).candidate == \
        Candidate.merge({"a": 0.5, "b": 0.2})


def test_greedy_may_start_from_the_base_which_is_then_no_part_of_the_merge():
    values = {"base": 0.5, "a": 0.4, "b": 0.3}
    landscape = Landscape(lambda c: 0.5 + 0.1 * len(c.parts) if c.merged else values[c.parts[0][0]])
    found = search("greedy", landscape, list(values), neutral={"base"}, coefficients=[0.5])
    assert found.candidate == Candidate.merge({"a": 0.5, "b": 0.5})
    assert found.log[3].purpose == "a joins base"


def test_greedy_takes_the_least_of_a_new_member_where_coefficients_are_equal():
    level = Landscape(lambda c: 0.1 * len(c.parts))
    assert search("greedy", level, ["a", "b"]).candidate.weights["b"] == 0.2
    assert search("greedy", level, ["a", "b"], coefficients=[0.9, 0.3, 0.5]).candidate.weights["b"] == 0.3
    shares = search("greedy", level, ["a", "b"], rule="interpolate").candidate.weights
    assert shares == pytest.approx({"a": 0.9, "b": 0.1})


def test_greedy_is_not_convinced_by_a_difference_within_the_noise_but_the_paper_is():
    rng = np.random.default_rng(0)
    start = rng.integers(0, 2, 40).astype(float)
    start[:6] = [0, 0, 0, 1, 1, 0]
    flipped = start.copy()
    flipped[:6] = [1, 1, 1, 0, 0, 0]  # three won, two lost

    def evaluate(batch):
        return [flipped if c.merged else start if c == single("a") else np.zeros(40) for c in batch]

    def run(min_gain):
        space = Space(["a", "b"], evaluate, np.zeros(40), rule="interpolate", budget=50)
        return searching["greedy"].bind({"min_gain": min_gain})(space).candidate

    assert run(1.0) == single("a") and run(0.0) == Candidate.merge({"a": 0.9, "b": 1 - 0.9})


def test_the_flat_weights_are_those_of_the_original_members():
    path = {"b": 0.3, "c": 0.8, "d": 0.6}  # the share kept when this one joins

    def flat(names):
        weights = {"a": 1.0}
        for name in names:
            weights = {other: weight * path[name] for other, weight in weights.items()} | {name: 1 - path[name]}
        return Candidate.merge(weights)

    best = {flat("b"): 0.5, flat("bc"): 0.6, flat("bcd"): 0.7}
    landscape = Landscape(lambda c: best.get(c, 0.2) if c.merged else 0.4 - 0.01 * ord(c.parts[0][0]) / 100)
    found = search("greedy", landscape, list("abcd"), rule="interpolate").candidate.weights
    by_hand = {"a": 0.3 * 0.8 * 0.6, "b": 0.7 * 0.8 * 0.6, "c": 0.2 * 0.6, "d": 0.4}
    assert found == pytest.approx(by_hand, abs=1e-15) and sum(found.values()) == pytest.approx(1, abs=1e-15)


def test_defect_3_the_first_member_is_not_merged_with_itself_and_the_first_partner_gets_half():
    found = search("greedy", table(better_by=0.01), list(SCORES), rule="interpolate", coefficients="average",
                   min_gain=0.0)
    merges = [row.candidate for row in found.log if row.candidate.merged]
    assert merges[0] == Candidate.merge(dict.fromkeys(RANKED[:2], 0.5)) and len(merges) == 11
    assert merges[1].weights == pytest.approx(dict.fromkeys(RANKED[:3], 1 / 3))


def test_defect_4_what_is_kept_is_the_best_coefficient_and_not_the_last_one_tried():
    landscape = Landscape(lambda c: 0.9 - abs(c.weights["a"] - 0.4) if c.merged else 0.5)
    found = search("greedy", landscape, ["a", "b"], rule="interpolate")
    assert found.candidate.weights == pytest.approx({"a": 0.4, "b": 0.6}) and found.value == pytest.approx(0.9)
    assert landscape.batches[-1][-1].weights == pytest.approx({"a": 0.1, "b": 0.9})


def test_defect_5_a_search_can_drive_a_merge_over_a_base_each_member_with_its_own_weight():
    base = np.array([1.0, 1.0, 1.0])
    moved = {"a": np.array([1.0, 0, 0]), "b": np.array([0, 2.0, 0]), "c": np.array([0, 0, -1.0])}
    goal = base + 0.9 * moved["a"] + 0.35 * moved["b"]

    def evaluate(batch):
        models = [base + sum(weight * moved[name] for name, weight in c.parts) for c in batch]
        return [np.full(len(TASKS), np.exp(-np.abs(model - goal).sum())) for model in models]

    found = searching["greedy"].bind()(Space(list(moved), evaluate, TASKS, rule="add", budget=100))
    assert found.candidate == Candidate.merge({"a": 0.9, "b": 0.35}) and found.value == pytest.approx(1)


def test_coefficients_that_a_rule_cannot_use_are_refused():
    with pytest.raises(MethodError, match="cannot average where members are added"):
        search("greedy", Landscape(lambda c: 0.5), ["a", "b"], coefficients="average")
    with pytest.raises(MethodError, match="cannot keep a share of 1 "):
        search("greedy", Landscape(lambda c: 0.5), ["a", "b"], rule="interpolate", coefficients=[1.0])
    with pytest.raises(MethodError, match="cannot be -0.1"):
        searching["greedy"].bind({"coefficients": [-0.1]})


def test_a_search_that_runs_out_of_budget_keeps_what_it_has():
    landscape = Landscape(lambda c: 0.2 * len(c.parts) + (c.merged and sum(c.weights.values())) / 100)
    assert search("greedy", landscape, ["a", "b", "c"], budget=3).candidate == single("a")
    assert search("greedy", landscape, ["a", "b", "c"], budget=10).candidate == Candidate.merge({"a": 0.9, "b": 0.35})


def test_uniform_takes_the_best_shared_weight_and_leaves_the_base_out():
    landscape = Landscape(lambda c: 0.9 - abs(c.weights.get("a", 1) - 0.4) if c.merged else 0.5)
    found = search("uniform", landscape, ["base", "a", "b"], neutral={"base"})
    assert found.candidate == Candidate.merge({"a": 0.4, "b": 0.4})
    assert search("uniform", landscape, ["a", "b"], coefficients=[1.0]).candidate == single("a")


def test_uniform_is_the_plain_average_where_weights_are_shares():
    found = search("uniform", table(better_by=0.01), RANKED, rule="interpolate")
    assert found.candidate.weights == pytest.approx(dict.fromkeys(RANKED, 1 / 12)) and len(found.log) == 13


def test_coefficients_finds_the_weight_of_each_member_and_leaves_the_poison_out():
    wanted = {"a": 0.9, "b": 0.35, "c": 0.5, "bad": 0.0}
    landscape = Landscape(lambda c: 0.8 - sum(abs(c.weights.get(name, 0) - wanted[name]) for name in wanted) / 5
                          if c.merged else 0.3)
    assert search("coefficients", landscape, list(wanted)).candidate == \
        Candidate.merge({name: weight for name, weight in wanted.items() if weight})
    shares = search("coefficients", landscape, list(wanted), rule="interpolate").candidate.weights
    assert "bad" not in shares and sum(shares.values()) == pytest.approx(1)


def test_a_member_that_was_refused_is_tried_again_beside_what_was_kept_after_it():
    """b helps only beside c, and is tried before it."""
    def score(candidate):
        weights = candidate.weights
        if not candidate.merged:
            return {"a": 0.5, "b": 0.4, "c": 0.3}[next(iter(weights))]
        return 0.5 + 0.1 * ("c" in weights) + 0.1 * ({"b", "c"} <= set(weights)) - 0.2 * (set(weights) == {"a", "b"})

    once = search("greedy", Landscape(score), ["a", "b", "c"], sweeps=1)
    twice = search("greedy", Landscape(score), ["a", "b", "c"])
    assert set(once.candidate.weights) == {"a", "c"}
    assert set(twice.candidate.weights) == {"a", "b", "c"} and twice.value > once.value


# -- the paper's procedure, on its table --

def cosines(seed=0):
    """Made-up members as vectors of length 1, [12, 30], all somewhat alike, in the order of the table."""
    vectors = 1 + np.random.default_rng(seed).normal(0, 0.8, (len(SCORES), 30))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def scored(shares):
    """A made-up accuracy of the merge with these shares [12]: the mean of its members', more for variety in its parts.

    That of a merge has steps of a thousandth, so that some candidates are level.
    """
    mixed = shares @ np.array(list(SCORES.values()))
    variety = 1 - shares @ shares
    if variety < 1e-9:
        return float(mixed.mean())
    return round(float(mixed.mean() + 0.05 * variety - 0.04 * shares[list(SCORES).index("pygmalion-2-7b")]), 3)


def published(order, coefficients, vectors):
    """The procedure as it is published, on models and never on weights: (names in the order tried, accepted, model)."""
    names, models = list(SCORES), dict(zip(SCORES, np.eye(len(SCORES)), strict=True))  # a model is its own coordinates
    at, length = vectors.T, np.linalg.norm
    remaining = sorted(names, key=lambda name: -scored(models[name]))
    current = models[remaining.pop(0)]
    best, tried, accepted = scored(current), [], 0
    while remaining:
        if order != "accuracy":
            likeness = [at @ current @ (at @ models[name]) / length(at @ current) for name in remaining]
            pick = np.argmax if order == "similarity" else np.argmin
            remaining.insert(0, remaining.pop(int(pick(likeness))))
        name = remaining.pop(0)
        tried.append(name)
        kept = [k / 10 for k in range(1, 10)] if coefficients == "grid" else [(accepted + 1) / (accepted + 2)]
        model, score = None, -1.0
        for c in kept:
            candidate = c * current + (1 - c) * models[name]
            if scored(candidate) >= score:  # ties go to the larger share of what there is
                model, score = candidate, scored(candidate)
        if score >= best:
            current, best, accepted = model, score, accepted + 1
    return tried, current, best


@pytest.mark.parametrize("order", ["accuracy", "similarity", "dissimilarity"])
@pytest.mark.parametrize("coefficients", ["grid", "average"])
def test_paper_mode_does_what_is_published_and_its_flat_weights_are_the_model_that_was_kept(order, coefficients):
    vectors = cosines()
    names = list(SCORES)
    landscape = Landscape(lambda c: scored(np.array([c.weights.get(name, 0.0) for name in names])))
    found = search("paper", landscape, names, rule="interpolate", order=order, coefficients=coefficients,
                   more={"similarity": vectors @ vectors.T})
    tried, model, best = published(order, coefficients, vectors)
    assert list(dict.fromkeys(row.purpose.split()[0] for row in found.log[12:])) == tried
    assert [found.candidate.weights.get(name, 0.0) for name in names] == pytest.approx(model, abs=1e-12)
    assert 3 < len(found.candidate.names) < 12 and found.value == pytest.approx(best, abs=1e-12)
    assert len(found.log) == 12 + 11 * (9 if coefficients == "grid" else 1)
    assert found.items == len(found.log) * len(TASKS)


def test_the_table_is_ordered_as_its_means():
    assert [100 * np.mean(SCORES[name]) for name in RANKED] == pytest.approx(MEANS, abs=0.0051)
    assert sorted(SCORES, key=lambda name: -np.mean(SCORES[name])) == RANKED


def test_paper_mode_keeps_what_is_level_and_never_asks_about_noise():
    level = Landscape(lambda c: 0.5)
    found = search("paper", level, list("abc"), rule="interpolate", coefficients="average")
    assert found.candidate.weights == pytest.approx(dict.fromkeys("abc", 1 / 3))
    shares = search("paper", level, list("abc"), rule="interpolate").candidate.weights
    assert shares == pytest.approx({"a": 0.81, "b": 0.09, "c": 0.1}) and sum(shares.values()) == pytest.approx(1)


def test_paper_mode_makes_shares_over_a_base_too():
    landscape = Landscape(lambda c: 0.3 + 0.2 * len(c.parts) if c.merged else {"base": 0.4}.get(c.names[0], 0.3))
    found = search("paper", landscape, ["base", "a", "b"], neutral={"base"}, coefficients="average")
    assert found.candidate.weights == pytest.approx({"a": 1 / 3, "b": 1 / 3})  # the base has the third that is left


# -- orders, layer groups, other parameters --

def test_greedy_takes_the_most_or_the_least_similar_to_what_it_has_in_every_round():
    likeness = np.array([[1, 0.9, 0.1, 0.5], [0.9, 1, 0.8, 0.2], [0.1, 0.8, 1, 0.3], [0.5, 0.2, 0.3, 1]])
    landscape = Landscape(lambda c: 0.3 + 0.1 * len(c.parts) if c.merged else {"a": 0.3}.get(c.names[0], 0.2))

    def order(kind):
        found = search("greedy", landscape, list("abcd"), rule="interpolate", order=kind, coefficients="average",
                       more={"similarity": likeness})
        return [row.purpose.split()[0] for row in found.log[4:]]

    assert order("similarity") == ["b", "c", "d"]  # c: (.1 + .8) / 2 before d: (.5 + .2) / 2
    assert order("dissimilarity") == ["c", "d", "b"]  # d: (.5 + .3) / 2 before b: (.9 + .8) / 2


def test_a_search_by_similarity_that_knows_of_none_says_so():
    with pytest.raises(MethodError, match="order of similarity needs to know how similar.*\n.*order: accuracy"):
        search("greedy", Landscape(lambda c: 0.5), ["a", "b"], order="similarity")


def test_joint_gives_each_member_the_layers_in_which_it_is_good():
    def score(candidate):
        if not candidate.merged:
            return 0.3
        first, last, outside = candidate.tables(3)
        return 0.9 - sum(abs(table.get(name, 0) - wanted) for table, name, wanted in
                         [(first, "a", 0.9), (first, "b", 0.0), (last, "a", 0.2), (last, "b", 0.9),
                          (outside, "a", 0.35), (outside, "b", 0.35)]) / 10

    found = search("joint", Landscape(score), ["a", "b"], groups=2, more={"layers": 5})
    assert found.candidate == Candidate.merge([{"a": 0.9}, {"a": 0.2, "b": 0.9}, {"a": 0.35, "b": 0.35}])
    assert found.value == pytest.approx(0.9)
    assert search("joint", Landscape(score), ["a", "b"], groups=1).candidate.groups == 1


def test_layer_groups_that_the_members_do_not_have_are_refused():
    for strategy in ("joint", "evolve"):
        with pytest.raises(MethodError, match="4 blocks of layers.* have 3 layers\n.*groups: 3"):
            search(strategy, Landscape(lambda c: 0.5), ["a", "b"], groups=4, more={"layers": 3})
    with pytest.raises(MethodError, match="no layers that can be told apart"):
        search("joint", Landscape(lambda c: 0.5), ["a", "b"], groups=2)


def test_evolve_finds_weights_and_densities_by_member_and_group():
    def score(candidate):
        if not candidate.merged:
            return 0.1
        far = 0.0
        for group, wanted in enumerate([(0.8, 0.3), (0.2, 0.6), (0.5, 0.5)]):
            told = candidate.arguments(group if candidate.groups > 1 else 0, ["a", "b"])
            far += sum((got - want) ** 2 for got, want in zip(told["weight"], wanted, strict=True))
            far += (told["density"][0] - 0.4) ** 2 + (told["lambda"] - 1.2) ** 2 / 4
        return float(np.exp(-far))

    more = {"layers": 5, "parameters": {"density": True, "lambda": False}}
    ranges = {"density": [0.1, 1.0], "lambda": [0.5, 1.5]}
    found = search("evolve", Landscape(score), ["a", "b"], groups=2, also=ranges, budget=800, more=more)
    assert found.candidate.groups == 3 and found.value > 0.98
    assert len(found.log[2:]) % 12 < 12 and found.log[13].purpose == "generation 1"
    with pytest.raises(MethodError, match="no parameter 'densty'.*did you mean 'density'"):
        search("evolve", Landscape(score), ["a", "b"], also={"densty": [0.1, 1.0]}, more=more)
    with pytest.raises(MethodError, match="'density' cannot be searched from 1 to 0.1"):
        search("evolve", Landscape(score), ["a", "b"], also={"density": [1.0, 0.1]}, more=more)


@pytest.mark.parametrize(("n", "groups", "also", "genes", "popsize"), [
    (12, 1, {}, 12, 11), (12, 1, {"density": [0.01, 1.0]}, 24, 14), (12, 2, {}, 36, 15), (4, 1, {}, 4, 8)])
def test_a_generation_is_as_large_as_in_the_paper_counting_every_gene(n, groups, also, genes, popsize):
    assert popsize == round(4 + 3 * np.log(genes))
    names = [f"m{k:02}" for k in range(n)]
    landscape = Landscape(lambda c: sum(c.weights.values()) / 20)
    search("evolve", landscape, names, groups=groups, also=also, budget=n + 2 * popsize,
           more={"layers": 9, "parameters": {"density": True}})
    assert [len(batch) for batch in landscape.batches] == [n, popsize, popsize]


def test_a_generation_of_less_than_four_is_refused_since_nothing_would_be_learned_from_its_spread():
    with pytest.raises(MethodError, match="'popsize'"):
        search("evolve", Landscape(lambda c: 0.5), ["a", "b"], popsize=3)
    found = search("evolve", Landscape(lambda c: c.weights.get("a", 0) / 2), ["a", "b"], popsize=4, budget=42)
    assert {row.purpose for row in found.log[2:]} == {f"generation {k}" for k in range(1, 11)}


def test_where_weights_are_shares_evolve_makes_those_of_every_group_sum_to_one():
    landscape = Landscape(lambda c: c.weights.get("a", 0) / 2)
    search("evolve", landscape, ["a", "b"], rule="interpolate", groups=2, budget=40, more={"layers": 4})
    for candidate in (c for batch in landscape.batches[1:] for c in batch):
        assert [sum(table.values()) for table in candidate.tables(3)] == pytest.approx([1, 1, 1])
    with pytest.raises(MethodError, match="shares start at 0 or above"):
        search("evolve", landscape, ["a", "b"], rule="interpolate", weight=[-1.0, 1.0])


def test_another_seed_is_another_evolution_and_the_same_seed_the_same():
    def tried(seed, names=("a", "b")):
        landscape = Landscape(lambda c: c.weights.get("a", 0.0) / 2)
        search("evolve", landscape, names, budget=30, more={"seed": seed})
        return landscape.batches[1:]

    assert tried(1) == tried(1) == tried(1, ("b", "a")) != tried(2)


# -- races --

def test_a_race_stops_for_a_member_that_does_harm_after_few_items_and_takes_all_for_one_that_helps():
    def score(candidate):
        if not candidate.merged:
            return {"a": 0.5, "b": 0.4, "bad": 0.3}[candidate.names[0]]
        return 0.5 + 0.3 * candidate.weights.get("b", 0) - 0.3 * candidate.weights.get("bad", 0)

    found = search("racing", Landscape(score), ["a", "b", "bad"])
    cost = {name: sum(row.items for row in found.log if row.purpose.startswith(name)) for name in ("b ", "bad ")}
    assert found.candidate.weights == {"a": 1, "b": 0.95} and cost["bad "] == 4 * 11 and cost["b "] > 40


def test_a_race_of_few_coefficients_has_them_all_at_the_start():
    landscape = Landscape(lambda c: 0.2 * len(c.parts) + 0.1 * (c == single("a")) + 0.1 * c.weights.get("b", 0))
    found = search("racing", landscape, ["a", "b"], coefficients=[0.3, 0.5, 0.9])
    assert found.candidate.weights["b"] == 0.9 and [len(batch) for batch in landscape.batches][:3] == [2, 3, 3]
    found = search("racing", landscape, ["a", "b"], coefficients=[0.4])
    assert found.candidate.weights["b"] == 0.4
