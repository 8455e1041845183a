"""Recipes of papers: each is planned without a network or a model, and says what it would download, write and hold."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glue.checkpoint import Checkpoint
from glue.errors import GlueError, ZooError
from glue.kinds import load, weights
from glue.plan import make_plan
from glue.preflight.headers import factor_numbers, read_recorded
from glue.preflight.needs import needs
from glue.recipe import read_recipe
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo
from tests.test_docs import ask, copied

ROOT = Path(__file__).parents[1]
PAPER = sorted(file.stem for file in (ROOT / "recipes" / "paper").glob("*.yaml"))
RECORDED = read_recorded(ROOT / "zoo.yaml")
LLAMA = 6_738_415_616  # numbers of a Llama-2-7B
COUNTS = {"meta-llama/Llama-2-7b-hf": LLAMA, "huggyllama/llama-7b": LLAMA, "huggyllama/llama-13b": 13_015_864_320,
          "codellama/CodeLlama-7b-Instruct-hf": 6_738_546_688, "google/gemma-7b": 8_537_680_896,
          "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384}
GB = 1e9


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """The repository's zoo, recipes and benchmarks, with an empty cache of the hub and no data."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    copied(tmp_path, "zoo.yaml", "recipes", "benchmarks")
    return tmp_path


def planned(folder: Path, name: str):
    return make_plan(read_recipe(folder / "recipes" / "paper" / f"{name}.yaml"), Zoo(folder / "zoo.yaml"), missing=True)


def asked_for(name: str) -> set[str]:
    """The repositories that a recipe names, by tag or by name."""
    zoo, text = Zoo(ROOT / "zoo.yaml"), (ROOT / "recipes" / "paper" / f"{name}.yaml").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = {member.path for tag in re.findall(r"tag:[\w-]+", text) for member in zoo.select(tag)}
    found |= {member.path for member in zoo if re.search(rf"(?<![\w/-]){re.escape(member.name)}(?![\w-])", text)}
    return {path for path in found if path.startswith("hub:")}


# --- recorded headers -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", COUNTS)
def test_recorded_headers_are_those_that_transformers_makes_of_the_same_numbers(name):
    from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig
    from yaml import safe_load

    told = safe_load((ROOT / "benchmarks" / "headers" / "models.yaml").read_text())
    build = told["builds"][told["repositories"][name]["build"]]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config((GemmaConfig if "gemma" in name else LlamaConfig)(**build))
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if build.get("tie_word_embeddings"):
        del own["lm_head.weight"]
    assert {key: header.shape for key, header in RECORDED[name].headers.items()} == own
    assert RECORDED[name].parameters == COUNTS[name] and RECORDED[name].nbytes == 2 * COUNTS[name]


def test_a_llama_of_seven_billion_takes_13_48_gb():
    found = RECORDED["meta-llama/Llama-2-7b-hf"]
    assert len(found) == 291 and found.exact and f"{found.nbytes / GB:.2f}" == "13.48"
    assert not RECORDED["lmsys/vicuna-7b-v1.5"].exact and RECORDED["lmsys/vicuna-7b-v1.5"].nbytes == found.nbytes
    with pytest.raises(ZooError, match="hf download meta-llama/Llama-2-7b-hf"):
        found["model.norm.weight"]


def test_every_model_of_the_zoo_is_recorded_but_the_one_that_is_no_llama():
    paths = {member.path.removeprefix("hub:") for member in Zoo(ROOT / "zoo.yaml") if member.path.startswith("hub:")}
    assert paths - set(RECORDED) == {"LLM360/CrystalChat"}


@pytest.mark.parametrize("text, said", [
    ("{builds: {}, repositories: {a/b: {build: x, dtype: float16}}}", "'a/b' has no build and dtype"),
    ("{builds: {}, repositories: {a/b: {like: c/d}}}", "'a/b' has no build and dtype"),
    ("{builds: {x: {hidden: 3}}, repositories: {a/b: {build: x, dtype: float16}}}", "a build has no 'hidden'; did you"),
    ("{builds: {x: {hidden_size: 3}}, repositories: {a/b: {build: x, dtype: float16}}}", "the build has no vocab_size"),
])
def test_a_record_that_is_not_understood_is_told_with_its_place(tmp_path, text, said):
    (tmp_path / "benchmarks" / "headers").mkdir(parents=True)
    (tmp_path / "benchmarks" / "headers" / "own.yaml").write_text(text)
    with pytest.raises(ZooError, match=rf"own.yaml:1:\d+: {said}"):
        read_recorded(tmp_path / "zoo.yaml")


# --- plans ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_of_a_paper_is_planned_without_a_network_and_says_what_it_lacks(bare, name):
    began = time.process_time()
    plan = planned(bare, name)
    taken = needs(plan)
    assert time.process_time() - began < 5
    assert {task.state for task in plan} <= {"missing", "waiting", "deferred"} and plan.tasks[0].state == "missing"
    lacking = {one.member.path: one for one in taken.lacking if one.member.kind == "model"}
    assert set(lacking) == asked_for(name)
    for path, one in lacking.items():
        assert one.how == f"hf download {path.removeprefix('hub:')}"
        recorded = RECORDED.get(path.removeprefix("hub:"))
        assert (one.extent.nbytes if one.extent else None) == (recorded.nbytes if recorded else None)
    data = [one.how for one in taken.lacking if one.member.kind == "dataset"]
    assert data and all(how.startswith("put it into data/") for how in data)
    assert taken.download[0] == sum(one.extent.nbytes for one in lacking.values() if one.extent)
    assert all(taken.tasks[task.name].memory for task in plan if task.step in ("evaluate", "search", "mix", "federate"))


@pytest.mark.parametrize("name", PAPER)
def test_what_a_plan_may_leave_out_a_run_needs(bare, name):
    recipe = read_recipe(bare / "recipes" / "paper" / f"{name}.yaml")
    with pytest.raises(GlueError) as wrong:
        make_plan(recipe, Zoo(bare / "zoo.yaml"))
    assert set(re.findall(r"hf download (\S+)", str(wrong.value))) <= {path[4:] for path in asked_for(name)}
    assert "data/" in str(wrong.value)  # and with the questions there, only models are left to tell of
    ask(Zoo(bare / "zoo.yaml"), bare)
    if not {"alpaca", "wizardlm"} & set(re.findall(r"\w+", recipe.file.read_text())):
        with pytest.raises(GlueError) as wrong:
            make_plan(recipe, Zoo(bare / "zoo.yaml"))
        assert "data/" not in str(wrong.value)


def test_the_figures_of_four_chat_models(bare):
    taken = needs(planned(bare, "which4_chat"))
    one = 2 * LLAMA
    assert taken.download == (5 * one, False)  # three of them are told as about so much
    by = {name.removeprefix("which4_chat/"): need for name, need in taken.tasks.items()}
    for name, inputs in (("linear", 4), ("task_arithmetic", 5), ("ties", 5), ("dare_ties", 5)):
        assert (by[name].read, by[name].written) == (inputs * one, one)
        assert 1e6 < by[name].memory < 30e6 and by[name].peak(4) < 0.7e9  # a merge streams
    mlp, layer = 3 * 4096 * 11008, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert by["ffn-hybrid"].written == one + 2 * 3 * 16 * mlp
    assert by["block-hybrid"].written == one + 2 * 3 * 16 * layer
    assert by["model"].written == 4 * one
    assert by["ffn-hybrid"].memory == by["model"].memory == 4 * LLAMA  # experts are asked one after the other
    assert by["scored"].memory == taken.memory == 4 * 4 * LLAMA  # the mixture of whole models in fp32
    assert taken.written == (8 * one + by["ffn-hybrid"].written + by["block-hybrid"].written, True)


def test_the_figures_of_ten_clients_of_ten_ranks(bare):
    taken = needs(planned(bare, "flora_7b"))
    by = {name.removeprefix("flora_7b/"): need for name, need in taken.tasks.items()}
    sixteen = 32 * 2 * 16 * (4096 + 4096)
    assert taken.download == (2 * LLAMA, True) and sixteen == 8_388_608
    assert by["flora"].memory == 4 * LLAMA + 16 * 4 * sixteen  # the client of rank 64
    assert by["fedit"].memory == by["central"].memory == 4 * LLAMA + 16 * sixteen
    assert by["central"].written == 4 * sixteen and by["flora"].written is None
    assert taken.written == (4 * sixteen, False)  # what is combined how decides, so it is told as the least


def test_the_figures_of_one_round_at_three_sizes(bare):
    taken = needs(planned(bare, "one_shot_sizes"))
    assert taken.download == (2 * (1_100_048_384 + 8_537_680_896 + 13_015_864_320), True)
    by = {name.removeprefix("one_shot_sizes/"): need for name, need in taken.tasks.items()}
    assert by["small-full-one"].memory == 16 * 1_100_048_384
    assert by["large-one"].memory == 4 * 13_015_864_320 + 16 * 40 * 2 * 16 * 2 * 5120
    assert by["ties"].written == 2 * 13_015_864_320


def test_what_is_made_for_each_family_is_told_of_one(bare):
    taken = needs(planned(bare, "which16"))
    by = {name.removeprefix("which16/"): need for name, need in taken.tasks.items()}
    assert by["families"].read == sum(RECORDED[path.removeprefix("hub:")].nbytes
                                      for path in asked_for("which16") if path != "hub:LLM360/CrystalChat")
    assert not by["families"].exact and taken.unknown == 1
    assert by["ties"].each and f"{by['ties'].written / GB:.2f}" == "13.48" and not taken.written[1]
    assert by["glued"].read == 2 * by["ties"].written  # it names two of the families


def test_the_command_line_tells_the_sizes_in_time(bare):
    glue = [sys.executable, "-c", "from glue.cli import main; main()", "plan", "recipes/paper/which16.yaml"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(glue, cwd=bare, capture_output=True, text=True, timeout=120, env={
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(bare), "HF_HUB_OFFLINE": "1", "COLUMNS": "140"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime - before.ru_utime < 5  # of one core; how long that takes, what else runs decides
    assert done.stdout.count("hf download") == 16
    assert "   13.48 GB  hf download meta-llama/Llama-2-7b-chat" in done.stdout
    assert "  ~13.48 GB  hf download teknium/OpenHermes-7B" in done.stdout
    assert "19 members are not on this machine, about 202.15 GB of weights in all, and 1 of unknown" in done.stdout
    assert "a worker holds up to 53.9 GB" in done.stdout and "put it into data/mmlu" in done.stdout
    rows = json.loads(subprocess.run([*glue, "--json"], cwd=bare, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(bare), "HF_HUB_OFFLINE": "1"}).stdout)
    merged = next(row for row in rows if row["name"] == "which16/linear")
    assert (merged["state"], merged["bytes_written"], merged["each"]) == ("deferred", 2 * COUNTS[
        "codellama/CodeLlama-7b-Instruct-hf"], True)
    assert {"name": "Llama-2-7b-chat-hf", "how": "hf download meta-llama/Llama-2-7b-chat-hf", "bytes": 2 * LLAMA,
            "exact": True} in rows[0]["lacks"]


# --- what is told, against what is ------------------------------------------------------------------------------------

@pytest.fixture
def mixed(tmp_path, tiny) -> Zoo:
    """Two tiny models, their questions, and recipes that mix them at every level."""
    one, other = tiny("one", seed=1), tiny("other", seed=2)
    (tmp_path / "things").mkdir()
    for split in ("dev", "test", "train"):
        (tmp_path / "things" / f"{split}.jsonl").write_text(
            '{"question": "w3", "choices": ["w4", "w5"], "gold": 0, "answer": "w4"}\n' * 4)
    (tmp_path / "benchmarks" / "suites").mkdir(parents=True)
    (tmp_path / "benchmarks" / "suites" / "small.yaml").write_text(
        "tasks: {things: {data: things, output: choice, metric: acc, chance: 0.5}}")
    (tmp_path / "zoo.yaml").write_text(
        f"members:\n  one: {{path: {one.path}}}\n  other: {{path: {other.path}}}\n"
        f"  things: {{path: things, kind: dataset}}\n  far: {{path: hub:somebody/far}}\ninclude: zoo/members.yaml\n")
    how = {name: f"level: {name.partition('-')[0]}, router: {'random' if name == 'text' else 'uniform'}"
                 f"{', dense_layers: 1' * name.endswith('-half')}"
           for name in ("ffn", "ffn-half", "block", "block-half", "model", "model-half", "text")}
    mixtures = "".join(f"  - {{as: {name}, step: mix, members: [one, other], suite: small:dev, {words}}}\n"
                       for name, words in how.items())
    (tmp_path / "r.yaml").write_text(
        "steps:\n  - {as: half, step: merge, members: [one, other], method: linear}\n" + mixtures +
        "  - {as: taught, step: lora, base: one, data: {things: 1}, steps: 1, learning_rate: 1e-3, rank: 3, alpha: 6, "
        "targets: [q_proj, down_proj]}\n"
        "  - {as: tuned, step: tune, base: one, data: {things: 1}, steps: 1, learning_rate: 1e-3}\n")
    return Zoo(tmp_path / "zoo.yaml")


def test_sizes_that_are_told_beforehand_are_those_that_come_out(mixed):
    recipe = read_recipe(mixed.file.parent / "r.yaml")
    told = needs(make_plan(recipe, mixed, missing=True)).tasks
    made = run(recipe, mixed, Workers(0))
    for name in ("half", "taught", "tuned", "model", "text", "ffn", "ffn-half", "block", "block-half", "model-half"):
        folders = [Path(made[name].path)] if name != "text" else list((Path(made[name].path) / "experts").iterdir())
        found = [pair for folder in folders for pair in Checkpoint(folder).headers.items()]
        numbers = sum(header.nbytes for tensor, header in found
                      if not any(word in tensor for word in (".gate.", "router", "shared_expert")))
        assert told[f"r/{name}"].written == numbers, name
    held = load(made["half"]).model
    assert told["r/model"].memory == sum(parameter.nbytes for parameter in held.parameters())


def test_numbers_of_an_adapter_are_those_that_peft_trains(mixed):
    from peft import LoraConfig, get_peft_model

    own = weights(mixed["one"]).headers
    trained = get_peft_model(load(mixed["one"]).model, LoraConfig(r=5, target_modules=["k_proj", "gate_proj"]))
    assert factor_numbers(own, ["k_proj", "gate_proj"], 5) == sum(
        parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)


def test_what_is_here_is_planned_as_ever_beside_what_is_not(mixed):
    place = mixed.file.parent
    (place / "s.yaml").write_text(
        "steps:\n  - {as: here, step: merge, members: [one, other], method: linear}\n"
        "  - {as: away, step: merge, members: [one, far], method: linear}\n"
        "  - {as: both, step: merge, members: [here, far, one], method: linear}\n"
        "  - {as: last, step: merge, members: [far, both], method: linear}\n")
    plan = make_plan(read_recipe(place / "s.yaml"), mixed, missing=True)
    assert [task.state for task in plan] == ["ready", "missing", "missing", "missing"]
    assert [[member.name for member in task.lacks] for task in plan] == [[], ["far"], ["far"], ["far"]]
    taken = needs(plan)
    one = sum(header.nbytes for header in weights(mixed["one"]).headers.values())
    assert taken.tasks["s/both"].read == 2 * one and not taken.tasks["s/both"].exact  # `far` is recorded nowhere
    assert [(lacking.how, lacking.extent) for lacking in taken.lacking] == [("hf download somebody/far", None)]
    run(read_recipe(place / "r.yaml"), mixed, Workers(0))  # what does not ask for it runs


def test_members_under_the_tags_of_papers_are_those_of_their_recipes():
    assert set(PAPER) >= {"which2", "which4_chat", "which4_domain", "which8", "which12", "which16", "flora_7b",
                          "one_shot_sizes", "fedpt_7b", "shed_7b"}
    for name in PAPER:
        text = (ROOT / "recipes" / "paper" / f"{name}.yaml").read_text()
        assert text.startswith("# ") and "arXiv:" in text.split("\nabout:")[0] and re.search("[Nn]eeds ", text), name


def test_settings_of_the_federated_papers(bare):
    lines = {line.name: line.params for line in read_recipe(bare / "recipes" / "paper" / "flora_7b.yaml").lines}
    assert sorted(lines["flora"]["rank"].values(), reverse=True) == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    for name in ("flora", "zero-pad", "flora-even", "fedit"):
        told = lines[name]
        assert (told["clients"], told["rounds"], told["batch_size"], told["learning_rate"], told["targets"]) == (
            10, 3, 128, 3e-4, ["q_proj", "v_proj"])
    assert lines["central"]["steps"] == 3 * 10 * lines["flora"]["steps"]
    lines = {line.name: line.params for line in read_recipe(bare / "recipes" / "paper" / "one_shot_sizes.yaml").lines}
    for size in ("small", "middle", "large", "small-full"):
        one, three = lines[f"{size}-one"], lines[f"{size}-three"]
        assert one["rounds"] * one["steps"] == three["rounds"] * three["steps"] == 123 and one["base"] == three["base"]
