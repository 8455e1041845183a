"""Every kind of product is made again to the bit from its folder and the inputs it names; what changed is told."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glue.checkpoint import Checkpoint
from glue.errors import RunError, ZooError
from glue.member import FOLDER_NOTE, Origin, canonical
from glue.recipe import read_recipe
from glue.recorded import raised
from glue.reproduce import CHOICE, Reproduction, reproduce
from glue.run import run
from glue.show.reproduction import print_reproduction
from glue.workers import Workers
from glue.zoo import Zoo
from tests.conftest import WORDS, word_tokenizer

CONFIG = """\
merge_method: ties
base_model: base
models: [{model: one, parameters: {weight: 1.0}}, {model: two, parameters: {weight: 0.5}}]
parameters: {density: 0.4}
"""
RECIPE = """\
seed: 3
steps:
  - {as: linear, step: merge, members: [one, two], method: {linear: {weight: {one: 0.7, two: 0.3}}}}
  - {as: ties, step: merge, members: [one, two], base: base, method: {ties: {density: 0.4}}}
  - {as: dare, step: merge, members: [one, two, three], base: base, method: {dare_linear: {density: 0.3}}}
  - {as: config, step: mergekit, config: merge.yaml}
  - {as: searched, step: search, members: [one, two, three], suite: words:dev, strategy: greedy, merge: linear}
  - {as: best, step: search, members: [base, one, two], suite: words:dev, strategy: best}
  - {as: model, step: mix, members: [one, two], suite: words:dev, router: linear}
  - {as: ffn, step: mix, members: [one, two], base: base, suite: words:dev, level: ffn, router: {mlp: {width: 4}},
     routing: sentence}
  - {as: text, step: mix, members: [one, ties], suite: words:dev, level: text, router: linear}
  - {as: lora, step: lora, base: one, data: {low: 2, high: 1}, steps: 3, learning_rate: 0.01, rank: 2, batch_size: 4,
     targets: [q_proj, v_proj]}
  - {as: extracted, step: extract, model: two, base: one, rank: 2}
  - {as: stacked, step: merge, members: [lora, extracted], method: {flora: {weight: {lora: 2, extracted: 1}}}}
  - {as: over, step: merge, members: [lora, two], method: linear}
  - {as: steered, step: proxy, large: three, tuned: lora, alpha: [0.5, 1], suite: words:dev}
  - {as: distilled, step: distill, teacher: steered, student: two, data: {low: 1}, steps: 3, learning_rate: 0.01,
     batch_size: 4}
  - {as: families, step: cluster, members: [one, two, ties], threshold: 0.5}
  - {as: summed, step: merge, each: families, method: linear}
  - {as: scored, step: evaluate, members: [one, over], suite: words:test}
"""
MADE = ("linear", "ties", "dare", "config", "searched", "best", "model", "ffn", "text", "lora", "extracted", "stacked",
        "over", "steered", "distilled", "families", "scored")


def model_folder(folder: Path, seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return model


def averaged(models: list[LlamaForCausalLM]) -> Callable[[list[int]], torch.Tensor]:
    """The plain average of models: tokens -> logits of the next one. What it says is right, so a search must merge."""
    mean = LlamaForCausalLM(models[0].config).eval()
    mean.load_state_dict({name: sum(model.state_dict()[name] for model in models) / len(models)
                          for name in mean.state_dict()})

    @torch.inference_mode()
    def says(tokens: list[int]) -> torch.Tensor:
        return mean(torch.tensor([tokens])).logits[0, -1]

    return says


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A zoo in which a recipe has been run that is no longer there."""
    folder = tmp_path_factory.mktemp("zoo")
    models = [model_folder(folder / name, seed) for seed, name in enumerate(("base", "one", "two", "three"))]
    says = averaged(models[1:3])
    rng = random.Random(7)
    for task, first in (("low", 3), ("high", 20)):
        (folder / task).mkdir()
        for split in ("train", "dev", "test"):
            lines = []
            for _ in range(12):
                question, choices = [rng.randrange(first, first + 17) for _ in range(4)], rng.sample(range(3, 40), 2)
                gold = says([1, *question])[choices].argmax().item()
                lines.append(canonical({"question": " ".join(f"w{k}" for k in question), "gold": gold,
                                        "choices": [f"w{k}" for k in choices], "answer": f"w{choices[gold]}"}) + "\n")
            (folder / task / f"{split}.jsonl").write_text("".join(lines))
    (folder / "benchmarks/suites").mkdir(parents=True)
    (folder / "benchmarks/suites/words.yaml").write_text("tasks:\n" + "".join(
        f"  {task}: {{data: {task}, output: choice, metric: acc, chance: 0.5}}\n" for task in ("low", "high")))
    listed = [f"  {name}: {{path: {name}}}\n" for name in ("base", "one", "two", "three")]
    listed += [f"  {name}: {{path: {name}, kind: dataset}}\n" for name in ("low", "high")]
    (folder / "zoo.yaml").write_text("members:\n" + "".join(listed) + "include: zoo/members.yaml\n")
    (folder / "merge.yaml").write_text(CONFIG)
    (folder / "tiny.yaml").write_text(RECIPE)
    with Workers(0) as workers:
        run(read_recipe(folder / "tiny.yaml"), Zoo(folder / "zoo.yaml"), workers)
    for gone in ("tiny.yaml", "merge.yaml", "benchmarks/suites/words.yaml"):
        (folder / gone).unlink()
    return folder


@pytest.fixture
def again(place) -> Callable[..., Reproduction]:
    """Reproduce a product of the recipe, or a folder."""
    def go(what: str, **how) -> Reproduction:
        with Workers(0) as workers:
            return reproduce(f"tiny/{what}" if what in MADE else what, Zoo(place / "zoo.yaml"), workers, **how)
    return go


@contextmanager
def flipped(file: Path, at: int = -1) -> Iterator[None]:
    """One bit of a file is another, for a while, and its time says that nothing happened."""
    data, times = bytearray(file.read_bytes()), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    for k in range(2):
        data[at] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=times)
        if not k:
            yield


def weights(place: Path, name: str) -> Path:
    return place / name / "model.safetensors"


@pytest.mark.parametrize("name", MADE)
def test_a_product_is_made_again_to_the_bit_without_its_recipe(name, again, place):
    before = sorted(path.name for path in (place / "zoo" / "tiny").iterdir())
    done = again(name)
    assert done.equal and done.again == done.digest == done.now and not done.differ and not done.reasons
    assert done.same > 0 or name == "best"  # the best is a member that is there
    assert sorted(path.name for path in (place / "zoo" / "tiny").iterdir()) == before


def test_a_folder_that_was_moved_away_is_enough(again, place, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(place / "zoo" / "tiny" / "ties", moved)
    done = again(str(moved))
    assert done.equal and done.folder == str(moved) and done.name == "tiny/ties"
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_choice_is_merged_again_without_asking_anything_unless_the_search_is_wanted(again, monkeypatch):
    asked = []
    monkeypatch.setattr("glue.steps._candidates.measure", lambda *args: asked.append(args) or 1 / 0)
    assert again("searched").how == "by the choice that was recorded" and not asked
    with pytest.raises(ZeroDivisionError):
        again("searched", search=True)
    assert len(asked) == 1


def test_a_search_that_is_repeated_finds_the_same_merge(again, place):
    assert json.loads((place / "zoo/tiny/searched" / CHOICE).read_text())["weights"].keys() == {"one", "two"}
    done = again("searched", search=True)
    assert done.equal and done.how == "as it was made"


@pytest.mark.parametrize("name, file, role", [
    ("linear", "two/model.safetensors", "members"), ("ties", "base/model.safetensors", "base"),
    ("model", "high/dev.jsonl", "suite"), ("searched", "two/model.safetensors", "members"),
    ("lora", "low/train.jsonl", "data"), ("config", "one/model.safetensors", "config")])
def test_one_byte_of_an_input_tells_which_input_changed_before_any_work(name, file, role, again, place, monkeypatch):
    monkeypatch.setattr("glue.reproduce.bound", lambda *_: 1 / 0)
    with flipped(place / file, at=-2 if file.endswith("jsonl") else -1):
        done = again(name)
    assert not done.equal and done.again == ""
    assert [(lost.role, lost.name, lost.why) for lost in done.lost] == [
        (role, file.split("/")[0], "its content has changed")]
    assert done.lost[0].now and done.lost[0].now != done.lost[0].was


def test_an_adapter_names_its_base_when_that_is_what_changed(again, place):
    with flipped(weights(place, "one")):
        done = again("over")
    assert [(lost.name, lost.why) for lost in done.lost] == [("tiny/lora", "its base one has changed")]


def test_a_product_among_the_inputs_is_read_again_too(again, place):
    with flipped(next((place / "zoo" / "tiny").glob("ties-*")) / "model.safetensors"):
        done = again("text")
    assert [(lost.name, lost.why) for lost in done.lost] == [("tiny/ties", "its content has changed")]


def test_an_input_that_is_gone_is_told(again, place):
    weights(place, "two").rename(place / "aside")
    try:
        done = again("linear")
    finally:
        (place / "aside").rename(weights(place, "two"))
    assert done.lost[0].name == "two" and not done.equal


def test_an_input_is_found_by_its_content_under_another_name(again, place):
    text = (place / "zoo.yaml").read_text()
    (place / "zoo.yaml").write_text(text.replace("  two: {path: two}", "  renamed: {path: two}"))
    try:
        assert again("linear").equal
        with flipped(weights(place, "two")):
            done = again("linear")
    finally:
        (place / "zoo.yaml").write_text(text)
    assert done.lost[0].why == "nothing in the zoo has this name or this content"


def test_a_product_that_was_changed_tells_the_tensor(again, place):
    file = next((place / "zoo" / "tiny").glob("ties-*")) / "model.safetensors"
    last = max(Checkpoint(file).headers.items(), key=lambda pair: pair[1].start)[0]
    with flipped(file):
        done = again("ties")
    assert not done.equal and done.again == done.digest != done.now
    assert [item.what for item in done.differ] == [last]
    assert done.reasons == ("its folder has been changed since it was made",)


def test_what_is_different_here_is_told_where_the_result_is(again, place, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(place / "zoo" / "tiny" / "linear", copy)
    note = json.loads((copy / FOLDER_NOTE).read_text())
    note["digest"], note["origin"]["made_with"]["torch"] = "0" * 32, "1.0"
    (copy / FOLDER_NOTE).write_text(json.dumps(note))
    done = again(str(copy))
    assert not done.equal and any(why.startswith("torch was 1.0, and is 2") for why in done.reasons)


def test_a_method_whose_version_was_raised_is_told(place, tmp_path):
    origin = Origin.from_dict(json.loads((place / "zoo/tiny/ties" / FOLDER_NOTE).read_text())["origin"])
    assert raised(origin) == []
    origin.params["method"]["version"] = 0
    assert raised(origin)[0].startswith("merge method 'ties' had version 0, and has ")


def test_a_note_that_was_edited_is_refused(again, place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place / "zoo" / "tiny" / "linear", copy)
    note = json.loads((copy / FOLDER_NOTE).read_text())
    note["origin"]["seed"] = 4
    (copy / FOLDER_NOTE).write_text(json.dumps(note))
    with pytest.raises(ZooError, match="its origin is not that of its key"):
        again(str(copy))
    (copy / FOLDER_NOTE).write_text("{}")
    with pytest.raises(ZooError, match="does not tell the origin"):
        again(str(copy))


def test_what_was_not_made_here_is_refused(again):
    with pytest.raises(ZooError, match="'one' was not made here"):
        again("one")
    with pytest.raises(ZooError, match="the zoo has no member 'onee'"):
        again("onee")
    with pytest.raises(RunError, match="a mapped line leaves a list"):
        again("tiny/summed")


def test_what_the_environment_says_of_the_hub_is_no_part_of_a_model(place, tmp_path):
    """transformers notes in a tokenizer's configuration whether it was loaded offline."""
    code = ("from glue.tune.finetune import finetune; from pathlib import Path; import sys\n"
            "finetune(Path(sys.argv[1]), base=Path(sys.argv[2]) / 'one', data=[(Path(sys.argv[2]) / 'low', 1.0)],"
            " steps=1, learning_rate=0.01, batch_size=2, weight_decay=0.0, prompt_weight=0.1, seed=0, lora=None,"
            " report=lambda *_: None)")
    subprocess.run([sys.executable, "-c", code, tmp_path / "out", place], check=True,
                   env=os.environ | {"HF_HUB_OFFLINE": "0"})
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["local_files_only"] is True


def test_every_product_that_runs_has_a_card_and_a_note_of_its_inputs(place):
    from huggingface_hub import ModelCard

    for name in set(MADE) - {"best", "families", "scored"}:  # a member which people wrote, a group, a table
        folder = place / "zoo" / "tiny" / name
        note = json.loads((folder / FOLDER_NOTE).read_text())
        assert [one["digest"] for one in note["inputs"]] and all(one["roles"] for one in note["inputs"])
        assert set(ModelCard.load(folder / "README.md").data.base_model) <= {"base", "one", "two", "three", "tiny/ties",
                                                                            "tiny/lora", "tiny/extracted",
                                                                            "tiny/steered"}


def test_a_table_notes_what_each_task_was_and_how_it_was_asked(place):
    note = json.loads((place / "zoo" / "tiny" / "scored" / FOLDER_NOTE).read_text())
    lines = [json.loads(line) for line in (place / "zoo/tiny/scored/scores.jsonl").read_text().splitlines()]
    assert [(one["suite"], one["task"], one["metric"], one["items"]) for one in note["evaluation"]] == [
        ("words:test", "low", "acc", 12), ("words:test", "high", "acc", 12)]
    for one in note["evaluation"]:
        assert one["split"] in {line["split"] for line in lines if line["task"] == one["task"]}
        assert one["how"]["harness"].startswith("lm-eval 0.4") and one["how"]["output"] == "choice"
    assert note["origin"]["made_with"]["lm_eval"].startswith("0.4")


def test_every_file_of_weights_that_was_made_names_their_digest(place):
    from safetensors import safe_open

    from glue.checkpoint import weights_digest

    for name in ("linear", "ties", "dare", "config", "searched", "over", "model", "ffn", "text", "lora"):
        for file in (place / "zoo" / "tiny" / name).resolve().rglob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert opened.metadata()["glue_digest"] == weights_digest(Checkpoint(file.parent))


def test_an_input_of_the_hub_that_changed_is_told_with_the_commit_it_was(again, place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place / "zoo" / "tiny" / "linear", copy)
    note = json.loads((copy / FOLDER_NOTE).read_text())
    note["inputs"][1] |= {"hub": "owner/two", "revision": "abc"}
    (copy / FOLDER_NOTE).write_text(json.dumps(note))
    with flipped(weights(place, "two")):
        done = again(str(copy))
    assert [lost.why for lost in done.lost] == ["its content has changed; it was owner/two at abc"]


def test_what_came_out_is_told_to_people_and_to_machines(again, place, capsys):
    print_reproduction(again("ties"), False)
    with flipped(weights(place, "one")):
        print_reproduction(again("ties"), False)
        print_reproduction(again("ties"), True)
    people, machine = capsys.readouterr().out.split("{", 1)
    assert people.startswith("equal  tiny/ties made again as it was made: ")
    assert "not made  tiny/ties: an input is not what it was\n  members: one: its content has changed (was " in people
    told = json.loads("{" + machine)
    assert told["equal"] is False and told["lost"][0]["name"] == "one"
