"""The benchmark of racing: which lines it trains, what it calls reached, and what its page says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.zoos.__main__ import main, recipe
from benchmarks.zoos.compare import Compared, Search
from benchmarks.zoos.page import markdown
from glue.evaluate.statistics import Interval
from glue.plan import make_plan
from glue.search.candidate import Candidate
from glue.zoo import Zoo

GRID = Search(Candidate.merge({"tiny_zoo/A-facts": 0.9, "tiny_zoo/A-kind": 1.0}), 1000, 10, 0.7)
RACED = Search(Candidate.merge({"tiny_zoo/A-facts": 0.6, "tiny_zoo/A-kind": 1.0}), 200, 9, 0.69)
LEVEL, BEHIND = Interval(-0.01, -0.03, 0.01), Interval(-0.02, -0.03, -0.01)
ZOO = Compared(4, 8, 1200, GRID, RACED, LEVEL, BEHIND, Interval(0.1, 0.05, 0.15))
MADE = {"cpu": "a processor", "kernel": "6", "python": "3.11", "versions": {"torch": "2"}, "commit": "abc"}


def test_one_family_is_trained_with_its_datasets_and_nothing_else(tmp_path):
    (tmp_path / "zoo.yaml").write_text("members: {}\ninclude: zoo/members.yaml\n")
    plan = make_plan(recipe(3), Zoo(tmp_path / "zoo.yaml"))
    trained = {task.line.name for task in plan if task.step in ("pretrain", "tune", "lora")}
    assert trained == {f"A-{name}" for name in ("base", "facts", "strings", "kind", "trans", "lora", "chat", "noise")}
    assert {task.line.name for task in plan if task.step == "search"} == {"best", "grid", "raced"}
    assert len(plan.tasks) == len(trained) + 16 + 4 and all(task.line.seed == 3 for task in plan)


@pytest.mark.parametrize(("change", "reached"), [
    ({}, True), ({"dev": BEHIND}, False), ({"raced": replace(RACED, answers=201)}, False),
    ({"raced": replace(RACED, candidate=Candidate.merge({"tiny_zoo/A-kind": 1.0}))}, False), ({"test": BEHIND}, True)])
def test_reached_is_the_same_members_no_clear_loss_on_dev_items_and_a_fifth_of_the_answers(change, reached):
    assert replace(ZOO, **change).reached == reached


def test_the_page_counts_and_shows_every_zoo():
    text = markdown([ZOO, replace(ZOO, seed=5, dev=BEHIND)], MADE)
    assert "In **1 of 2** zoos" in text and "The same members: 2; not behind by more than noise on dev items: 1" in text
    assert "| 4 | 1000 | 200 | 20.0% | yes | 70.0 | 69.0 | -1.0 [-3.0, +1.0] | -2.0 [-3.0, -1.0] |" in text
    assert "| 5 | 1 A-kind + 0.9 A-facts, of 10 candidates | 1 A-kind + 0.6 A-facts, of 9 candidates |" in text


def test_words_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["--seeds", "many", "--folder", str(tmp_path)])
