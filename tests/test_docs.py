"""The documentation is true: its tables are those of the code, its links lead somewhere, its recipes can be planned."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glue.docs import main, pages
from glue.errors import GlueError
from glue.member import Table
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "benchmarks/README")),
         *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
OTHER_FAMILIES = {"MetaMath-Llemma-7B": 1, "CodeLlama-7b-Instruct-hf": 1, "Magicoder-S-CL-7B": 1, "CrystalChat": 2}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def copied(folder: Path, *names: str) -> Zoo:
    """Parts of the repository in a folder of their own, without products."""
    for name in names:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    return Zoo(folder / "zoo.yaml")


def anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page get."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def hub_members(zoo: Zoo) -> list:
    return [member for member in zoo if member.path.startswith("hub:")]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, offline."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def paper(tmp_path, cache, tiny) -> Zoo:
    """The zoo of the paper with a tiny stand-in for each model: three families, members near their root."""
    zoo = copied(tmp_path, "zoo.yaml", "recipes")
    for k, member in enumerate(hub_members(zoo)):
        _stand_in(cache, member, tiny, k)
    return zoo


def _stand_in(cache: Path, member, tiny, k: int) -> None:
    from safetensors.torch import load_file, save_file

    repository = cache / f"models--{member.path.removeprefix('hub:').replace('/', '--')}"
    snapshot, revision = repository / "snapshots" / f"{k:040d}", repository / "refs" / "main"
    revision.parent.mkdir(parents=True)
    revision.write_text(snapshot.name)
    shutil.copytree(tiny(f"made/{k}", seed=OTHER_FAMILIES.get(member.name, 0)).path, snapshot)
    weights, draw = load_file(snapshot / "model.safetensors"), torch.Generator().manual_seed(k)
    save_file({name: tensor + 0.02 * torch.randn(tensor.shape, generator=draw) for name, tensor in weights.items()},
              snapshot / "model.safetensors", metadata={"format": "pt"})


def test_the_generated_tables_are_those_of_the_code():
    for file, text in pages(ROOT).items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name} is out of date; run  python -m glue.docs"


def test_a_table_that_is_out_of_date_is_told_and_then_written(tmp_path, monkeypatch, capsys):
    copied(tmp_path, "zoo.yaml", "README.md", "docs")
    monkeypatch.chdir(tmp_path)
    assert main(["--check"]) == 0
    (tmp_path / "docs" / "methods.md").write_text("old")
    (tmp_path / "README.md").write_text(README.replace("| merging |", "| melting |"))
    assert main(["--check"]) == 1
    assert capsys.readouterr().out.count("is out of date; run  python -m glue.docs") == 2
    assert main([]) == 0 and main(["--check"]) == 0
    assert (tmp_path / "README.md").read_text() == README


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# glue\n")
    with pytest.raises(GlueError, match="has no place for the table of methods"):
        pages(tmp_path)


def test_every_command_is_mentioned_in_the_readme():
    from glue.cli import app, zoo_app

    def names(of) -> list[str]:
        return [command.name or command.callback.__name__ for command in of.registered_commands]

    for name in [f"glue {name}" for name in names(app)] + [f"glue zoo {name}" for name in names(zoo_app)]:
        assert re.search(rf"\b{name}\b", README), f"README.md does not mention  {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_tree_in_the_readme_is_the_tree():
    tree = next(block for block in blocks(README, "text") if block.startswith("glue/\n"))
    inner = {"glue/", "methods/", "mergekit/", "strategies/", "levels/", "routers/", "selectors/"}
    told = set(re.findall(r"\b\w+(?:\.py|/)", tree.split("recipes/ ")[0])) - inner
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "glue").iterdir() if not path.name.startswith("__")}
    assert told == there


def test_the_recipe_in_the_readme_can_be_planned(tmp_path):
    text = next(block for block in blocks(README, "yaml") if "board:" in block)
    assert len(text.splitlines()) == 20
    zoo = copied(tmp_path, "zoo.yaml", "recipes", "benchmarks")
    (tmp_path / "recipes" / "mine.yaml").write_text(text)
    plan = make_plan(read_recipe(tmp_path / "recipes" / "mine.yaml"), zoo)
    mine = {task.line.name: task.state for task in plan if task.name.startswith("mine/")}
    assert mine == dict.fromkeys(("taught", "average", "ties", "found", "scored"), "waiting")


def test_the_examples_of_zoo_yaml_and_of_suites_can_be_read(tmp_path):
    from glue.evaluate.suite import read_suite, task_items

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (tmp_path / "zoo.yaml").write_text(next(block for block in blocks(page, "yaml") if block.startswith("members:")))
    assert [member.name for member in Zoo(tmp_path / "zoo.yaml")] == ["mine", "adapted", "llama"]
    (tmp_path / "own.yaml").write_text(next(block for block in blocks(page, "yaml") if "tasks:" in block))
    (tmp_path / "dev.jsonl").write_text(blocks(page, "json")[0])
    task, = read_suite(tmp_path / "own.yaml").tasks
    item, = task_items(task, tmp_path, "dev")
    assert (task.data, item.answer) == ("my-questions", "metal")


def test_the_example_of_a_merge_method_is_the_one_that_the_laws_test():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    laws = (ROOT / "tests" / "laws" / "test_merging.py").read_text(encoding="utf-8")
    assert blocks(page, "python")[0].strip() in laws


def test_the_zoos_of_the_paper_are_as_large_as_their_names_say(tmp_path):
    zoo = copied(tmp_path, "zoo.yaml")
    for name in ("which2", "which4-chat", "which4-domain", "which8", "which12", "which16"):
        members = zoo.select(f"tag:{name}")
        assert len(members) == int(re.findall(r"\d+", name)[0])
        assert {member.name for member in members} <= {member.name for member in zoo.select("tag:which16")}
    derived = {member.name for member in zoo.select("tag:which16") if member.base}
    assert derived == {member.name for member in zoo.select("tag:which12")}
    assert {member.base.path for member in zoo.select("tag:which12")} == {"hub:meta-llama/Llama-2-7b-hf"}


def ask(zoo: Zoo, folder: Path) -> None:
    """One question for each benchmark of the paper that a suite can ask."""
    shutil.copytree(ROOT / "benchmarks" / "suites", folder / "benchmarks" / "suites", dirs_exist_ok=True)
    for member in zoo.select("tag:questions"):
        member.folder.mkdir(parents=True)
        for split in ("dev", "test"):
            (member.folder / f"{split}.jsonl").write_text('{"question": "w3", "choices": ["w4", "w5"], "gold": 0, '
                                                          '"answer": "w4"}\n')


@pytest.mark.parametrize("recipe, count", [("which16", 16), ("which4-chat", 5), ("which4-domain", 4)])
def test_models_of_the_paper_that_are_missing_are_told_in_one_short_error(tmp_path, cache, recipe, count):
    zoo = copied(tmp_path, "zoo.yaml", "recipes")
    ask(zoo, tmp_path)
    with pytest.raises(GlueError) as wrong:
        make_plan(read_recipe(tmp_path / "recipes" / "paper" / f"{recipe.replace('-', '_')}.yaml"), zoo)
    told = str(wrong.value)
    assert f"{count} members are not on this machine" in told
    assert len(told.splitlines()) == count + 2 and max(map(len, told.splitlines())) < 200
    wanted = {member.path.removeprefix("hub:") for member in zoo.select(f"tag:{recipe}")}
    told_of = set(re.findall(r"hf download (\S+)", told))
    assert wanted <= told_of and told_of - wanted <= {"meta-llama/Llama-2-7b-hf"}  # the base, where it is named


def test_the_command_line_tells_of_missing_models_without_a_traceback(tmp_path):
    ask(copied(tmp_path, "zoo.yaml", "recipes"), tmp_path)
    glue = [sys.executable, "-c", "from glue.cli import main; main()"]
    done = subprocess.run([*glue, "run", "recipes/paper/which16.yaml"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
                          timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("hf download") == 16 and "Traceback" not in done.stderr


def test_the_zoo_of_sixteen_clusters_merges_and_joins_with_stand_ins(tmp_path, paper):
    ask(paper, tmp_path)
    recipe = read_recipe(tmp_path / "recipes" / "paper" / "which16.yaml")
    before = {task.name: task.state for task in make_plan(recipe, paper)}
    assert before.pop("which16/families") == "ready" and set(before.values()) <= {"deferred", "waiting"}
    made = run(recipe, paper, Workers(0))
    families = {element.name: len(element.members) for element in made["families"].elements}
    assert families == {"Llama-2-7b-hf": 12, "CodeLlama-7b-Instruct-hf": 3, "CrystalChat": 1}
    assert made["ties/Llama-2-7b-hf"].base.name == "Llama-2-7b-hf"
    assert made["ties/CrystalChat"].path == paper["CrystalChat"].path
    assert made["glued"].kind == "mixture" and len(Table.read(made["scored"]).rows) == 3 * (7 + 12)


def test_the_four_chat_models_can_be_planned_with_stand_ins(tmp_path, paper):
    ask(paper, tmp_path)
    plan = make_plan(read_recipe(tmp_path / "recipes" / "paper" / "which4_chat.yaml"), paper)
    assert [task.state for task in plan] == ["ready"] * 4 + ["waiting"] * 2 + ["ready", "waiting"]
    assert [len(task.inputs) for task in plan][:4] == [4, 5, 5, 5]


def test_the_four_specialists_are_joined_with_the_words_of_the_paper(tmp_path, paper):
    ask(paper, tmp_path)
    recipe = read_recipe(tmp_path / "recipes" / "paper" / "which4_domain.yaml")
    plan = {task.line.name: task for task in make_plan(recipe, paper)}
    mixed = {name: task.choice.params for name, task in plan.items() if task.step == "mix"}
    assert {(told["level"], told["dense_layers"]) for told in mixed.values()} == {
        ("ffn", 0), ("ffn", 16), ("block", 16), ("model", 16), ("model", 0)}
    experts = {member.name for member in paper.select("tag:which4-domain")}
    assert all(set(told["router"].params["prompts"]) == experts for told in mixed.values())
    assert {name: told["router"].params["top_k"] for name, told in mixed.items()} == {
        "ffn": 2, "ffn-hybrid": 2, "ffn-sentence": 1, "block-hybrid": 1, "model-hybrid": 1, "model": 1}


def test_the_zoo_of_twelve_is_searched_with_the_settings_of_the_paper(tmp_path, paper):
    ask(paper, tmp_path)
    recipe = read_recipe(tmp_path / "recipes" / "paper" / "which12.yaml")
    plan = {task.line.name: task for task in make_plan(recipe, paper)}
    families = plan.pop("families").choice.params
    assert (families["threshold"], families["linkage"], families["part"]) == (0.95, "leader", "all")
    searches = {name: task.choice.params for name, task in plan.items() if task.step == "search"}
    assert {line.seed for line in recipe.lines} == {42} and len(searches) == 7
    assert {told["dtype"] for told in searches.values()} == {"bfloat16"}
    assert {told["merge"].method.name for name, told in searches.items() if name != "evolved-ties"} == {"linear"}
    by_hand = {name: (told["strategy"].params["order"], told["strategy"].params["coefficients"])
               for name, told in searches.items() if told["strategy"].method.name == "paper"}
    assert by_hand == {"average": ("accuracy", "average"), "coefficient": ("accuracy", "grid"),
                       "similar": ("similarity", "grid"), "dissimilar": ("dissimilarity", "grid")}
    evolved = {name: told["strategy"].params | {"trials": told["budget"] - 12} for name, told in searches.items()
               if told["strategy"].method.name == "evolve"}
    assert {(told["prove"], told["sigma"], *told["weight"]) for told in evolved.values()} == {(False, 1 / 6, 0.0, 1.0)}
    assert {name: (told["trials"], told["popsize"], told["groups"]) for name, told in evolved.items()} == {
        "evolved": (200, "by_length", 1), "evolved-ties": (200, "by_length", 1), "evolved-groups": (500, 15, 2)}
