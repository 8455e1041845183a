"""The table that the authors of Model-GLUE published: what it holds, and the order of members that follows from it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from glue.search import searching
from glue.search.candidate import Candidate
from glue.search.space import Space
from glue.zoo import Zoo

ROOT = Path(__file__).parents[1]
ROWS = {row.pop("model_name"): {task: float(share) for task, share in row.items()}
        for row in csv.DictReader((ROOT / "benchmarks/paper/model_glue_scores.csv").open())}
QUESTIONS = {"mmlu_tiny": 14042, "gsm8k": 1319, "humanevalsynthesize-js": 164, "mbpp": 500, "arc_challenge": 1172,
             "winogrande": 1267}
ROUNDED = {"meta-math/MetaMath-7B-V1.0", "neuralmagic/Llama-2-7b-evolcodealpaca", "PygmalionAI/pygmalion-2-7b"}
MEANS = {name: float(np.mean(list(row.values()))) for name, row in ROWS.items()}
ORDER = sorted(MEANS, key=lambda name: -MEANS[name])
TASKS = np.arange(6)  # one item a task: a share of it is what was scored


def tagged(tag: str) -> set[str]:
    """The repositories of a zoo of the paper."""
    return {member.path.removeprefix("hub:") for member in Zoo(ROOT / "zoo.yaml").select(f"tag:{tag}")}


def asked(gain) -> tuple[list[str], Candidate]:
    """The published greedy search on the table: (who is tried, in order; what is kept). gain(names) is added to a
    merge's mean of its members."""
    def results(batch):
        return [np.mean([list(ROWS[name].values()) for name in c.names], axis=0) + (gain(c.names) if c.merged else 0)
                for c in batch]

    space = Space(list(ROWS), results, TASKS, rule="interpolate", budget=1000, neutral=frozenset())
    found = searching["paper"].bind({"order": "accuracy", "coefficients": "average"})(space)
    return [row.purpose.split()[0] for row in found.log[len(ROWS):]], found.candidate


def test_twelve_models_were_asked_six_benchmarks_each():
    assert len(ROWS) == 12 and all(set(row) == set(QUESTIONS) for row in ROWS.values())
    assert all(0 <= share < 1 for row in ROWS.values() for share in row.values())


def test_scores_are_fractions_of_whole_benchmarks_where_they_were_not_rounded():
    for name in set(ROWS) - ROUNDED:
        for task, n in QUESTIONS.items():
            right = ROWS[name][task] * n
            assert right == pytest.approx(round(right), abs=1e-4), (name, task)


def test_the_table_is_one_model_short_of_the_zoo_and_has_one_that_is_not_in_it():
    assert tagged("which12") - set(ROWS) == {"GOAT-AI/GOAT-7B-Community"}
    assert set(ROWS) - tagged("which16") == {"kfkas/Llama-2-ko-7b-Chat"}


def test_the_zoo_of_eight_is_the_best_eight_of_the_table():
    assert set(ORDER[:8]) == tagged("which8")
    assert ORDER[0] == "migtissera/Synthia-7B-v1.2" and 100 * MEANS[ORDER[0]] == pytest.approx(38.70, abs=0.005)


def test_no_model_leads_on_every_benchmark():
    best = {task: max(ROWS, key=lambda name: ROWS[name][task]) for task in QUESTIONS}
    assert len(set(best.values())) == 5
    assert best["gsm8k"] == "meta-math/MetaMath-7B-V1.0"
    assert best["humanevalsynthesize-js"] == best["mbpp"] == "neuralmagic/Llama-2-7b-evolcodealpaca"


def test_the_published_search_goes_through_the_table_from_the_best_down():
    tried, kept = asked(lambda names: 0.02 * len(names))  # every merge is welcome
    assert tried == ORDER[1:] and kept.weights == pytest.approx(dict.fromkeys(ORDER, 1 / 12))


def test_where_merging_gains_nothing_by_itself_the_published_search_keeps_the_best_alone():
    tried, kept = asked(lambda names: 0.0)
    assert tried == ORDER[1:] and kept == Candidate.single(ORDER[0])


def test_a_gain_that_does_not_grow_with_members_admits_one_partner_and_no_more():
    tried, kept = asked(lambda names: 0.01)  # a point for any merge; each further member is a worse one
    assert tried == ORDER[1:] and kept.weights == pytest.approx({ORDER[0]: 0.5, ORDER[1]: 0.5})


def test_a_gain_by_each_member_stops_where_the_fall_in_the_mean_is_steeper():
    def mean(k: int) -> float:
        return float(np.mean([MEANS[name] for name in ORDER[:k]]))

    tried, kept = asked(lambda names: 0.005 * len(names))
    falls = [mean(k) - mean(k + 1) for k in range(1, 12)]
    assert max(falls[:8]) < 0.005 < min(falls[8:]) and tried == ORDER[1:]
    assert kept.weights == pytest.approx(dict.fromkeys(ORDER[:9], 1 / 9))  # the three that are far behind stay out
