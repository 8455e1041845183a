"""What suites, their data and the fast scorer promise."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glue.errors import SuiteError
from glue.evaluate.fast import prepare, score
from glue.evaluate.suite import Item, Suite, Task, parse, read_items, read_suite, split_digest, task_items, write_tasks
from glue.kinds import Running
from glue.member import Member

SHIPPED = Path(__file__).parents[1] / "benchmarks/suites/tiny.yaml"
KIND = Task("kind", "zoo/kind", "choice", "acc", 0.25)
PETS = Task("pets", "zoo/pets", "generate", "exact_match", 0.0, max_tokens=8)
GOOD = {"question": "a zedi is a", "choices": ["metal", "cloth"], "gold": 0, "answer": "metal"}


# -- suites --

def test_the_shipped_suite_has_six_tasks_of_which_one_is_written():
    suite = read_suite(SHIPPED)
    assert suite.name == "tiny" and [task.name for task in suite.tasks] == [
        "kind", "facts", "trans", "strings", "logic", "bracket"]
    assert [task.name for task in suite.tasks if task.output == "generate"] == ["facts"]
    assert suite.tasks[1] == Task("facts", "tiny_zoo/facts", "generate", "exact_match", 0.0, 8)
    assert [task.chance for task in suite.tasks] == [0.25, 0.0, 0.25, 0.25, 0.5, 0.25]


LINE = "tasks:\n  kind: {data: d, output: choice, metric: acc, chance: 0.25"


@pytest.mark.parametrize("text, place, words", [
    ("", "1:1", "mapping with the key 'tasks'"),
    ("- a\n", "1:1", "mapping with the key 'tasks'"),
    ("about: hello\n", "1:1", "'tasks' is a mapping"),
    ("about: [a]\n" + LINE + "}\n", "1:1", "'about' is a sentence"),
    ("taks: {}\n", "1:1", "no key 'taks'; did you mean 'tasks'?"),
    (LINE + ", chanc: 1}\n", "2:62", "no key 'chanc'; did you mean 'chance'?"),
    (LINE.replace("0.25", "a lot") + "}\n", "2:48", "chance of task 'kind' is 'a lot'"),
    (LINE.replace("0.25", "true") + "}\n", "2:48", "chance of task 'kind' is True"),
    (LINE.replace("0.25", "1.5") + "}\n", "2:48", "chance of task 'kind' is 1.5"),
    (LINE.replace("data: d, ", "") + "}\n", "2:3", "does not say 'data'"),
    (LINE.replace("choice", "choose") + "}\n", "2:19", "output 'choose' of task 'kind' is not known; did you mean"),
    (LINE.replace("acc", "acc_nrom") + "}\n", "2:35", "'acc_nrom' of task 'kind' does not go with output: choice; did"),
    (LINE.replace("acc", "exact_match") + "}\n", "2:35", "does not go with output: choice"),
    (LINE + ", max_tokens: 3}\n", "2:62", "writes nothing"),
    (LINE + "}\n  kind: {}\n", "3:3", "'kind' stands twice"),
    (LINE.replace("kind", "../kind") + "}\n", "2:3", "'../kind' cannot be a name"),
    ("tasks: {kind: 3}\n", "1:9", "task 'kind' is 3"),
    ("tasks: !!python/object:os.system {}\n", "1:8", "only plain data"),
])
def test_a_mistake_in_a_suite_is_named_with_its_place(tmp_path, text, place, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SuiteError) as wrong:
        read_suite(file)
    assert words in str(wrong.value)
    assert str(wrong.value).startswith(f"{file}:{place}: ")


def test_suite_and_split_are_taken_apart_at_the_last_colon():
    assert parse("tiny:dev") == ("tiny", "dev")
    assert parse("C:/my/suite.yaml:test") == ("C:/my/suite.yaml", "test")


@pytest.mark.parametrize("text, words", [("tiny", "tiny:dev, which a search may look at"), (":dev", "which split"),
                                         ("tiny:train", "asks for a split 'train'"),
                                         ("tiny:tset", "did you mean 'test'?")])
def test_a_suite_without_a_split_that_may_be_measured_is_refused(text, words):
    with pytest.raises(SuiteError, match="split") as wrong:
        parse(text)
    assert words in str(wrong.value)


# -- items --

@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"), ("", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "an item is an object"),
    ('{"question": "\\ud800"}', "not JSON"),
    (json.dumps({**GOOD, "anwser": "x"}), "no 'anwser'; did you mean 'answer'?"),
    (json.dumps({key: GOOD[key] for key in ("question", "choices", "gold")}), "does not say 'answer'"),
    (json.dumps({**GOOD, "gold": 2}), "'metal' is not choice 2"),
    (json.dumps({**GOOD, "gold": -2}), "'metal' is not choice -2"),
    (json.dumps({**GOOD, "gold": 1}), "'metal' is not choice 1"),
    (json.dumps({**GOOD, "gold": "0"}), "whole number, not '0'"),
    (json.dumps({**GOOD, "gold": False}), "whole number, not False"),
    (json.dumps({**GOOD, "choices": "metal"}), "list of words"),
    (json.dumps({**GOOD, "choices": ["metal", 3]}), "a choice 3 must be text"),
    (json.dumps({**GOOD, "choices": ["metal", "metal"]}), "stands twice"),
    (json.dumps({**GOOD, "question": ""}), "question '' must be text"),
    (json.dumps({**GOOD, "question": "a zedi is a "}), "no space before or after"),
])
def test_a_damaged_item_is_named_with_its_line(tmp_path, line, words):
    file = tmp_path / "dev.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(SuiteError) as wrong:
        read_items(file)
    assert words in str(wrong.value)
    assert str(wrong.value).startswith(f"{file}:2:1: ")


def test_a_file_that_is_missing_empty_or_no_text_is_refused(tmp_path):
    with pytest.raises(SuiteError, match="there is no file"):
        read_items(tmp_path / "dev.jsonl")
    (tmp_path / "dev.jsonl").write_bytes(b"")
    with pytest.raises(SuiteError, match="has no items"):
        read_items(tmp_path / "dev.jsonl")
    (tmp_path / "dev.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(SuiteError, match="UTF-8"):
        read_items(tmp_path / "dev.jsonl")


def test_a_line_separator_inside_a_question_does_not_end_the_item(tmp_path):
    item = {**GOOD, "question": "one\u2028two\x0bthree\nfour"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(item, ensure_ascii=False))
    assert read_items(tmp_path / "dev.jsonl") == [Item("one\u2028two\x0bthree\nfour", ("metal", "cloth"), 0, "metal")]


def test_the_digest_of_a_split_is_that_of_its_items_in_their_order(tmp_path):
    other = {**GOOD, "question": "the pet of Gübu is"}
    spellings = {"a": json.dumps(GOOD) + "\n" + json.dumps(other) + "\n",
                 "b": json.dumps(dict(reversed(GOOD.items())), indent=None, separators=(",", ":")) + "\n"
                      + json.dumps(other, ensure_ascii=False),
                 "c": json.dumps(other) + "\n" + json.dumps(GOOD) + "\n"}
    digests = {}
    for name, text in spellings.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        digests[name] = split_digest(tmp_path / name)
    assert digests["a"] == digests["b"] != digests["c"]


def test_items_that_a_task_cannot_be_asked_of_are_refused(tmp_path):
    lines = [GOOD, {**GOOD, "choices": ["metal"]}, {**GOOD, "choices": [], "answer": "me\ntal"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SuiteError, match="test.jsonl:2:1: task 'kind' chooses, and this item has 1 choices"):
        task_items(KIND, tmp_path, "test")
    with pytest.raises(SuiteError, match="test.jsonl:3:1: task 'pets' reads one line"):
        task_items(PETS, tmp_path, "test")


# -- task files --

def _data(folder, *items):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_a_task_file_is_written_only_where_it_changes_and_follows_the_data(tmp_path):
    data, suite = _data(tmp_path / 'da: "ta" {{x}} ü', GOOD), Suite("my-suite", (KIND,))
    assert write_tasks(suite, "test", {"zoo/kind": data}, tmp_path / "tasks") == ["glue_my_suite_test_kind"]
    file = tmp_path / "tasks/glue_my_suite_test_kind.yaml"
    before, told = file.stat(), yaml.safe_load(file.read_text())
    assert told["dataset_kwargs"]["data_files"] == {"test": str(data / "test.jsonl")}
    write_tasks(suite, "test", {"zoo/kind": data}, tmp_path / "tasks")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    _data(data, {**GOOD, "question": "changed"})
    write_tasks(suite, "test", {"zoo/kind": data}, tmp_path / "tasks")
    assert yaml.safe_load(file.read_text())["dataset_kwargs"]["cache_dir"] != told["dataset_kwargs"]["cache_dir"]


def test_a_dataset_that_is_not_given_and_names_that_collide_are_refused(tmp_path):
    data = _data(tmp_path / "data", GOOD)
    with pytest.raises(SuiteError, match="needs the dataset 'zoo/kind'; did you mean 'zoo/kinds'"):
        write_tasks(Suite("s", (KIND,)), "test", {"zoo/kinds": data}, tmp_path)
    twins = (Task("a-b", "d", "choice", "acc", 0.0), Task("a_b", "d", "choice", "acc", 0.0))
    with pytest.raises(SuiteError, match="would both be called glue_s_test_a_b"):
        write_tasks(Suite("s", twins), "test", {"d": data}, tmp_path)


def test_what_lm_eval_would_misread_is_refused(tmp_path):
    dates = {**GOOD, "choices": ["2020-01-01", "2021-05-05 10:00"], "answer": "2020-01-01"}
    for task in (KIND, PETS):
        with pytest.raises(SuiteError, match="would not read each answer of task .* as text but as a date"):
            write_tasks(Suite("s", (task,)), "test", {task.data: _data(tmp_path / "data", dates, dates)}, tmp_path)
    words = {**GOOD, "choices": ["2020-01-01", "never"], "answer": "2020-01-01"}
    assert write_tasks(Suite("s", (KIND,)), "test", {"zoo/kind": _data(tmp_path / "data", words)}, tmp_path)
    with pytest.raises(SuiteError, match="'::' means something else"):
        write_tasks(Suite("s", (KIND,)), "test", {"zoo/kind": _data(tmp_path / "a::b", GOOD)}, tmp_path)


# -- the fast scorer --

ANIMALS = ["snake", "cat", "red fox", "owl"]
NAMES = ["Gubu", "Zedi the second of that name", "Mo", "Zu", "La la la", "Be", "Gubu Mo"]
ITEMS = {"kind": [Item(f"{name} likes", tuple(ANIMALS), k % 4, ANIMALS[k % 4]) for k, name in enumerate(NAMES)],
         "pets": [Item("the pet of Gubu =", (), 0, "snake"), Item("pet =", (), 0, "owl")]}
TASKS = (KIND, PETS)


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([" ".join(ANIMALS), " snake snake owl likes"] * 3, trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="</s>")


def _llama(tokenizer, seed, **shape):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48} | shape
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2,
                                        bos_token_id=1, eos_token_id=2, pad_token_id=2, **shape)).eval()


def _running(model, tokenizer, **more):
    return Running(Member("m", "model", "/nowhere"), model, tokenizer, **more)


def test_the_batch_size_changes_no_result(tokenizer):
    for seed in range(3):
        running, prepared = _running(_llama(tokenizer, seed), tokenizer), prepare(tokenizer, TASKS, ITEMS)
        results = [score(running, prepared, batch_size=size) for size in (1, 2, 3, 64)]
        for other in results[1:]:
            assert {name: list(some) for name, some in other.items()} == {
                name: list(some) for name, some in results[0].items()}


def test_results_stand_in_the_order_of_the_items(tokenizer):
    running = _running(_llama(tokenizer, 0), tokenizer)
    forth = score(running, prepare(tokenizer, TASKS, ITEMS))
    back = score(running, prepare(tokenizer, TASKS, {name: some[::-1] for name, some in ITEMS.items()}))
    alone = [score(running, prepare(tokenizer, [KIND], {"kind": [item]}))["kind"][0] for item in ITEMS["kind"]]
    assert 0 < sum(alone) < len(alone), "a test of order needs results that differ"
    assert list(forth["kind"]) == list(back["kind"][::-1]) == alone


def test_choices_that_differ_in_their_last_token_share_a_pass(tokenizer):
    letters = [Item("say", ("x", "y", "z"), 1, "y"), Item("say", ("x y", "x z"), 0, "x y")]
    prepared = prepare(tokenizer, [KIND], {"kind": letters})
    assert len(prepared.rows) < sum(len(item.choices) for item in letters)
    running = _running(_llama(tokenizer, 1), tokenizer)
    apart = [score(running, prepare(tokenizer, [KIND], {"kind": [item]}))["kind"][0] for item in letters]
    assert list(score(running, prepared)["kind"]) == apart


def test_choices_and_texts_that_do_not_fit_the_model_are_refused(tokenizer):
    running = _running(_llama(tokenizer, 0), tokenizer)
    wide = Task("pets", "d", "generate", "exact_match", 0.0, max_tokens=64)
    with pytest.raises(SuiteError, match="max_tokens: 64 leaves no room"):
        score(running, prepare(tokenizer, [wide], ITEMS))
    long = [Item("say", ("x" * 70, "y"), 0, "x" * 70)]
    with pytest.raises(SuiteError, match="more than the 64 that the model can read"):
        score(running, prepare(tokenizer, [KIND], {"kind": long}))


class _Two(torch.nn.Module):
    """Two models behind one face, which answers only while it is pinned to one of them."""

    def __init__(self, *models):
        super().__init__()
        self.inner, self.at, self.device = torch.nn.ModuleList(models), None, torch.device("cpu")
        self.config, self.generation_config = models[0].config, models[0].generation_config

    def forward(self, input_ids, use_cache=True):
        return self.inner[self.at](input_ids, use_cache=use_cache)

    @contextmanager
    def pinned(self, route):
        assert self.at is None, "routes are pinned one at a time"
        self.at = route
        yield
        self.at = None


def test_a_member_with_routes_is_asked_inside_the_route_of_each_context(tokenizer):
    experts = [_llama(tokenizer, seed) for seed in (0, 3)]
    two, asked = _Two(*experts), []

    def route(contexts):
        asked.extend(map(tuple, contexts))
        return [int(len(context) > 8) for context in contexts]

    prepared = prepare(tokenizer, TASKS, ITEMS)
    mixed = score(_running(two, tokenizer, route=route, pinned=two.pinned), prepared, batch_size=2)
    alone = [score(_running(expert, tokenizer), prepared) for expert in experts]
    for task in TASKS:
        chosen = [int(len(tokenizer(item.question)["input_ids"]) > 8) for item in ITEMS[task.name]]
        assert set(chosen) == {0, 1}
        assert list(mixed[task.name]) == [alone[expert][task.name][k] for k, expert in enumerate(chosen)]
    assert not np.array_equal(alone[0]["kind"], alone[1]["kind"])
    assert len(asked) == len(set(asked)), "a context is routed once, however many choices it has"


def test_a_model_that_cannot_slice_its_logits_scores_the_same(tokenizer):
    model = _llama(tokenizer, 2)
    whole, prepared = _Two(model), prepare(tokenizer, TASKS, ITEMS)
    whole.at = 0
    sliced, full = score(_running(model, tokenizer), prepared), score(_running(whole, tokenizer), prepared)
    assert all(np.array_equal(sliced[task.name], full[task.name]) for task in TASKS)
