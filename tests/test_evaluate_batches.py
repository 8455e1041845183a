"""Batches whose size is found out: what fits is kept, what does not is cut in two, and a resume cuts the same way."""

from __future__ import annotations

import inspect
import json
import random

import pytest
import torch

from glue.errors import MethodError, SuiteError
from glue.evaluate.answered import Answered
from glue.evaluate.fast import prepare, score
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Suite, Task, task_items, write_tasks
from glue.kinds import load
from glue.kinds.batches import CPU_ROWS, MOST_ROWS, TOKENS, Cutter
from glue.kinds.device import device_of
from glue.member import Table
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.run import Watcher, run
from glue.workers import Workers
from glue.zoo import Zoo

SUITE = Suite("own", (Task("chosen", "asked", "choice", "acc", 0.3),
                      Task("written", "asked", "generate", "exact_match", 0.0, max_tokens=3)))
LINES = """tasks:
  chosen:  {data: asked, output: choice, metric: acc, chance: 0.3}
  written: {data: asked, output: generate, metric: exact_match, chance: 0.0, max_tokens: 3}
"""


@pytest.fixture
def data(tmp_path):
    """150 questions of several lengths, each of its own."""
    rng, lines = random.Random(0), []
    for k in range(150):
        choices = [" ".join(f"w{n}" for n in rng.sample(range(3, 40), size)) for size in (1, 2, 3)]
        question = " ".join(f"w{n}" for n in [3 + k % 37, 3 + k // 37, *rng.sample(range(3, 40), rng.randrange(1, 9))])
        lines.append({"question": question, "choices": choices, "gold": k % 3, "answer": choices[k % 3]})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


class Small:
    """A model's forward that has memory for so many rows; counts the rows of each call."""

    def __init__(self, model, rows: int):
        self.inner, self.rows, self.calls = model.forward, rows, []
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *given, **named):
        ids = given[0] if given else named["input_ids"]
        if len(ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory (as told)")
        self.calls.append(len(ids))
        return self.inner(*given, **named)


# -- cutting --

def test_auto_takes_many_rows_of_what_is_short_and_few_of_what_is_long():
    inputs = [(k,) * length for k, length in enumerate([10] * 100 + [3000] * 30)]
    sizes = [len(batch) for batch in Cutter.of("auto", "cpu").cut(inputs, range(130))]
    assert TOKENS // 3000 == 21 and sizes == [21, 21, 64, 24] and CPU_ROWS == 64
    assert len(Cutter.of("auto", "cuda").cut([(k,) for k in range(999)], range(999))[0]) == MOST_ROWS == 256
    assert [len(batch) for batch in Cutter.of("auto", "cpu").cut(inputs, range(130), 1)] == [10, 10, 10, 32, 32, 32, 4]
    assert len(Cutter.of("auto", "cpu").cut(inputs, range(100), 0, 2 * TOKENS)) == 100, "one fits always"
    assert [len(batch) for batch in Cutter.of(50, "cuda").cut(inputs, range(130), 3)] == [50, 50, 30], "as it is told"


def test_batches_go_from_long_to_short_and_keep_equal_inputs_together():
    inputs = [(1,), (2, 2), (1,), (3, 3, 3), (2, 2), (4,)]
    assert Cutter(2).cut(inputs, range(6)) == [[3, 1, 4], [0, 2, 5]]
    assert Cutter(1).cut(inputs, [0, 3]) == [[3], [0]]


# -- memory that does not suffice --

def asked(running, folder, data, answered=None, **more):
    return evaluate(running, folder, write_tasks(SUITE, "test", {"asked": data}, folder), answered=answered, **more)


@pytest.mark.parametrize("rows, halved", [(64, 0), (32, 1), (20, 2), (1, 6)])
def test_what_does_not_fit_is_halved_and_the_scores_are_those_of_a_large_memory(tiny, tmp_path, data, rows, halved):
    running = load(tiny("m"))
    calm = asked(running, tmp_path / "tasks", data)
    running.model.forward = small = Small(running.model, rows)
    answered = Answered(tmp_path / "j.jsonl")
    assert asked(running, tmp_path / "tasks", data, answered) == calm
    assert answered.halved == halved and max(small.calls) <= rows
    lines = map(json.loads, (tmp_path / "j.jsonl").read_text().splitlines())
    assert sum(line["answers"] is None for line in lines) == halved


def test_a_resume_on_a_larger_memory_cuts_as_the_first_run_did_and_asks_nothing_twice(tiny, tmp_path, data):
    running = load(tiny("m"))
    running.model.forward = Small(running.model, 20)
    whole = asked(running, tmp_path / "tasks", data, Answered(tmp_path / "j.jsonl"))
    lines = (tmp_path / "j.jsonl").read_text().splitlines(True)
    (tmp_path / "half.jsonl").write_text("".join(lines[:len(lines) // 2]))
    running.model.forward = large = Small(load(tiny("m")).model, 10**6)
    assert asked(running, tmp_path / "tasks", data, Answered(tmp_path / "half.jsonl")) == whole
    assert (tmp_path / "half.jsonl").read_text() == "".join(lines) and max(large.calls) <= 16
    large.calls.clear()
    assert asked(running, tmp_path / "tasks", data, Answered(tmp_path / "j.jsonl")) == whole and large.calls == []


def test_a_number_that_is_too_large_and_a_question_that_never_fits_are_refused(tiny, tmp_path, data):
    running = load(tiny("m"))
    running.model.forward = Small(running.model, 20)
    with pytest.raises(SuiteError, match="too much for the memory of the device(?s:.*)batch_size: auto"):
        asked(running, tmp_path / "tasks", data, batch_size=64)
    assert asked(running, tmp_path / "tasks", data, batch_size=20)
    running.model.forward = Small(running.model, 0)
    journal = Answered(tmp_path / "j.jsonl")
    with pytest.raises(SuiteError, match="3 requests at once|1 requests at once"):
        asked(running, tmp_path / "tasks", data, journal)


@pytest.mark.parametrize("rows", [64, 20, 1])
def test_the_scorer_of_a_search_halves_too_and_loses_nothing(tiny, data, rows):
    running = load(tiny("m"))
    items = {task.name: task_items(task, data, "test") for task in SUITE.tasks}
    prepared = prepare(running.tokenizer, SUITE.tasks, items)
    calm = {name: some.tolist() for name, some in score(running, prepared).items()}
    running.model.forward = small = Small(running.model, rows)
    assert {name: some.tolist() for name, some in score(running, prepared).items()} == calm
    assert max(small.calls) <= rows
    running.model.forward = Small(running.model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        score(running, prepared)


# -- progress, devices --

def test_progress_counts_what_is_answered_and_nothing_is_left_behind(tiny, tmp_path, data):
    (tmp_path / "zoo.yaml").write_text(f"members:\n  m: {{path: {tiny('m').path}}}\n  n: {{path: "
                                       f"{tiny('n', seed=1).path}}}\n  asked: {{path: {data}, kind: dataset}}\n")
    (tmp_path / "own.yaml").write_text(LINES)
    (tmp_path / "r.yaml").write_text("steps:\n  - {as: s, step: evaluate, members: [m, n], suite: own.yaml:test}\n")
    seen = []

    class Watched(Watcher):
        def progress(self, task, done, total, note):
            seen.append((done, total, note))

    table = run(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"), Workers(0), Watched())["s"]
    done = [share for share, _, _ in seen]
    assert len(Table.read(table).rows) == 4 and not (tmp_path / "zoo/answered").exists()
    assert {total for _, total, _ in seen} == {2000} and done == sorted(done) and done[-1] == 2000
    assert len({share for share in done if 0 < share < 1000}) > 5, "it moves within a member"
    assert {note for _, _, note in seen} == {"members", "m", "n"}
    assert make_plan(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml")).done


def test_auto_is_the_processor_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert device_of("auto") == device_of("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert device_of("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("cuda:0") == "cuda:0" and device_of("cuda") == "cuda"
    for word, why in (("cuda:1", "torch finds 1 CUDA devices"), ("gpu", "Expected one of")):
        with pytest.raises(MethodError, match=f"'{word}' cannot be calculated on: .*{why}"):
            device_of(word)
