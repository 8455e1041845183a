"""The command line: what it prints, how it exits, and that it leaves alone what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from glue import cli

RECIPE = """
about: two datasets
steps:
  - {as: words, step: data, skill: kind, train: 30, dev: 10, test: 10}
  - {as: sums, step: data, skill: logic, train: 30}
"""
Glue = Callable[..., tuple[int, str, str]]


@pytest.fixture
def glue(tmp_path: Path, monkeypatch, capsys) -> Glue:
    """glue("zoo", "list") in a fresh zoo: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo.yaml").write_text("members: {}\ninclude: zoo/members.yaml\n")
    (tmp_path / "r.yaml").write_text(RECIPE)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["glue", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err
    return call


def test_help_names_every_command(glue: Glue):
    code, out, _ = glue("--help")
    assert code == 0
    for word in ("run", "plan", "board", "eval", "generate", "methods", "schema", "init", "zoo"):
        assert f" {word} " in out


def test_a_mistake_exits_with_2_and_shows_no_traceback(tmp_path: Path):
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    (tmp_path / "r.yaml").write_text("steps: [{as: a, step: mrege}]")
    done = subprocess.run([sys.executable, "-m", "glue.cli", "run", "r.yaml"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr == "r.yaml:1:17: there is no step 'mrege'; did you mean 'merge'?\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml", "zoo.yaml"]


def test_a_word_that_is_no_command_is_an_error_of_usage(glue: Glue):
    code, _, err = glue("rnu")
    assert code == 2 and "No such command" in err


def test_plan_lists_what_is_to_be_done_and_changes_nothing(glue: Glue, tmp_path: Path):
    code, out, _ = glue("plan", "r.yaml")
    assert code == 0 and "0 of 2 tasks are done; glue run r.yaml makes the rest" in out
    assert "zoo/r/words-" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml", "zoo.yaml"]


def test_plan_for_machines_is_json(glue: Glue):
    _, out, _ = glue("plan", "r.yaml", "--json")
    assert [(row["name"], row["state"]) for row in json.loads(out)] == [("r/words", "ready"), ("r/sums", "ready")]


def test_run_then_list_show_tag_remove_and_gc(glue: Glue, tmp_path: Path):
    code, _, err = glue("run", "r.yaml", "--workers", "0")
    assert code == 0 and "✓ r/words" in err
    assert "2 of 2 tasks are done" in glue("plan", "r.yaml")[1]

    listed = {entry["name"]: entry for entry in json.loads(glue("zoo", "list", "--json")[1])}
    assert listed["r/words"]["origin"]["step"] == "data/1" and listed["r/words"]["kind"] == "dataset"
    assert "made by data/1, seed 0" in glue("zoo", "show", "r/words")[1]

    assert glue("zoo", "tag", "r/words", "--add", "mine")[1] == "r/words: mine\n"
    assert [entry["name"] for entry in json.loads(glue("zoo", "list", "tag:mine", "--json")[1])] == ["r/words"]
    assert glue("zoo", "tag", "r/words", "--drop", "mine")[1] == "r/words: no tags\n"

    assert "0 files and folders" in glue("zoo", "gc")[1]
    folder = Path(listed["r/words"]["path"])
    assert glue("zoo", "remove", "r/words")[0] == 0
    told = glue("zoo", "gc")[1]
    assert "would delete" in told and folder.name in told and folder.exists()
    assert "deleted" in glue("zoo", "gc", "--yes")[1] and not folder.exists()
    assert Path(listed["r/sums"]["path"]).exists()


def test_verify_prints_sums_and_notices_a_changed_byte(glue: Glue):
    glue("run", "r.yaml", "--workers", "0", "-q")
    code, out, _ = glue("zoo", "verify", "r/words")
    assert code == 0 and "digest as registered" in out and "train.jsonl" in out
    entry = next(item for item in json.loads(glue("zoo", "list", "--json")[1]) if item["name"] == "r/words")
    file = Path(entry["path"]) / "train.jsonl"
    file.write_text(file.read_text().replace("a", "e", 1))
    code, _, err = glue("zoo", "verify", "r/words")
    assert code == 2 and "has changed" in err


def test_quiet_is_quiet(glue: Glue):
    assert glue("run", "r.yaml", "--workers", "0", "--quiet") == (0, "", "")


def test_add_takes_a_folder_and_zoo_yaml_stays_as_it_is(glue: Glue, tmp_path: Path):
    glue("run", "r.yaml", "--workers", "0", "-q")
    made = next(item for item in json.loads(glue("zoo", "list", "--json")[1]) if item["name"] == "r/words")["path"]
    before = (tmp_path / "zoo.yaml").read_bytes()
    code, out, _ = glue("zoo", "add", made, "--name", "mine", "--kind", "dataset", "--tag", "x", "--licence", "mit")
    assert code == 0 and out.startswith("added mine (dataset, digest ")
    entry = next(item for item in json.loads(glue("zoo", "list", "--json")[1]) if item["name"] == "mine")
    assert (entry["origin"], entry["tags"], entry["licence"]) == (None, ["x"], "mit")
    assert glue("zoo", "add", "zoo/r/sums", "--kind", "dataset")[1].startswith("added sums ")  # the name of the link
    assert (tmp_path / "zoo.yaml").read_bytes() == before
    code, _, err = glue("zoo", "add", "no/such/folder")
    assert code == 2 and "does not exist" in err


def test_adding_a_model_of_the_hub_that_is_not_here_says_how_to_get_it(glue: Glue, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    code, _, err = glue("zoo", "add", "some-owner/some-model@main")
    assert code == 2 and "some-owner/some-model@main is not on this machine" in err
    assert "hf download some-owner/some-model --revision main" in err


def test_removing_a_hand_written_member_is_refused_with_the_way_to_do_it(glue: Glue, tmp_path: Path):
    (tmp_path / "zoo.yaml").write_text("members: {mine: {path: somewhere, kind: dataset}}\n")
    code, _, err = glue("zoo", "remove", "mine")
    assert code == 2 and "delete its lines there" in err


def test_init_starts_a_zoo_that_plans_and_overwrites_nothing(glue: Glue, tmp_path: Path):
    code, out, _ = glue("init", "fresh")
    assert code == 0 and "zoo.yaml" in out
    code, _, err = glue("plan", "fresh/recipes/average.yaml", "--zoo", "fresh/zoo.yaml")
    assert code == 2 and "no member has the tag 'mine'" in err
    assert glue("init", "fresh")[0] == 2


def test_methods_lists_names_parameters_and_sources(glue: Glue):
    _, out, _ = glue("methods", "merging")
    assert "ties" in out and "density" in out and "arXiv:2306.01708" in out
    rows = json.loads(glue("methods", "--json")[1])
    assert {"merging", "routing", "searching", "selecting", "teaching", "steps"} == {row["family"] for row in rows}
    code, _, err = glue("methods", "mergin")
    assert code == 2 and "did you mean 'merging'" in err


def test_a_new_merge_method_is_one_file_and_recipes_can_say_it(glue: Glue, tmp_path: Path):
    """One file in a package that declares the entry point group; nothing else is edited."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/glue_midrange.py").write_text('''
"""Midrange: half way between the smallest and the largest of each weight."""

from glue.merge import merging


@merging.add("midrange", space="weight", symmetric=True, idempotent={})
def midrange(leaf):
    """The mean of the smallest and the largest that the members have of each entry."""
    return leaf.tensors.amin(0) / 2 + leaf.tensors.amax(0) / 2
''')
    info = tmp_path / "plugin/glue_midrange-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: glue-midrange\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[glue.methods]\nmidrange = glue_midrange\n")
    (tmp_path / "m.yaml").write_text("steps: [{as: a, step: merge, members: [x], method: midrange}]")
    (tmp_path / "zoo.yaml").write_text("members: {x: {path: x}}\n")
    table = "from glue.docs import reference; print(*reference())"
    for words, expected in ((["-m", "glue.cli", "methods", "merging"], "midrange"), (["-c", table], "midrange"),
                            (["-m", "glue.cli", "schema"], '"midrange"')):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                              env={"PYTHONPATH": str(tmp_path / "plugin"), "PATH": ""}, check=True)
        assert expected in done.stdout
    done = subprocess.run([sys.executable, "-m", "glue.cli", "plan", "m.yaml"], cwd=tmp_path, capture_output=True,
                          text=True, env={"PYTHONPATH": str(tmp_path / "plugin"), "PATH": ""})
    assert "no merge method" not in done.stderr and "x is not on this machine" in done.stdout
