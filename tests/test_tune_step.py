"""The words of `step: tune`: what is part of an origin, what is refused, what the journal and `zoo show` say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from glue.checkpoint import Checkpoint
from glue.errors import Mistakes, RunError
from glue.kinds import weights
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.show.zoo import print_member
from glue.workers import Workers
from glue.zoo import Zoo

LINE = ("  - {{as: {name}, step: {step}, base: base, data: {{words: 1}}, steps: 3, learning_rate: 1e-2, "
        "batch_size: 8{more}}}\n")


@pytest.fixture
def place(tmp_path: Path, tiny) -> Any:
    """place("steps: 3", ...) writes a recipe with a dataset and one tuning of a tiny base with these words more."""
    base = tiny("base", seed=3)
    (tmp_path / "zoo.yaml").write_text(f"members:\n  base: {{path: {base.path}}}\n")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/train.jsonl").write_text("".join(
        json.dumps({"question": f"w{k} w{k + 1}", "answer": f"w{k + 2}", "choices": [], "gold": 0}) + "\n"
        for k in range(3, 30)))
    (tmp_path / "zoo.yaml").write_text(f"members:\n  base: {{path: {base.path}}}\n"
                                       "  words: {kind: dataset, path: words}\n")

    def make(*lines: str, step: str = "tune", top: str = "") -> Path:
        (tmp_path / "r.yaml").write_text(f"{top}steps:\n" + "".join(
            LINE.format(name=f"m{k}", step=step, more=f", {line}" if line else "") for k, line in enumerate(lines)))
        return tmp_path
    return make


def planned(place: Path) -> Plan:
    return make_plan(read_recipe(place / "r.yaml"), Zoo(place / "zoo.yaml"))


def ran(place: Path) -> Plan:
    with Workers(0) as workers:
        return run(read_recipe(place / "r.yaml"), Zoo(place / "zoo.yaml"), workers)


def test_what_changes_bits_is_part_of_an_origin_and_nothing_else_is(place):
    same = ("", "accumulation: 2, schedule: cosine, warm_up: 0.05, dtype: float32, template: auto, max_length: 0",
            "device: cpu, checkpointing: true, save_every: 7", "too_long: refuse, group_by_length: false")
    assert len({task.origin.key for task in planned(place(*same))}) == 1
    other = ("accumulation: 3", "schedule: linear", "warm_up: 0.2", "dtype: bfloat16", "template: plain",
             "max_length: 9", "too_long: cut", "group_by_length: true")
    plan = planned(place("", *other))
    assert len({task.origin.key for task in plan}) == 1 + len(other)
    first, *_ = plan
    assert set(first.origin.params) == {"data", "steps", "learning_rate", "batch_size", "weight_decay",
                                        "prompt_weight"}


def test_a_dtype_for_all_lines_is_that_of_a_tuning_too(place):
    plan = planned(place("", "dtype: float32", top="dtype: bfloat16\n"))
    assert [task.origin.params.get("dtype") for task in plan] == ["bfloat16", None]


@pytest.mark.parametrize(("line", "message"), [
    ("dtype: float16", "'dtype' cannot be 'float16'"), ("schedule: cosin", "did you mean 'cosine'"),
    ("device: cuda:99", "cannot be calculated on"), ("warm_up: 1.5", "'warm_up' cannot be 1.5"),
    ("accumulation: 0", "'accumulation' cannot be 0")])
def test_a_word_that_cannot_work_is_told_before_anything_runs(place, line, message):
    with pytest.raises(Mistakes, match=message):
        planned(place(line))


@pytest.mark.parametrize("steps", ["{epochs: 0}", "{}", "{epoch: 1}", "1.5"])
def test_steps_are_a_number_or_epochs(place, steps):
    folder = place("")
    (folder / "r.yaml").write_text((folder / "r.yaml").read_text().replace("steps: 3", f"steps: {steps}"))
    with pytest.raises(Mistakes, match="steps"):
        planned(folder)


def test_the_journal_and_the_zoo_tell_what_a_training_came_to(place, capsys):
    folder = place("too_long: cut, max_length: 4, group_by_length: true, schedule: constant")
    plan = ran(folder)
    journal, = (folder / "runs").glob("*.jsonl")
    told, = (record for record in map(json.loads, journal.read_text().splitlines()) if record["event"] == "told")
    assert (told["task"], told["steps"], told["cut"], told["tokens"]) == ("r/m0", 3, 27, 3 * 8 * 4)
    assert told["best"] <= told["last"] and told["best"] <= told["first"] and told["tokens_per_second"] > 0
    member = plan["m0"]
    print_member(member, [member], as_json=False)
    assert f"trained: 3 steps, 96 tokens, loss {told['first']:.4g} to" in capsys.readouterr().out
    print_member(member, [member], as_json=True)
    assert json.loads(capsys.readouterr().out)["training"]["last"] == told["last"]


def test_an_adapter_in_bfloat16_with_dropout_over_every_layer_is_a_member_like_any_other(place):
    words = "targets: [all-linear], rank: 2, dropout: 0.1, rslora: true, dtype: bfloat16, checkpointing: true"
    plan = ran(place(words, step="lora"))
    member = plan["m0"]
    assert member.kind == "adapter" and member.base.name == "base"
    config = json.loads((member.folder / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_dropout"] == 0.1 and len(config["target_modules"]) == 7
    changed, before = weights(member), Checkpoint(member.base.folder)
    assert sum(not torch.equal(changed[name], before[name]) for name in before) == 2 * 7


def test_a_model_that_does_not_fit_onto_a_device_is_an_error_with_what_would_help(place, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    monkeypatch.setattr("glue.tune.finetune.train", full)
    with pytest.raises(RunError, match=r"cpu has too little memory: Tried to allocate 2 GiB\n  say  dtype: bfloat16"):
        ran(place(""))


def test_what_was_killed_outlives_runs_of_other_recipes_for_a_week(place, monkeypatch):
    from glue.tune import kept

    folder = place("save_every: 0")
    monkeypatch.setattr(kept.Kept, "end", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ran(folder)
    monkeypatch.undo()
    monkeypatch.setattr("glue.run.os.getpid", lambda: 2 ** 22 - 3)  # the next run is another process
    monkeypatch.setattr("glue.run.lives", lambda draft: False)
    mine = (folder / "r.yaml").read_text()
    place("schedule: linear")
    ran(folder)
    (folder / "r.yaml").write_text(mine)
    assert list((folder / "zoo/.drafts").glob("*/state/state.json")), "the run of another line has left it alone"
    ran(folder)
    told = [json.loads(line) for file in (folder / "runs").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [one["resumed"] for one in told if one["event"] == "told" and "resumed" in one] == [2]
    assert not list((folder / "zoo/.drafts").iterdir())
    (folder / "zoo/.drafts/0123456789abcdef-1").mkdir()
    mark = folder / "zoo/.drafts/0123456789abcdef-1/.goes-on"
    mark.write_text("")
    ran(folder)
    assert mark.exists()
    os.utime(mark, (0, 0))
    ran(folder)
    assert not mark.exists()


def test_a_product_says_where_the_state_of_an_earlier_run_could_not_be_used(place, monkeypatch):
    from glue.tune import kept

    folder = place("save_every: 0")
    monkeypatch.setattr(kept.Kept, "end", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ran(folder)
    monkeypatch.undo()
    draft, = (folder / "zoo/.drafts").glob("*/state")
    (draft / "state.json").write_text("damaged")
    monkeypatch.setattr("glue.run.os.getpid", lambda: 2 ** 22 - 3)  # the next run is another process
    monkeypatch.setattr("glue.run.lives", lambda draft: False)
    plan = ran(folder)
    assert plan["m0"].note.endswith("from its beginning: the state that an earlier run had left was not used, since "
                                    "state.json is damaged")
