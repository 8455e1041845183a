"""Tasks that lm-eval has itself: our step against lm-eval with its own defaults, item by item, on small data."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glue.evaluate.answered import Answered
from glue.evaluate.lm_eval import _loaded, _run, as_lm, check_named, evaluate_named
from glue.evaluate.suite import points, read_suite, recorded
from glue.evaluate.surroundings import offline, quiet, seeded
from glue.kinds import load
from glue.member import Member, Table
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo
from tests.conftest import WORDS, word_tokenizer
from tests.hub_data import arc, gpqa, gsm8k, keep

SUITE = """tasks:
  arc:   {task: arc_challenge, metric: acc_norm, chance: 0.25, num_fewshot: {dev: 0, test: 3}}
  plain: {task: arc_challenge, metric: acc, chance: 0.25, num_fewshot: {dev: 0, test: 3}}
  sums:  {task: gsm8k, metric: exact_match, filter: flexible-extract, chance: 0.0, num_fewshot: 2}
  hard:  {task: leaderboard_gpqa, metric: acc_norm, chance: 0.25, num_fewshot: 0}
"""
ASKED = {"arc_challenge": 3, "gsm8k": 2, "leaderboard_gpqa": 0}
LEAVES = ["leaderboard_gpqa_diamond", "leaderboard_gpqa_extended", "leaderboard_gpqa_main"]
COMMAND = """
import json
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

known, told = TaskManager(), {{}}
for task, shots in {asked}.items():
    found = simple_evaluate(model="hf", model_args="pretrained={model},dtype=float32", tasks=[task], num_fewshot=shots,
                            batch_size=8, device="cpu", bootstrap_iters=0, task_manager=known)
    told[task] = [found["results"], found["samples"]]
json.dump(told, open("theirs.json", "w"), default=str)
"""


def filled(cache: Path, answers: list[str]) -> Path:
    """A cache with small data for all tasks of the suite."""
    keep(cache, "allenai/ai2_arc", "ARC-Challenge", {"train": arc(9, 40), "validation": arc(4, 60), "test": arc(12)})
    keep(cache, "openai/gsm8k", "main", {"train": gsm8k([str(k) for k in range(9)], 20), "test": gsm8k(answers)})
    for name, size in (("diamond", 3), ("extended", 8), ("main", 5)):
        keep(cache, "Idavidrein/gpqa", f"gpqa_{name}", {"train": gpqa(size, 7 * size)})
    return cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, data for which half of what it writes is right, a recipe, and what lm-eval says by itself."""
    here = tmp_path_factory.mktemp("named")
    torch.set_num_threads(1)  # many small matrices, which threads only wait for each other over
    words = dict(WORDS)
    for word in ("Question:", "Answer:", "(A)", "(B)", "(C)", "(D)", "so", "####", "Choices:", *map(str, range(10))):
        words.setdefault(word, len(words))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=512, initializer_range=0.3)
                         ).save_pretrained(here / "model")
    word_tokenizer(words).save_pretrained(here / "model")
    running = load(Member("m", "model", str(here / "model"), digest="m" * 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", filled(here / "first", ["0"] * 6))
        with quiet(), offline(), seeded():
            wrote = _run(as_lm(running), _loaded("gsm8k", 2))["samples"]["gsm8k"]
    texts = [row["filtered_resps"][0] for row in sorted(wrote, key=lambda row: row["doc_id"])
             if row["filter"] == "flexible-extract"]
    filled(here / "cache", [text if k % 2 else "77" for k, text in enumerate(texts)])
    shutil.copytree(here / "cache", here / "theirs")
    (here / "own.yaml").write_text(SUITE)
    (here / "zoo.yaml").write_text(f"members:\n  m: {{path: {here / 'model'}}}\n")
    (here / "r.yaml").write_text("steps:\n  - {as: s, step: evaluate, members: [m], suite: own.yaml:test}\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "home"),
                   "HF_DATASETS_CACHE": str(here / "theirs"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run([sys.executable, "-P", "-c", COMMAND.format(asked=ASKED, model=here / "model")], cwd=here,
                         env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return here


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(made / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", made / "cache")
    return made


def theirs(here: Path, task: str) -> tuple[dict, dict]:
    """What lm-eval reported when it was asked for one task, and its samples by task, in the order of the documents."""
    results, samples = json.loads((here / "theirs.json").read_text())[task]
    return results, {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in samples.items()}


def test_a_recipe_gives_each_item_what_lm_eval_gives_it(here):
    plan = run(read_recipe(here / "r.yaml"), Zoo(here / "zoo.yaml"), Workers(0))
    table = plan["s"]
    scores = {score.task: score for score in Table.read(table).rows}
    assert list(scores) == ["arc", "plain", "sums", "hard"]
    for name, task, leaves, key in (("arc", "arc_challenge", ["arc_challenge"], "acc_norm,none"),
                                    ("plain", "arc_challenge", ["arc_challenge"], "acc,none"),
                                    ("sums", "gsm8k", ["gsm8k"], "exact_match,flexible-extract"),
                                    ("hard", "leaderboard_gpqa", LEAVES, "acc_norm,none")):
        told, samples = theirs(here, task)
        metric, _, through = key.partition(",")
        rows = [row for leaf in leaves for row in samples[leaf] if row["filter"] == through]
        assert list(scores[name].results) == [float(row[metric]) for row in rows], name
        assert scores[name].value == pytest.approx(told[task][key], abs=1e-12)
        assert 0 < scores[name].value < 1, "results that are all the same would show nothing"
    assert [len(scores[name].results) for name in scores] == [12, 12, 6, 16]
    told = points(recorded(table.origin.params["suite"]), {name: score.value for name, score in scores.items()})
    assert told == pytest.approx(25 * sum(score.value for score in scores.values()))
    store = (here / "zoo/scores.jsonl").read_text()
    run(read_recipe(here / "r.yaml"), Zoo(here / "zoo.yaml"), Workers(0))
    assert (here / "zoo/scores.jsonl").read_text() == store and not (here / "zoo/answered").exists()


def test_the_examples_before_a_question_are_those_that_lm_eval_draws(here):
    with quiet(), offline(), seeded():
        loaded = _loaded("arc_challenge", 3)
        task = loaded["tasks"]["arc_challenge"]
        task.build_all_requests(rank=0, world_size=1, fewshot_as_multiturn=True)
        prompts = list(dict.fromkeys(request.args[0] for request in task.instances))
    rows = theirs(here, "arc_challenge")[1]["arc_challenge"]
    assert prompts == [row["arguments"][0][0] for row in rows] and prompts[0].count("Answer:") == 4


def test_measuring_leaves_the_seeds_alone_whatever_they_are(here):
    member = Member("m", "model", str(here / "model"), digest="m" * 32)
    hard, found = read_suite(here / "own.yaml").named[3:], []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        found.append(evaluate_named(load(member), hard, "test"))
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert found[0] == found[1]


def test_other_rows_under_the_same_names_are_another_plan(here, tmp_path, monkeypatch):
    suite = read_suite(here / "own.yaml")
    first = check_named(suite, "test")
    keys = {make_plan(read_recipe(here / "r.yaml"), Zoo(here / "zoo.yaml")).tasks[0].origin.key}
    cache = tmp_path / "cache"
    filled(cache, ["1"] * 6)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    second = check_named(suite, "test")
    assert {name for name in first if first[name] != second[name]} == {"sums"}
    keys.add(make_plan(read_recipe(here / "r.yaml"), Zoo(here / "zoo.yaml")).tasks[0].origin.key)
    assert len(keys) == 2


def test_what_was_answered_is_not_asked_again_and_the_items_stay_the_same(here, tmp_path):
    running = load(Member("m", "model", str(here / "model"), digest="m" * 32))
    suite, asked, shares = read_suite(here / "own.yaml"), [], []
    forward = running.model.forward
    running.model.forward = lambda *given, **named: asked.append(1) or forward(*given, **named)
    whole = evaluate_named(running, suite.named, "test", answered=Answered(tmp_path / "j.jsonl"), batch_size=4,
                           report=lambda done, total: shares.append(done / total))
    assert shares == sorted(shares) and shares[-1] == 1 and len(set(shares)) > 6
    every, lines = len(asked), (tmp_path / "j.jsonl").read_text().splitlines(True)
    (tmp_path / "half.jsonl").write_text("".join(lines[:-4]) + lines[-4][:30])
    asked.clear()
    again = evaluate_named(running, suite.named, "test", answered=Answered(tmp_path / "half.jsonl"), batch_size=4)
    assert again == whole and len(asked) == 4 < every and len(lines) > 8
