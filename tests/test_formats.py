"""Datasets that others have written: read by the format that is said, told line by line where they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glue.errors import GlueError, Mistakes, SuiteError
from glue.evaluate.suite import read_items
from glue.lineage import lineage
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.reproduce import reproduce
from glue.run import run
from glue.tune.formats import LONGEST, Pair, pairs
from glue.tune.intake import parted, taken
from glue.tune.items import read_pairs
from glue.tune.records import LINE_LARGEST, files_of
from glue.workers import Workers
from glue.zoo import Zoo

ALPACA = [{"instruction": f"Add {k} and 1.", "input": "", "output": f"{k + 1}"} for k in range(40)]


def lines(file: Path, records: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def asked(record: Any, format: str, **fields: str) -> list[tuple[str, str]]:
    return [(pair.question, pair.answer) for pair in pairs(record, format, fields)]


# -- formats --

def test_alpaca_puts_the_input_on_the_line_after_the_instruction():
    assert asked({"instruction": "Add.", "input": "1 2", "output": " 3\n", "text": "ignored"}, "alpaca") == [
        ("Add.\n1 2", "3")]
    for empty in ({"input": ""}, {"input": None}, {}):
        assert asked({"instruction": "Go.", "output": "Gone.", **empty}, "alpaca") == [("Go.", "Gone.")]


def test_every_answer_of_a_conversation_is_an_item_with_all_that_came_before_it():
    turns = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi"},
             {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Bye."},
             {"from": "human", "value": "Still there?"}]
    first = "Be short.\nUser: Hi\nAssistant:"
    assert asked({"conversations": turns}, "sharegpt") == [
        (first, "Hello."), (f"{first} Hello.\nUser: Bye\nAssistant:", "Bye.")]
    assert {pair.kin for pair in pairs({"conversations": turns}, "sharegpt", {})} == {first}


def test_one_question_of_a_conversation_may_have_other_keys_and_lie_in_columns():
    told = {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]}
    keys = {"conversations": "messages", "from": "role", "value": "content"}
    assert asked(told, "sharegpt", **keys) == [("User: 1 + 1\nAssistant:", "2")]
    columns = {"conversations": {"from": ["human", "gpt"], "value": ["1 + 1", "2"]}}
    assert asked(columns, "sharegpt") == [("User: 1 + 1\nAssistant:", "2")]


def test_a_text_is_read_by_a_model_as_it_was_written():
    text = "Once upon\na time, there  was."
    (question, answer), = asked({"text": f" {text}\n"}, "text")
    assert f"{question} {answer}" == text and question == "Once"


def test_prompts_and_items_are_taken_as_they_are():
    assert asked({"prompt": "2 + 2 =", "completion": " 4"}, "completion") == [("2 + 2 =", "4")]
    item, = pairs({"question": "q", "answer": "b", "choices": ["a", "b"], "gold": 1}, "items", {})
    assert item == Pair("q", "b", ("a", "b"), "q")


@pytest.mark.parametrize(("format", "record", "said"), [
    ("alpaca", {"instruction": "a", "response": "b"}, "has no 'output'"),
    ("alpaca", {"instruction": "a", "output": "  "}, "'output' is empty"),
    ("alpaca", {"instruction": "a", "output": None}, "'output' is text, not None"),
    ("alpaca", {"instruction": "a", "output": "\ud800"}, "half a character"),
    ("alpaca", ["a", "b"], "a record is an object"),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "'input' is text, not 3"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "nobody answers"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1 answers, and nothing was asked"),
    ("sharegpt", {"conversations": [{"from": "Human", "value": "a"}]}, "turn 1 is said by 'Human'"),
    ("sharegpt", {"conversations": [{"from": "human", "value": ""}]}, "turn 1: 'value' is empty"),
    ("sharegpt", {"conversations": "hi"}, "is a list of turns, not 'hi'"),
    ("sharegpt", {"conversation": []}, "did you mean 'conversation'?"),
    ("completion", {"prompt": "a"}, "has no 'completion'"),
    ("completion", {"prompt": "a" * LONGEST, "completion": "b"}, "characters, and may have"),
    ("text", {"text": "word"}, "one word"),
    ("items", {"question": "a", "answer": "b", "choices": ["c", "d"]}, "stands not among the choices"),
    ("items", {"question": "a", "answer": "b", "choices": ["b", "b"]}, "none may come twice"),
    ("items", {"question": "a", "answer": "b", "choices": "b"}, "list of words"),
])
def test_a_record_that_does_not_say_what_its_format_asks_is_refused(format, record, said):
    with pytest.raises(SuiteError) as problem:
        pairs(record, format, {})
    assert said in str(problem.value)


# -- files --

def both(found: Path, **how: Any) -> list[tuple[str, str]]:
    items = taken(files_of(found, how.pop("split", None)), how.pop("format", "alpaca"), how.pop("fields", {}), **how)
    return [(pair.question, pair.answer) for pair in items.pairs]


def test_the_same_records_are_read_from_every_kind_of_file(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet as parquet
    from datasets import Dataset, DatasetDict

    wanted = both(lines(tmp_path / "a.jsonl", ALPACA))
    assert wanted == [(record["instruction"], record["output"]) for record in ALPACA]
    (tmp_path / "a.json").write_text(json.dumps(ALPACA, indent=1))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes() + b"\n")
    (tmp_path / "hub/data").mkdir(parents=True)
    for k in range(2):
        part = pyarrow.Table.from_pylist(ALPACA[20 * k:20 * k + 20])
        parquet.write_table(part, tmp_path / f"hub/data/train-{k:05}-of-00002.parquet")
    (tmp_path / "hub/README.md").write_text("# a dataset")
    Dataset.from_list(ALPACA).save_to_disk(tmp_path / "saved", num_shards=3)
    DatasetDict({"train": Dataset.from_list(ALPACA), "test": Dataset.from_list(ALPACA[:3])}).save_to_disk(
        tmp_path / "splits")
    for name in ("a.json", "bom.jsonl", "hub", "saved"):
        assert both(tmp_path / name) == wanted
    assert both(tmp_path / "splits", split="train") == wanted and len(both(tmp_path / "splits", split="test")) == 3


def test_lists_of_turns_come_out_of_parquet_as_they_went_in(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet as parquet

    told = [{"conversations": [{"from": "human", "value": f"a{k}"}, {"from": "gpt", "value": "b"}]} for k in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(told), tmp_path / "c.parquet")
    assert both(tmp_path / "c.parquet", format="sharegpt")[2] == ("User: a2\nAssistant:", "b")


def test_which_split_is_meant_is_said_and_not_guessed(tmp_path: Path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        lines(tmp_path / f"d/{name}.jsonl", ALPACA[:2])
    with pytest.raises(SuiteError, match="holds 2 splits: test, train"):
        files_of(tmp_path / "d")
    with pytest.raises(SuiteError, match="did you mean 'train'"):
        files_of(tmp_path / "d", "trian")
    assert len(files_of(tmp_path / "d", "train").files) == 1 and len(files_of(tmp_path / "d", "all").files) == 2
    with pytest.raises(SuiteError, match="one file, which has no split"):
        files_of(tmp_path / "d/test-00000-of-00001.jsonl", "test")
    (tmp_path / "d/test.parquet").write_bytes(b"")
    with pytest.raises(SuiteError, match="several kinds: jsonl, parquet"):
        files_of(tmp_path / "d", "test")


@pytest.mark.parametrize(("name", "data", "said"), [
    ("a.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": \n', "a.jsonl:2:1: this is not JSON"),
    ("a.jsonl", b'{"instruction": "a\xff", "output": "b"}\n', "a.jsonl:1:1: byte 19 of this line is no UTF-8"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "nested too deeply"),
    ("a.jsonl", b"", "holds no records"),
    ("a.json", b'{"data": []}', "one list of records"),
    ("a.json", b'[\n{"instruction": "a", "output": "b"},\n{"instruction": "c"},\n]', "a.json:3:1: the record has no"),
    ("a.json", b'[\n{"instruction": "a", "output": "b"} {}]', "a.json:2:37: the list of records is broken off"),
    ("a.json", b'[{"instruction": "\xff"}]', "a.json:1:19: byte 19 of this line is no UTF-8"),
    ("a.json", b'[{"instruction": "a", "output": "b"}', "broken off here"),
    ("a.parquet", b"PAR1 this is none", "a.parquet:1:1: the file cannot be read"),
])
def test_a_hostile_file_is_told_with_file_and_line(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(GlueError) as problem:
        both(tmp_path / name)
    assert said in str(problem.value)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(LINE_LARGEST + 2)
    with pytest.raises(GlueError, match=f"more than {LINE_LARGEST:,} bytes"):
        both(tmp_path / "a.jsonl")


def test_code_in_a_file_stays_text(tmp_path: Path):
    trap = tmp_path / "sprung"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": code, "output": code}) + "\n" + code + "\n")
    with pytest.raises(Mistakes, match=r"a.jsonl:2:1: this is not JSON"):
        both(tmp_path / "a.jsonl")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "../a.jsonl"}]}))
    with pytest.raises(SuiteError, match="no file beside it"):
        files_of(tmp_path / "saved")
    assert not trap.exists()


def test_all_mistakes_are_told_at_once_up_to_a_number(tmp_path: Path):
    bad = [{"instruction": f"q{k}"} for k in range(30)]
    file = lines(tmp_path / "a.jsonl", [*ALPACA, *bad])
    with pytest.raises(Mistakes) as problem:
        both(file)
    assert len(problem.value.errors) == 21 and "a.jsonl:41:1" in str(problem.value)
    assert "and 10 records more" in str(problem.value)
    found = taken(files_of(file), "alpaca", {}, drop_faulty=True)
    assert (len(found.pairs), found.records, found.faulty) == (40, 70, 30)


# -- splits --

def items(*questions: str) -> list[Pair]:
    return [Pair(question, f"a{k}", (), question) for k, question in enumerate(questions)]


def test_splits_are_disjoint_exact_and_the_same_again():
    some = items(*(f"q{k}" for k in range(300)))
    found = parted(some, dev=20, test=30, seed=0, duplicates="keep")
    questions = {name: {item.question for item in part} for name, part in found.splits.items()}
    assert {name: len(part) for name, part in questions.items()} == {"train": 250, "dev": 20, "test": 30}
    assert not questions["train"] & questions["dev"] and not questions["test"] & (questions["train"] | questions["dev"])
    assert parted(some, dev=20, test=30, seed=0, duplicates="keep") == found
    assert parted(some, dev=20, test=30, seed=1, duplicates="keep").splits["test"] != found.splits["test"]
    order = [some.index(item) for item in found.splits["train"]]
    assert order == sorted(order)


def test_where_a_record_goes_depends_on_no_other():
    some = items(*(f"q{k}" for k in range(200)))
    held = {item.question for item in parted(some, dev=0, test=50, seed=3, duplicates="keep").splits["test"]}
    fewer = {item.question for item in parted(some[::-2], dev=0, test=25, seed=3, duplicates="keep").splits["test"]}
    assert len(fewer & held) > 15  # those of the half that are drawn at all are drawn first
    assert [item for item in held if item not in {one.question for one in some[::-2]}]


def test_what_has_a_question_in_common_is_on_one_side():
    some = items(*(f"q{k % 50}" for k in range(200)))
    found = parted(some, dev=10, test=10, seed=0, duplicates="keep")
    sides = [{item.question for item in found.splits[name]} for name in ("train", "dev", "test")]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert list(map(len, found.splits.values())) == [120, 10, 10] and found.left_out == 60
    talk = [Pair(f"{kin} {k}", "a", (), str(kin)) for kin in range(20) for k in range(3)]
    found = parted(talk, dev=4, test=4, seed=0, duplicates="keep")
    kins = [{item.kin for item in found.splits[name]} for name in ("train", "dev", "test")]
    assert not kins[0] & kins[1] and not kins[0] & kins[2] and len(found.splits["dev"]) == 4


def test_an_exact_duplicate_is_dropped_where_that_is_asked_and_another_answer_is_none():
    some = [*items("a", "b"), Pair("a", "a0", (), "a"), Pair("a", "other", (), "a")]
    assert parted(some, dev=0, test=0, seed=0, duplicates="keep").duplicates == 0
    found = parted(some, dev=0, test=0, seed=0, duplicates="drop")
    assert found.duplicates == 1 and [item.answer for item in found.splits["train"]] == ["a0", "a1", "other"]


def test_more_questions_than_there_are_cannot_be_held_out():
    with pytest.raises(SuiteError, match="2 dev and 2 test items are asked for, and there are 3 different"):
        parted(items("a", "b", "c", "a"), dev=2, test=2, seed=0, duplicates="keep")


# -- the step --

RECIPE = """
steps:
  - {as: sums, step: import, path: ../raw/sums.jsonl, format: alpaca, dev: 5, test: 5, fields: {output: response}}
  - {as: base, step: pretrain, steps: 2, learning_rate: 6e-3, batch_size: 4, vocabulary: [sums], data: {sums: 1},
     architecture: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48}}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    lines(tmp_path / "raw/sums.jsonl", [{"instruction": one["instruction"], "response": one["output"]}
                                        for one in ALPACA])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/r.yaml").write_text(RECIPE)
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    return tmp_path


def ran(place: Path) -> Any:
    with Workers(0) as workers:
        return run(read_recipe(place / "recipes/r.yaml"), Zoo(place / "zoo.yaml"), workers)


def test_an_imported_file_is_a_dataset_like_any_other_until_a_byte_of_it_changes(place: Path):
    member = ran(place)["sums"]
    assert member.kind == "dataset" and member.origin.names["path"] == ("raw/sums.jsonl",)
    assert len(read_pairs(member.folder)) == 30 and len(read_items(member.folder / "test.jsonl")) == 5
    assert "30 train, 5 dev, 5 test" in member.note
    assert all(task.state == "done" for task in make_plan(read_recipe(place / "recipes/r.yaml"),
                                                          Zoo(place / "zoo.yaml")))
    assert [node.kind for node in lineage(Zoo(place / "zoo.yaml"), "r/sums")] == ["dataset", "files"]
    with Workers(0) as workers:
        assert reproduce("r/sums", Zoo(place / "zoo.yaml"), workers).equal
    with open(place / "raw/sums.jsonl", "a") as file:
        file.write(json.dumps({"instruction": "Add 99 and 1.", "response": "100"}) + "\n")
    states = {task.name: task.state for task in make_plan(read_recipe(place / "recipes/r.yaml"),
                                                          Zoo(place / "zoo.yaml"))}
    assert states == {"r/sums": "ready", "r/base": "waiting"}
    with Workers(0) as workers:
        assert reproduce("r/sums", Zoo(place / "zoo.yaml"), workers).lost
    again = ran(place)["sums"]
    assert again.digest != member.digest and len(read_pairs(again.folder)) == 31


def test_a_copy_elsewhere_is_the_same_dataset(place: Path):
    first = ran(place)["sums"]
    (place / "raw/sums.jsonl").rename(place / "raw/other.jsonl")
    (place / "recipes/r.yaml").write_text(RECIPE.replace("sums.jsonl", "other.jsonl"))
    assert ran(place)["sums"].digest == first.digest
    assert len(Zoo(place / "zoo.yaml").versions("r/sums")) == 1


def test_nothing_is_made_of_a_file_with_a_faulty_line_unless_it_is_dropped(place: Path):
    with open(place / "raw/sums.jsonl", "a") as file:
        file.write('{"instruction": "Add."}\n')
    with pytest.raises(GlueError, match=r"sums.jsonl:41:1: the record has no 'response'"):
        ran(place)
    assert not list(place.glob("zoo/r/*"))
    (place / "recipes/r.yaml").write_text(RECIPE.replace("dev: 5", "dev: 5, faulty: drop, duplicates: drop"))
    member = ran(place)["sums"]
    told = json.loads((member.folder / "dataset.json").read_text())
    assert "1 faulty records dropped" in member.note and "sums.jsonl:41:1" in told["wrong"][0]


@pytest.mark.parametrize(("old", "new", "said"), [
    ("format: alpaca", "format: alpacca", "alpaca"),
    ("{output: response}", "{answer: response}", "has no 'answer'"),
    ("sums.jsonl", "sum.jsonl", "there is no file or folder"),
    ("../raw/sums.jsonl", "hub:tatsu-lab/alpaca", "hf download tatsu-lab/alpaca --repo-type dataset"),
    ("format: alpaca, ", "", "format"),
])
def test_wrong_words_are_told_before_anything_runs(place: Path, old, new, said):
    (place / "recipes/r.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(GlueError) as problem:
        make_plan(read_recipe(place / "recipes/r.yaml"), Zoo(place / "zoo.yaml"))
    assert said in str(problem.value)
