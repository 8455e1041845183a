"""Suites that name lm-eval's own tasks: their grammar, what is checked without a network, and the way to scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from glue.errors import GlueError, SuiteError
from glue.evaluate import cached, lm_eval
from glue.evaluate.imported import read
from glue.evaluate.suite import Named, Suite, as_told, points, read_suite, recorded, weights
from glue.member import Table
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo
from tests.hub_data import arc, keep

SUITES = Path(__file__).parents[1] / "benchmarks/suites"
SHIPPED = ("model_glue", "open_llm_v1", "open_llm_v2", "mergebench")
ARC = Named("arc", "arc_challenge", "acc_norm", 0.25, {"dev": 0, "test": 3})


def suite_of(text: str, folder: Path) -> Suite:
    (folder / "own.yaml").write_text(text)
    return read_suite(folder / "own.yaml")


def test_local_and_named_tasks_stand_side_by_side(tmp_path):
    suite = suite_of("tasks:\n"
                     "  arc: {task: arc_challenge, metric: acc_norm, chance: 0.25, num_fewshot: {dev: 0, test: 3}}\n"
                     "  kind: {data: d, output: choice, metric: acc, chance: 0.25}\n"
                     "  g: {task: gsm8k, metric: exact_match, filter: strict-match, chance: 0.0, num_fewshot: 5}\n",
                     tmp_path)
    assert [task.name for task in suite.tasks] == ["kind"] and suite.named == (
        ARC, Named("g", "gsm8k", "exact_match", 0.0, {"dev": 5, "test": 5}, "strict-match"))


LINE = "tasks:\n  arc: {task: arc_challenge, metric: acc_norm, chance: 0.25, num_fewshot: 25"


@pytest.mark.parametrize("text, place, words", [
    (LINE + ", filtre: none}\n", "2:79", "no key 'filtre'; did you mean 'filter'?"),
    (LINE.replace("num_fewshot: 25", "under: x") + "}\n", "2:3", "does not say 'num_fewshot'"),
    (LINE + ", data: d}\n", "2:79", "no key 'data'"),
    (LINE.replace("t: 25", "t: -1") + "}\n", "2:62", "dev of task 'arc' is -1: input should be greater"),
    (LINE.replace("t: 25", "t: {dev: 0}") + "}\n", "2:62", "task 'arc' does not say 'test'"),
    (LINE.replace("t: 25", "t: many") + "}\n", "2:62", "num_fewshot of task 'arc' is 'many'"),
    (LINE.replace("arc_challenge", "'a b'") + "}\n", "2:9", "task of task 'arc' is 'a b'"),
    ("normalised: 3\n" + LINE + "}\n", "1:1", "'normalised' is true or false, not 3"),
])
def test_a_mistake_in_a_named_task_has_its_place(tmp_path, text, place, words):
    with pytest.raises(SuiteError) as wrong:
        suite_of(text, tmp_path)
    assert words in str(wrong.value) and str(wrong.value).startswith(f"{tmp_path}/own.yaml:{place}: ")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_suites_name_what_lm_eval_has_and_missing_data_are_told(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(SuiteError, match=f"the data of suite '{name}' are not on this machine") as missing:
        lm_eval.check_named(read_suite(SUITES / f"{name}.yaml"), "test")
    whole = {"mergebench": ["alexandrainst/m_mmlu (fr, es, de and 1 more)", "evalplus/mbppplus", "google/IFEval",
                            "the metric code_eval", "evaluate.load('code_eval')"],
             "model_glue": ["allenai/ai2_arc (ARC-Challenge)",
                            "cais/mmlu (abstract_algebra, anatomy, astronomy and 54 more)",
                            "load_dataset('openai/openai_humaneval')"],
             "open_llm_v1": ["Rowan/hellaswag", "openai/gsm8k (main)"],
             "open_llm_v2": ["SaylorTwift/bbh (boolean_expressions, causal_judgement, date_understanding and 21 more)",
                             "TIGER-Lab/MMLU-Pro"]}
    for words in (*whole[name], str(tmp_path), "from datasets import load_dataset"):
        assert words in str(missing.value)


@pytest.mark.parametrize("task, words", [
    (Named("a", "arc_chalenge", "acc", 0.25, {}), "lm-eval has no 'arc_chalenge'; did you mean 'arc_challenge'?"),
    (Named("a", "arc_challenge", "acc_nrom", 0.25, {}), "no 'acc_nrom,none'; did you mean 'acc_norm,none'?"),
    (Named("a", "gsm8k", "exact_match", 0.0, {}), "it reports exact_match,strict-match, exact_match,flexible-extract"),
    (Named("a", "mmlu", "acc_norm", 0.25, {}), "lm-eval's mmlu_.* reports no 'acc_norm,none'"),
    (Named("a", "humaneval", "pass@1", 0.0, {"test": 3}, "create_test"),
     "lm-eval's humaneval never has examples before a question, and 3 are asked for"),
    (Named("a", "arc_multilingual", "acc", 0.25, {"test": 0}),
     "lm-eval reports no acc of all items of 'arc_multilingual'"),
])
def test_a_name_that_lm_eval_does_not_know_is_refused(task, words):
    with pytest.raises(SuiteError, match=words.replace("?", r"\?")):
        lm_eval.check_named(Suite("s", (), named=(task,)), "test")


def test_chance_of_the_second_leaderboard_is_that_of_its_choices():
    from lm_eval.tasks._yaml_loader import load_yaml

    named = [task for task in read_suite(SUITES / "open_llm_v2.yaml").named if task.under == "bbh"]
    assert len(named) == 24
    for task in named:
        config = load_yaml(lm_eval._known().task_index[task.task].yaml_path, resolve_func=False)
        assert task.chance == pytest.approx(1 / len(config["doc_to_choice"])), task.task


def test_points_count_above_chance_part_by_part():
    suite = Suite("s", (), named=(Named("x1", "t", "m", 0.5, {}, under="x"), Named("x2", "t", "m", 0.2, {}, under="x"),
                                  Named("y", "t", "m", 0.0, {})), normalised=True)
    values = {"x1": 0.75, "x2": 0.1, "y": 0.3}
    assert points(suite, values) == pytest.approx(100 * ((0.5 + 0) / 2 + 0.3) / 2)
    plain = Suite("s", (), named=(suite.named[0], suite.named[2]))
    assert points(plain, values) == pytest.approx(100 * (0.75 + 0.3) / 2)
    board = read_suite(SUITES / "open_llm_v2.yaml")
    assert points(board, {task.name: task.chance for task in board.named}) == 0
    assert points(board, {task.name: 1.0 for task in board.named}) == pytest.approx(100)


def test_the_domains_of_mergebench_count_alike():
    suite = read_suite(SUITES / "mergebench.yaml")
    told = weights(suite)
    assert sum(told.values()) == pytest.approx(1) and len(told) == 16
    assert told["ifeval"] == told["gsm8k_cot"] == 0.25 and told["arc_ru"] == 0.25 / 12 and told["mbpp_plus"] == 0.125


def test_what_an_origin_says_of_a_suite_is_enough_to_count_its_points():
    board = read_suite(SUITES / "open_llm_v2.yaml")
    values = {task.name: (1 + task.chance) / 2 for task in board.named}
    told = json.loads(json.dumps(as_told(board, "test", dict.fromkeys(values, "d"))))
    assert points(recorded(told), values) == pytest.approx(points(board, values)) == pytest.approx(50)


CODE = Suite("coded", (), named=(Named("arc", "arc_challenge", "acc", 0.25, {"test": 0}),
                                 Named("code", "humaneval", "pass@1", 0.0, {"test": 0}, "create_test")))


def test_code_that_a_model_has_written_is_run_only_where_the_environment_allows_it(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    keep(tmp_path, "allenai/ai2_arc", "ARC-Challenge", {"test": arc(2)})
    keep(tmp_path, "openai/openai_humaneval", "openai_humaneval", {"test": [{"prompt": "def f():", "test": ""}]})
    with pytest.raises(SuiteError, match="not on this machine: the metric code_eval\n"):
        lm_eval.check_named(CODE, "test")
    metric = tmp_path / "evaluate_modules/metrics/evaluate-metric--code_eval" / ("0" * 64) / "code_eval.py"
    metric.parent.mkdir(parents=True)
    metric.touch()
    with pytest.raises(SuiteError, match="runs code that a model has written(?s:.*)for code\n(?s:.*)_CODE_EVAL=1"):
        lm_eval.check_named(CODE, "test")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    digests = lm_eval.check_named(CODE, "test")
    assert set(digests) == {"arc", "code"} and all(len(digest) == 32 for digest in digests.values())


def test_a_package_that_a_task_needs_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "langdetect", None)
    keep(tmp_path, "google/IFEval", "default", {"train": [{"prompt": "w3", "key": 1}]})
    named = (Named("a", "ifeval", "prompt_level_strict_acc", 0.0, {"test": 0}),)
    with pytest.raises(SuiteError, match="lm-eval's ifeval needs the package 'langdetect'.*\n.*pip install langdetect"):
        lm_eval.check_named(Suite("s", (), named=named), "test")


def test_data_are_found_under_the_name_that_the_library_gives_them(tmp_path, monkeypatch):
    from datasets.naming import camelcase_to_snakecase

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for name in ("MMLU-Pro", "IFEval", "mathQA", "MATH-500", "m_mmlu", "openai_humaneval"):
        place = tmp_path / f"TIGER-Lab___{camelcase_to_snakecase(name)}" / "default/0.0.0/a"
        assert not cached.in_cache(f"TIGER-Lab/{name}")
        place.mkdir(parents=True)
        (place / "dataset_info.json").touch()
        assert cached.newest(f"TIGER-Lab/{name}", "default") == cached.newest(f"TIGER-Lab/{name}") == place
        assert not cached.in_cache(f"TIGER-Lab/{name}", "other")


def arcs(folder: Path, step: str, tiny) -> Path:
    """A recipe of one line, beside a zoo with the member m and a suite of ARC with three examples."""
    (folder / "zoo.yaml").write_text(f"members:\n  m: {{path: {tiny('m', max_position_embeddings=128).path}}}\n")
    (folder / "arcs.yaml").write_text("tasks:\n  arc: {task: arc_challenge, metric: acc_norm, chance: 0.25, "
                                      "num_fewshot: {dev: 0, test: 3}}\n")
    (folder / "r.yaml").write_text(f"steps:\n  - {{as: s, step: {step}}}\n")
    return folder / "r.yaml"


@pytest.mark.parametrize("step, words", [
    ("search, members: [m], strategy: greedy, suite: 'arcs.yaml:dev'",
     "arcs.yaml' has tasks of lm-eval's own, and step 'search' asks only items of dataset members"),
    ("evaluate, members: [m], suite: 'arcs.yaml:test'", r"not on this machine: allenai/ai2_arc \(ARC-Challenge\)"),
    ("evaluate, members: [m], suite: 'arcs.yaml:test', device: gpu", "'gpu' cannot be calculated on"),
    ("evaluate, members: [m], suite: 'arcs.yaml:test', batch_size: 0", "'batch_size' cannot be 0"),
])
def test_a_plan_refuses_what_cannot_be_asked(tiny, tmp_path, monkeypatch, step, words):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(GlueError, match=words):
        make_plan(read_recipe(arcs(tmp_path, step, tiny)), Zoo(tmp_path / "zoo.yaml"))


def test_how_the_work_is_done_is_no_part_of_the_origin_and_speed_and_loss_want_a_dataset(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    keep(tmp_path / "cache", "allenai/ai2_arc", "ARC-Challenge", {"test": arc(2)})
    step, keys = "evaluate, members: [m], suite: 'arcs.yaml:test'", set()
    for more in ("", ", device: auto", ", batch_size: 7", ", batch_size: auto, device: cpu"):
        plan = make_plan(read_recipe(arcs(tmp_path, step + more, tiny)), Zoo(tmp_path / "zoo.yaml"))
        keys.add(plan.tasks[0].origin.key)
    assert len(keys) == 1
    for word in ("speed", "loss"):
        with pytest.raises(GlueError, match=f"no dataset with whose items {word} could be measured"):
            make_plan(read_recipe(arcs(tmp_path, step + f", {word}: true", tiny)), Zoo(tmp_path / "zoo.yaml"))


def test_lm_evals_command_on_the_same_cache_leaves_results_that_import_as_what_the_step_measures(tiny, tmp_path,
                                                                                                  monkeypatch):
    recipe = arcs(tmp_path, "evaluate, members: [m], suite: 'arcs.yaml:test'", tiny)
    for name in ("cache", "theirs"):
        keep(tmp_path / name, "allenai/ai2_arc", "ARC-Challenge",
             {"train": arc(9, 40), "validation": arc(4, 60), "test": arc(40)})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = run(read_recipe(recipe), Zoo(tmp_path / "zoo.yaml"), Workers(0))["s"]
    score, = Table.read(table).rows
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args",
         f"pretrained={tmp_path / 'm'},dtype=float32", "--tasks", "arc_challenge", "--num_fewshot", "3", "--device",
         "cpu", "--batch_size", "8", "--log_samples", "--output_path", "out"], cwd=tmp_path, capture_output=True,
        text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"),
                                     "HF_DATASETS_CACHE": str(tmp_path / "theirs"), "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = read(tmp_path / "out")
    told = json.loads(found.file.read_text())["results"]["arc_challenge"]
    assert {(one.metric, one.value, one.stderr, one.shots, one.chance, len(one.items)) for one in found.measures} == {
        (metric, told[f"{metric},none"], told[f"{metric}_stderr,none"], 3, 0.25, 40) for metric in ("acc", "acc_norm")}
    one, = (one for one in found.measures if one.metric == "acc_norm")
    assert (one.items, one.split, one.chance) == (score.results, score.split, score.chance)
    assert 0 < score.value < 1 and score.task == "arc" and score.suite == "arcs:test"
