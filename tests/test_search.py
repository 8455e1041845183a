"""The space of candidates, and what each strategy does in it."""

from __future__ import annotations

import numpy as np
import pytest

from glue.errors import MethodError
from glue.search import searching
from glue.search.space import Candidate, Gain, Space

TASKS = np.repeat([0, 1], [30, 10])
SCORES = {  # published accuracies: mmlu_tiny, gsm8k, humanevalsynthesize-js, mbpp, arc_challenge, winogrande
    "Platypus2": (0.498219627, 0.025018954, 0.146341463, 0.19, 0.551194539, 0.740331492),
    "vicuna": (0.497792337, 0.191053829, 0.195121951, 0.06, 0.537542662, 0.705603788),
    "MetaMath": (0.4158, 0.5906, 0.012195122, 0.014, 0.4735, 0.7024),
    "Llama-2-chat": (0.472795898, 0.230477635, 0.134146341, 0.17, 0.540955631, 0.712707182),
    "pygmalion": (0.4838, 0.172858226, 0.152439024, 0.192, 0.540955631, 0.7537),
    "OpenHermes": (0.478350662, 0.092494314, 0.195121951, 0.228, 0.563993174, 0.73875296),
    "evolcodealpaca": (0.417, 0.0902, 0.317073171, 0.256, 0.4957, 0.7245),
    "Synthia": (0.481840194, 0.240333586, 0.134146341, 0.178, 0.550341297, 0.737174428),
    "WikiChat": (0.391326022, 0, 0.042682927, 0.138, 0.509385666, 0.685872139),
    "Llama-2-ko-Chat": (0.304158952, 0.031842305, 0.018292683, 0.006, 0.401023891, 0.65035517),
    "dolphin": (0.465247116, 0.106899166, 0.024390244, 0.008, 0.42662116, 0.653512234),
    "BeingWell": (0.461900014, 0.222896133, 0.134146341, 0.134, 0.549488055, 0.72296764)}
RANKED = ["Synthia", "evolcodealpaca", "OpenHermes", "pygmalion", "Llama-2-chat", "BeingWell", "MetaMath", "vicuna",
          "Platypus2", "WikiChat", "dolphin", "Llama-2-ko-Chat"]


class Landscape:
    """Scores by a function of the candidate; every item of both tasks gets the same, and batches are remembered."""

    def __init__(self, score):
        self.score, self.batches = score, []

    def __call__(self, batch):
        self.batches.append(list(batch))
        return [np.full(len(TASKS), self.score(candidate)) for candidate in batch]

    def space(self, names, rule="add", budget=1000, neutral=()):
        return Space(names, self, TASKS, rule=rule, budget=budget, neutral=frozenset(neutral))


def search(strategy, landscape, names, *, rule="add", budget=1000, neutral=(), **params):
    return searching[strategy].bind(params)(landscape.space(names, rule, budget, neutral))


def table(better_by=0.0):
    """The twelve as they are from the table; merges score this much more than the best of them, by each member."""
    best = np.mean(SCORES["Synthia"])
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


# -- strategies --

def test_best_is_the_best_and_the_first_by_name_where_equal():
    assert search("best", table(), list(SCORES)).candidate == single("Synthia")
    assert search("best", Landscape(lambda c: 0.5), ["c", "b", "a"]).candidate == single("a")


def test_greedy_goes_by_accuracy():
    found = search("greedy", table(better_by=0.01), list(SCORES), rule="interpolate", coefficients="average")
    joined = [row.purpose.split()[0] for row in found.log[12:]]
    assert joined == RANKED[1:] and found.candidate.weights == pytest.approx(dict.fromkeys(RANKED, 1 / 12))


def test_greedy_in_the_given_order_still_starts_from_the_best():
    found = search("greedy", table(better_by=0.01), list(SCORES), rule="interpolate", coefficients="average",
                   order="given")
    assert [row.purpose.split()[0] for row in found.log[12:]] == [name for name in SCORES if name != "Synthia"]
    assert found.log[12].purpose.endswith("joins Synthia")


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
    assert merges[0] == Candidate.merge({"Synthia": 0.5, "evolcodealpaca": 0.5}) and len(merges) == 11
    assert merges[1].weights == pytest.approx({"Synthia": 1 / 3, "evolcodealpaca": 1 / 3, "OpenHermes": 1 / 3})


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
