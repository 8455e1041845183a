"""The fast scorer against lm-eval, item by item, on every suite of the repository whose data are made here."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glue.evaluate.fast import _Reader, prepare, score
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import read_suite, task_items, write_tasks
from glue.family import families
from glue.kinds import Running
from glue.member import Member
from glue.skills import write_dataset
from tests.conftest import word_tokenizer

SUITES = Path(__file__).parents[2] / "benchmarks/suites"


@pytest.fixture(scope="module", params=["tiny", "mini"])
def asked(request, tmp_path_factory):
    """(suite, dataset folders, items, a tokenizer of its words)."""
    suite, here = read_suite(SUITES / f"{request.param}.yaml"), tmp_path_factory.mktemp(request.param)
    folders = {}
    for task in suite.tasks:
        folders[task.data] = here / task.name
        folders[task.data].mkdir()
        write_dataset(folders[task.data], families("teaching")[task.name].bind(), train=0, dev=0, test=40, seed=3,
                      shuffle_answers=False)
    items = {task.name: task_items(task, folders[task.data], "test") for task in suite.tasks}
    told = [f"{item.question} {item.answer} {' '.join(item.choices)}" for some in items.values() for item in some]
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *" ".join(told).split()])
    return suite, folders, items, word_tokenizer({word: k for k, word in enumerate(words)}), here


def trained(asked, steps: int) -> Running:
    """A small Llama that learns the questions for some steps, so that some of what it says is right."""
    suite, _, items, tokenizer, _ = asked
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2))
        rows = [tokenizer(f"{item.question} {item.answer}")["input_ids"] + [2] for some in items.values()
                for item in some]
        tokens = torch.tensor([row + [2] * (64 - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (64 - len(row)) for row in rows])
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(steps):
            some = torch.randint(len(tokens), (64,))
            optimizer.zero_grad()
            model(tokens[some], labels=labels[some]).loss.backward()
            optimizer.step()
    return Running(Member("m", "model", "/nowhere"), model.eval(), tokenizer)


@pytest.mark.parametrize("steps", [0, 30])
def test_every_item_of_the_suites_gets_what_lm_eval_gives_it(asked, steps):
    suite, folders, items, tokenizer, here = asked
    running = trained(asked, steps)
    names = write_tasks(suite, "test", folders, here / "tasks")
    fast, theirs = score(running, prepare(tokenizer, suite.tasks, items)), evaluate(running, here / "tasks", names)
    for task, name in zip(suite.tasks, names, strict=True):
        assert fast[task.name].tolist() == theirs[name], task.name
        assert len(theirs[name]) == 40 and (not steps or np.mean(theirs[name]) > 0), task.name


def test_a_question_is_read_once_for_all_of_its_choices_and_they_are_as_likely_as_apart(asked, monkeypatch):
    suite, _, items, tokenizer, _ = asked
    running, prepared = trained(asked, 10), prepare(tokenizer, suite.tasks, items)
    read, forward = [], running.model.forward

    def counted(input_ids, **more):
        read.append(input_ids.numel())
        return forward(input_ids, **more)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(running.model, "forward", counted)
    choices = [row for row in prepared.rows if row.lasts]
    together = _Reader(running, 64).judge(choices)
    tokens = sum(read)
    read.clear()
    monkeypatch.setattr("glue.evaluate.fast.SHARED", 10**9)
    apart = _Reader(running, 64).judge(choices)
    assert tokens < 0.8 * sum(read)
    for one, other in zip(together, apart, strict=True):
        assert np.allclose(one, other, atol=2e-5)


def test_shared_questions_agree_with_one_answer_at_a_time_in_double_precision(asked):
    suite, _, items, tokenizer, _ = asked
    running, prepared = trained(asked, 10), prepare(tokenizer, suite.tasks, items)
    running.model.double()
    choices = [row for row in prepared.rows if row.lasts][:60]
    for row, found in zip(choices, _Reader(running, 7).judge(choices), strict=True):
        for last, value in zip(row.lasts, found, strict=True):
            tokens = torch.tensor([*row.context, *row.tail, last])
            with torch.no_grad():
                logs = running.model(tokens[None]).logits[0].log_softmax(-1)
            told = sum(float(logs[k - 1, tokens[k]]) for k in range(len(row.context), len(tokens)))
            assert value == pytest.approx(told, abs=1e-5)  # sums are in fp32, as lm-eval's
