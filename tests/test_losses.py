"""Losses: how surprised a member is by right answers, beside tables and on boards."""

from __future__ import annotations

import json
import random
from math import log

import numpy as np
import pytest
import torch

from glue.board import leaderboard
from glue.errors import SuiteError
from glue.evaluate.fast import losses
from glue.evaluate.statistics import unbounded
from glue.evaluate.suite import Item, Task
from glue.kinds import load
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.report.markdown import markdown
from glue.run import run
from glue.steps.evaluate import LOSS_NOTE
from glue.workers import Workers
from glue.zoo import Zoo


def items(count: int = 9) -> list[Item]:
    rng, found = random.Random(0), []
    for k in range(count):
        answer = " ".join(f"w{n}" for n in rng.sample(range(3, 20), 1 + k % 3))
        found.append(Item(f"w{3 + k} w{4 + k % 5}", (answer, "w30"), 0, answer))
    return found


def test_a_loss_is_what_the_model_itself_gives_the_answer_counted_in_bits_a_byte(tiny):
    running, asked = load(tiny("m")), items()
    for task in (Task("t", "d", "choice", "acc", 0.5), Task("t", "d", "generate", "exact_match", 0.0, max_tokens=4)):
        found = losses(running, [task], {"t": asked}, batch_size=4)["t"]
        for item, loss in zip(asked, found, strict=True):
            ids = running.tokenizer(f"{item.question} {item.answer}", return_tensors="pt").input_ids
            before = len(running.tokenizer(item.question).input_ids)
            with torch.inference_mode():
                logs = running.model(ids).logits.log_softmax(-1)[0]
            told = -sum(float(logs[k - 1, ids[0, k]]) for k in range(before, ids.shape[1]))
            assert loss == pytest.approx(told / log(2) / len(f" {item.answer}".encode()), rel=1e-4)


def test_the_interval_of_a_mean_of_losses_covers_it_as_often_as_it_says():
    rng, truth = np.random.default_rng(0), (2.0 + 3.0) / 2
    found = [unbounded({"a": rng.exponential(2.0, 100), "b": rng.exponential(3.0, 200)}) for _ in range(1000)]
    assert 0.93 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.97
    with pytest.raises(SuiteError, match="two items"):
        unbounded({"a": np.array([1.0])})


def test_losses_stand_beside_the_table_and_on_the_board_and_are_no_part_of_the_table(tiny, tmp_path):
    member, folder = tiny("m"), tmp_path / "asked"
    folder.mkdir()
    for split in ("dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(item._asdict()) + "\n" for item in items()))
    (tmp_path / "zoo.yaml").write_text(f"members:\n  m: {{path: {member.path}}}\n"
                                       f"  asked: {{path: {folder}, kind: dataset}}\n")
    (tmp_path / "own.yaml").write_text("tasks:\n  things: {data: asked, output: choice, metric: acc, chance: 0.5}\n")
    digests = set()
    for name, more in (("plain", ""), ("lost", ", loss: true")):
        (tmp_path / f"{name}.yaml").write_text(
            f"steps:\n  - {{as: scored, step: evaluate, members: [m], suite: own.yaml:test{more}}}\n"
            "board: {table: scored}\n")
        zoo, recipe = Zoo(tmp_path / "zoo.yaml"), read_recipe(tmp_path / f"{name}.yaml")
        run(recipe, zoo, Workers(0))
        plan = make_plan(recipe, Zoo(tmp_path / "zoo.yaml"))
        board = leaderboard(plan)
        assert ("| bits a byte |" in "\n".join(markdown(board))) == (name == "lost")
        digests.add(plan["scored"].digest)
    assert len(digests) == 1
    told = json.loads((plan["scored"].folder / LOSS_NOTE).read_text())
    own = losses(load(member), [Task("things", "asked", "choice", "acc", 0.5)], {"things": items()})
    assert next(iter(told.values())) == {"things": own["things"].tolist()}
    assert board.rows[0].loss == unbounded(own)
