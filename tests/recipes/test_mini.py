"""The whole chain on the miniature zoo: run once here, looked at from all sides."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glue import cli
from glue.board import leaderboard
from glue.member import FOLDER_NOTE, Table
from glue.once import step
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.report.html import report
from glue.run import Watcher, run
from glue.steps import steps
from glue.workers import Workers
from glue.zoo import Zoo
from tests.browser import chromium

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    shutil.copytree(ROOT / "benchmarks/suites", folder / "benchmarks/suites")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "zoo.yaml").write_text("members: {}\ninclude: zoo/members.yaml\n")
    return folder


def planned(place: Path, recipe: str = "recipes/mini.yaml") -> Plan:
    return make_plan(read_recipe(place / recipe), Zoo(place / "zoo.yaml"))


@pytest.fixture(scope="module")
def plan(place: Path) -> Plan:
    with Workers(2) as workers:
        return run(read_recipe(place / "recipes/mini.yaml"), Zoo(place / "zoo.yaml"), workers)


def test_every_member_is_in_one_family_and_families_are_those_that_were_bred(plan: Plan):
    families = {element.name: {member.short for member in element.members} for element in plan["families"].elements}
    assert families == {"A-base": {"A-base", "A-kind", "A-facts", "A-trans", "A-noise", "A-lora"}, "B-base": {"B-base"}}


def test_the_mixture_and_the_selective_merge_win_and_poison_is_refused(plan: Plan):
    board = leaderboard(plan)
    assert [claim.text for claim in board.claims if not claim.holds] == []
    assert board.rows[0].member == "glued"
    assert len(board.claims) == 4


def test_what_was_searched_on_is_marked_and_what_is_reported_was_not_seen(plan: Plan):
    rows = Table.read(plan["scored"]).rows
    assert not any(row.seen_by_search for row in rows)
    reported = {row.split for row in rows}
    searched = plan["merged/A-base"].seen
    assert len(searched) == 4 and not searched & reported
    assert plan["glued"].seen >= searched


def test_a_second_run_makes_nothing(place: Path, plan: Plan):
    register = (place / "zoo/members.yaml").read_bytes()
    with Workers(0) as workers:
        again = run(read_recipe(place / "recipes/mini.yaml"), Zoo(place / "zoo.yaml"), workers)
    assert again.done and (place / "zoo/members.yaml").read_bytes() == register


def test_one_changed_number_runs_what_depends_on_it_and_nothing_else(place: Path, plan: Plan):
    text = (place / "recipes/mini.yaml").read_text()
    shutil.copytree(place / "recipes/data", place / "changed/data", dirs_exist_ok=True)
    (place / "changed/mini.yaml").write_text(text.replace("members: [tag:A], method: linear",
                                                          "members: [tag:A], method: {linear: {normalize: false}}"))
    states = {task.name: task.state for task in planned(place, "changed/mini.yaml")}
    assert {name for name, state in states.items() if state != "done"} == {"mini/average", "mini/scored"}


def test_another_worker_count_gives_the_same_digests(place: Path, plan: Plan, tmp_path: Path):
    shutil.copytree(place / "benchmarks", tmp_path / "benchmarks")
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    short = (place / "recipes/mini.yaml").read_text().split("  - {as: A-kind,")[0]
    (tmp_path / "mini.yaml").write_text(short)
    with Workers(1) as workers:
        other = run(read_recipe(tmp_path / "mini.yaml"), Zoo(tmp_path / "zoo.yaml"), workers)
    for task in other:
        assert task.member and task.member.digest == plan[task.line.name].digest, task.name


def test_the_command_of_lm_eval_gives_the_score_of_the_board(place: Path, plan: Plan, tmp_path: Path):
    """The official command, in a process that does not know glue."""
    member = plan["merged/A-base"]
    tasks = next((place / "zoo/tasks").glob("mini-*"))
    names = sorted(path.stem for path in tasks.glob("glue_mini_test_*.yaml"))
    code = ("import sys; sys.modules['glue'] = None; sys.argv[0] = 'lm_eval'\n"
            "from lm_eval.__main__ import cli_evaluate; cli_evaluate()")
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", "hf", "--model_args", f"pretrained={member.path},dtype=float32",
         "--include_path", str(tasks), "--tasks", ",".join(names), "--device", "cpu", "--batch_size", "64",
         "--output_path", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    board = {row.task: row for row in Table.read(plan["scored"]).rows if row.member == member.name}
    assert len(board) == 4
    for task, row in board.items():
        told = results[f"glue_mini_test_{task}"]
        value = next(told[key] for key in told if key.split(",")[0] == row.metric)
        assert value == pytest.approx(row.value, abs=1e-9)


def test_a_product_loads_as_an_ordinary_model_folder(plan: Plan):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = plan["merged/A-base"].path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("tr : red dog", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("recipe", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_can_be_planned_on_an_empty_zoo(recipe: str, place: Path, tmp_path: Path):
    (tmp_path / "benchmarks").symlink_to(place / "benchmarks")
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    plan = make_plan(read_recipe(place / recipe), Zoo(tmp_path / "zoo.yaml"))
    assert len(plan.tasks) > 3 and not any(task.state == "done" for task in plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks", "zoo.yaml"]


def test_every_step_leaves_one_member_whose_folder_tells_its_origin(plan: Plan):
    used = {task.step for task in plan}
    assert used == {method.name for method in steps} - {"mergekit"}  # which needs a config, and has tests of its own
    for task in plan:
        assert task.member and task.member.origin and task.origin and task.member.origin.key == task.origin.key
        if not task.folder(plan.zoo).exists():  # a family of one: its only member under a new name
            assert (task.member.digest,) == task.member.origin.inputs["members"]
            continue
        note = json.loads((task.folder(plan.zoo) / FOLDER_NOTE).read_text())
        assert (note["key"], note["kind"], note["name"]) == (task.origin.key, task.member.kind, task.name)


def test_what_was_measured_once_is_not_measured_again(place: Path, plan: Plan, monkeypatch):
    def never(*_):
        raise AssertionError("this was measured before")

    monkeypatch.setattr("glue.steps.evaluate.work", never)
    with Workers(0) as workers:
        members = ["mini/A-kind", "mini/merged/A-base"]
        done = step(Zoo(place / "zoo.yaml"), "scores", "evaluate", {"members": members, "suite": "mini:test"}, workers,
                    Watcher())
    board = {(row.digest, row.task): row.results for row in Table.read(plan["scored"]).rows}
    rows = Table.read(done["scores"]).rows
    assert {row.member for row in rows} == set(members)
    assert all(row.results == board[row.digest, row.task] for row in rows)


def said(words: list[str], place: Path, monkeypatch, capsys) -> tuple[int, str]:
    """The exit code and the output of a command of glue in that place."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["glue", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0), capsys.readouterr().out


def test_a_mixture_is_made_again_from_its_folder_and_a_changed_input_is_told(place: Path, plan: Plan, tmp_path: Path,
                                                                             monkeypatch, capsys):
    here = tmp_path / "here"
    shutil.copytree(place, here, symlinks=True)
    shutil.rmtree(here / "recipes")
    code, text = said(["reproduce", "zoo/mini/glued", "--workers", "0", "-q"], here, monkeypatch, capsys)
    assert (code, text.split()[0]) == (0, "equal")
    assert plan["glued"].digest in text
    file = here / Path(plan["merged/A-base"].path).relative_to(place) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    code, text = said(["reproduce", "mini/glued", "--workers", "0", "--json"], here, monkeypatch, capsys)
    told = json.loads(text)
    assert code == 1 and not told["equal"] and told["lost"][0]["name"] == "mini/merged/A-base"


def test_the_board_of_a_suite_shows_everyone_who_was_measured_on_it(place: Path, plan: Plan, monkeypatch, capsys,
                                                                    tmp_path: Path):
    code, text = said(["board", "--suite", "mini:test", "--json", "--html", str(tmp_path / "b.html"), "--markdown",
                       str(tmp_path / "b.md")], place, monkeypatch, capsys)
    of_recipe = leaderboard(plan)
    rows = {row["member"]: row["mean"] for row in json.loads(text)["rows"]}
    assert code == 0 and {f"mini/{row.member}" for row in of_recipe.rows if "/" not in row.member} <= set(rows)
    assert rows["mini/glued"] == of_recipe.rows[0].mean.value
    assert "mini/glued" in (tmp_path / "b.html").read_text() and "| mini/glued |" in (tmp_path / "b.md").read_text()


def test_the_report_of_a_recipe_is_one_page(place: Path, plan: Plan, monkeypatch, capsys, tmp_path: Path):
    code, _ = said(["board", "recipes/mini.yaml", "--html", str(tmp_path / "r.html")], place, monkeypatch, capsys)
    page = (tmp_path / "r.html").read_text()
    assert code == 0 and all(f'<section id="{part}"' in page for part in ("board", "similarity", "searches", "lineage"))


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_of_a_run_opens_offline_without_complaint_and_fits_the_window(place: Path, plan: Plan, width: int,
                                                                                  tmp_path: Path):
    (tmp_path / "page.html").write_text(report(plan), encoding="utf-8")
    with chromium(tmp_path / "profile") as window:
        window.open(tmp_path / "page.html", width)
        assert window.troubles == [] and [url.partition(":")[0] for url in window.asked] == ["file"]
        assert window.value("document.documentElement.scrollWidth") == width
        for part in ("table.board", "#similarity svg.drawn", "svg.walk", "svg.graph"):
            assert window.value(f"document.querySelector('{part}').getBoundingClientRect().height") > 80, part


def test_a_board_of_nothing_or_of_two_things_says_what_it_may_be_of(place: Path, monkeypatch, capsys):
    for words in (["board"], ["board", "recipes/mini.yaml", "--suite", "mini:test"], ["eval", "mini/glued"]):
        assert said(words, place, monkeypatch, capsys)[0] == 2


def test_the_lineage_of_a_mixture_goes_down_to_what_was_trained(place: Path, plan: Plan, monkeypatch, capsys):
    code, text = said(["zoo", "lineage", "mini/glued"], place, monkeypatch, capsys)
    assert code == 0 and text.startswith("mini/glued") and "mini/A-base" in text and "pretrain/" in text
