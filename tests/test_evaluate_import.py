"""Outputs of lm-eval's own command become scores with the same numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glue.errors import SuiteError
from glue.evaluate.imported import add_scores, read, scores
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Suite, Task, write_tasks
from glue.kinds import load
from glue.member import Member, Score

SUITE = Suite("mine", (Task("two", "asked", "choice", "acc", 0.5), Task("norm", "asked", "choice", "acc_norm", 0.5),
                       Task("said", "asked", "generate", "exact_match", 0.0, max_tokens=2)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder that lm-eval's command wrote, results of the same model here by task); done once, since it is slow."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import WORDS, word_tokenizer

    here = tmp_path_factory.mktemp("imported")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3)
                     ).save_pretrained(here / "model")
    word_tokenizer(WORDS).save_pretrained(here / "model")
    rng, lines = random.Random(1), []
    for k in range(30):
        choices = [" ".join(f"w{n}" for n in rng.sample(range(3, 40), size)) for size in (1, 2)]
        lines.append({"question": f"w{3 + k} w{3 + k % 7}", "choices": choices, "gold": k % 2,
                      "answer": choices[k % 2]})
    (here / "data").mkdir()
    (here / "data/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = write_tasks(SUITE, "test", {"asked": here / "data"}, here / "tasks")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "home"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args",
         f"pretrained={here / 'model'},dtype=float32", "--include_path", str(here / "tasks"), "--tasks",
         ",".join(names), "--device", "cpu", "--batch_size", "64", "--log_samples", "--output_path", str(here / "out")],
        cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    running = load(Member("m", "model", str(here / "model"), digest="m" * 32))
    return here / "out", evaluate(running, here / "tasks", names)


@pytest.fixture
def out(made, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(made[0], tmp_path / "out"))


def one(out: Path, pattern: str) -> Path:
    file, = out.rglob(pattern)
    return file


def test_values_stderrs_and_items_are_those_of_lm_evals_command(made):
    out, ours = made
    found, told = read(out), json.loads(one(out, "results_*.json").read_text())
    assert [(m.task, m.metric) for m in found.measures] == [
        ("glue_mine_test_two", "acc"), ("glue_mine_test_norm", "acc_norm"), ("glue_mine_test_said", "exact_match")]
    for measure in found.measures:
        row, key = told["results"][measure.task], f"{measure.metric},{measure.filter}"
        assert measure.value == row[key] == np.mean(measure.items)
        assert measure.stderr == row[key.replace(",", "_stderr,")]
        assert measure.stderr == pytest.approx(np.std(measure.items, ddof=1) / np.sqrt(30), abs=1e-12)
        assert list(measure.items) == ours[measure.task] and measure.shots == 0 and measure.version == "1"
        assert measure.chance == (0.5 if measure.metric != "exact_match" else 0)
    assert found.versions["lm_eval"] == told["lm_eval_version"] and found.model_args["dtype"] == "float32"
    assert 0 < found.measures[0].value < 1 and found.measures[0].split == found.measures[1].split


def test_scores_are_added_once_and_read_back_as_they_were(made, tmp_path):
    member, store = Member("m", "model", "/nowhere", digest="m" * 32), tmp_path / "zoo/scores.jsonl"
    for _ in range(2):
        added, left = add_scores(made[0], member, store)
        assert left == [] and added == scores(read(made[0]), member)
    lines = store.read_text().splitlines()
    assert [Score.from_dict(json.loads(line)) for line in lines] == added and len(lines) == 3
    other, _ = add_scores(made[0], Member("n", "model", "/nowhere", digest="n" * 32), store)
    assert len(store.read_text().splitlines()) == 6 and other[0].split == added[0].split


def test_the_newest_run_counts_and_two_models_are_refused(out):
    results, samples = one(out, "results_*.json"), list(out.rglob("samples_*"))
    stamp = results.stem.removeprefix("results_")
    for file in (results, *samples):
        shutil.copy(file, file.with_name(file.name.replace(stamp, "2020-01-01T00-00-00.000001")))
    assert read(out).file == results and read(results.parent).file == results
    shutil.copytree(results.parent, out / "other")
    with pytest.raises(SuiteError, match="(?s)has results of 2 models.*name one of them"):
        read(out)


def test_a_metric_that_is_no_mean_over_items_is_told_and_makes_no_score(out, tmp_path):
    file = one(out, "results_*.json")
    told = json.loads(file.read_text())
    told["results"]["glue_mine_test_two"]["perplexity,none"] = 12.5
    file.write_text(json.dumps(told))
    made, left = add_scores(out, Member("m", "model", "/nowhere", digest="m"), tmp_path / "scores.jsonl")
    assert len(made) == 3 and left == ["glue_mine_test_two perplexity"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def without_a_line(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(True)[:-1]))


def with_a_line_twice(file: Path) -> None:
    lines = file.read_text().splitlines(True)
    file.write_text("".join([*lines[:-1], lines[0]]))


def other_results(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "acc": 0.0}) + "\n" for row in rows))


@pytest.mark.parametrize("damage, pattern, words", [
    (Path.unlink, "results_*", "there is no results_<time>.json"),
    (cut, "results_*", "results_.*:1:1: this is not JSON"),
    (lambda file: file.write_text("{}"), "results_*", "it has no 'results'"),
    (lambda file: file.write_text('{"results": {}}'), "results_*", "does not say 'configs'"),
    (Path.unlink, "samples_*_two_*", "task 'glue_mine_test_two' has results but no items(?s:.*)--log_samples"),
    (cut, "samples_*_two_*", "samples_.*:30:1: this is not JSON"),
    (without_a_line, "samples_*_two_*", "has 29 items with filter 'none', and its results are of 30"),
    (with_a_line_twice, "samples_*_two_*", ":30:1: document 0 stands twice"),
    (lambda file: file.write_text('{"doc_id": 0}\n'), "samples_*_two_*", "an item does not say 'doc_hash'"),
    (other_results, "samples_*_two_*", "acc of task 'glue_mine_test_two' is 0.* in the results, .*whose mean is 0"),
])
def test_a_damaged_output_gets_one_clear_error(out, tmp_path, damage, pattern, words):
    damage(one(out, pattern))
    with pytest.raises(SuiteError, match=words):
        add_scores(out, Member("m", "model", "/nowhere", digest="m"), tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists(), "all or nothing"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SuiteError, match="there is no folder"):
        read(tmp_path / "nothing")
