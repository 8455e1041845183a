"""Plans and runs on a small zoo: what is found before anything runs, what is done again and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glue.checkpoint import Checkpoint, Header
from glue.errors import GlueError, RunError
from glue.member import FOLDER_NOTE
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.show.plans import plan_rows
from glue.workers import Workers
from glue.writer import Writer
from glue.zoo import Zoo

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.0.mlp.up_proj.weight": (12, 8),
          "model.embed_tokens.weight": (6, 8)}


def weights(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder, {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A zoo of a base, two children of it, a stranger of the same shape, and one of another shape."""
    base = weights(0)
    write_model(tmp_path / "models/base", base)
    for k, name in enumerate(("left", "right"), start=1):
        noise = weights(k)
        write_model(tmp_path / "models" / name, {key: value + 0.05 * noise[key] for key, value in base.items()})
    write_model(tmp_path / "models/stranger", weights(9))
    write_model(tmp_path / "models/odd", weights(5, {name: (shape[0], 4) for name, shape in SHAPES.items()}))
    (tmp_path / "zoo.yaml").write_text("""
members:
  base:     {path: models/base, tags: [all]}
  left:     {path: models/left, tags: [all, child], base: base}
  right:    {path: models/right, tags: [all, child], base: base}
  stranger: {path: models/stranger, tags: [all]}
  odd:      {path: models/odd, tags: [all]}
include: zoo/members.yaml
""")
    return tmp_path


@pytest.fixture
def planned(place: Path) -> Callable[[str], Plan]:
    def plan(text: str, name: str = "r") -> Plan:
        (place / f"{name}.yaml").write_text(text)
        return make_plan(read_recipe(place / f"{name}.yaml"), Zoo(place / "zoo.yaml"))
    return plan


@pytest.fixture
def ran(place: Path, monkeypatch) -> Callable[..., Plan]:
    """Run a recipe in this process; models here have no tokenizer, so only weights are written."""
    monkeypatch.setattr("glue.kinds.frame.copy_frame", lambda member, folder: None)

    def go(text: str, name: str = "r") -> Plan:
        (place / f"{name}.yaml").write_text(text)
        with Workers(0) as workers:
            return run(read_recipe(place / f"{name}.yaml"), Zoo(place / "zoo.yaml"), workers)
    return go


def states(plan: Plan) -> dict[str, str]:
    return {task.name: task.state for task in plan}


DATA = "{as: words, step: data, skill: kind, train: 20, dev: 5}"
MISTAKES = {
    "unknown step": ("steps: [{as: a, step: mrege, members: [base], method: linear}]", "did you mean 'merge'"),
    "unknown method": ("steps: [{as: a, step: merge, members: [base], method: liner}]", "did you mean 'linear'"),
    "unknown parameter": ("steps: [{as: a, step: merge, members: [left], base: base, method: {ties: {densty: 1}}}]",
                          "did you mean 'density'"),
    "unknown key of a step": ("steps: [{as: a, step: merge, membres: [base], method: linear}]",
                              "did you mean 'members'"),
    "unknown member": ("steps: [{as: a, step: merge, members: [bse], method: linear}]", "did you mean 'base'"),
    "wrong type": ("steps: [{as: a, step: data, skill: kind, train: many}]", "whole number"),
    "out of range": ("steps: [{as: a, step: merge, members: [left], base: base, method: {ties: {density: 1.7}}}]",
                     "less than or equal to 1"),
    "duplicate name": (f"steps: [{DATA}, {DATA}]", "another name"),
    "bad YAML": ("steps:\n  - {as: a, step: data\n  - {as: b}", "missing colon, bracket or quote"),
    "hostile tag": ("steps: [{as: a, step: data, skill: !!python/object/apply:os.system ['touch hit']}]",
                    "remove the tag"),
    "name that is a path": ("steps: [{as: ../../etc/x, step: data, skill: kind, train: 5}]", "a name is no path"),
    "no base": ("steps: [{as: a, step: merge, members: [left, right], method: task_arithmetic}]", "add  base:"),
    "shapes differ": ("steps: [{as: a, step: merge, members: [left, odd], method: linear}]",
                      "run the cluster step first"),
    "later step": (f"steps: [{{as: a, step: merge, members: [b], method: linear}}, {DATA.replace('words', 'b')}]",
                   "move that step up"),
    "test split": (f"steps: [{{as: a, step: search, members: [left], strategy: best, suite: tiny:test}}, {DATA}]",
                   "the test split is for reporting"),
    "search over two": ("steps: [{as: w, step: data, skill: kind, dev: 5}, {as: a, step: search, members: [left, "
                        "right], strategy: greedy, merge: nuslerp, suite: s.yaml:dev}]", "any number of members"),
    "search without weights": ("steps: [{as: w, step: data, skill: kind, dev: 5}, {as: a, step: search, members: "
                               "[left, right], strategy: greedy, merge: slerp, suite: s.yaml:dev}]",
                               "takes no weight for each member"),
    "missing parameter": ("steps: [{as: a, step: merge, members: [base]}]", "add  method:"),
    "wrong kind": (f"steps: [{DATA}, {{as: a, step: merge, members: [words], method: linear}}]", "is a dataset"),
    "each of no group": ("steps: [{as: a, step: merge, each: base, method: linear}]", "maps a step over a group"),
    "unknown tag": ("steps: [{as: a, step: merge, members: [tag:al], method: linear}]", "did you mean 'all'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_short_error_with_its_place_and_the_fix_and_nothing_is_written(mistake, place, planned):
    text, expected = MISTAKES[mistake]
    before = sorted(place.rglob("*"))
    with pytest.raises(GlueError) as caught:
        planned(text)
    said = str(caught.value)
    assert expected in said
    assert len(said.splitlines()) <= 8
    assert "r.yaml:" in said.splitlines()[0] and said.split("r.yaml:")[1][0].isdigit(), said
    left = [path for path in sorted(place.rglob("*")) if path not in before and path.name != "r.yaml"]
    assert [path.name for path in left if path.name not in ("zoo", "digests.json", ".digests.json.lock")] == []
    assert not (place / "hit").exists()


def test_a_word_for_all_lines_is_a_parameter_of_the_steps_that_know_it_and_no_other(planned, place):
    lines = """steps:
  - {as: d, step: data, skill: kind, train: 4, dev: 4, test: 4}
  - {as: m, step: merge, members: [left, right], method: linear}
  - {as: s, step: evaluate, members: [left], suite: "%s:test"}
  - {as: t, step: evaluate, members: [left], suite: "%s:test", batch_size: 2}
"""
    folder = place / "benchmarks" / "suites"
    folder.mkdir(parents=True)
    (folder / "u.yaml").write_text("tasks:\n  kind: {data: r/d, output: choice, metric: acc, chance: 0.25}\n")
    lines = lines.replace("%s", "u")
    plain, told = planned(lines), planned("device: auto\nbatch_size: 7\n" + lines)
    assert [task.choice.params["batch_size"] for task in told if task.step == "evaluate"] == [7, 2]
    assert all(task.choice.params["device"] == "auto" for task in told if task.step == "evaluate")
    assert [task.origin for task in plain] == [task.origin for task in told]  # how it is done, not what comes out
    with pytest.raises(GlueError, match="'batch_size' cannot be 0"):
        planned("batch_size: 0\n" + lines)


def test_all_mistakes_of_a_recipe_are_told_at_once(planned):
    with pytest.raises(GlueError) as caught:
        planned("steps:\n  - {as: a, step: merge, members: [bse], method: linear}\n"
                "  - {as: b, step: merge, members: [base], method: liner}\n")
    assert "r.yaml:2:" in str(caught.value) and "r.yaml:3:" in str(caught.value)


MERGES = """
steps:
  - {as: mean, step: merge, members: [left, right], method: linear}
  - {as: sum, step: merge, members: [left, right], base: base, method: {task_arithmetic: {weight: 0.5}}}
  - {as: both, step: merge, members: [mean, sum], method: linear}
"""


def test_a_second_run_does_nothing(ran, planned, place):
    first = ran(MERGES)
    register = (place / "zoo/members.yaml").read_bytes()
    assert set(states(planned(MERGES)).values()) == {"done"}
    second = ran(MERGES)
    assert (place / "zoo/members.yaml").read_bytes() == register
    assert [plan["both"].version for plan in (first, second)] == [second["both"].version] * 2


def test_a_merge_is_what_its_method_says(ran, place):
    plan = ran(MERGES)
    found = Checkpoint(plan["sum"].path)
    parts = {name: Checkpoint(place / "models" / name) for name in ("base", "left", "right")}
    for name in SHAPES:
        base, left, right = (parts[key][name].double() for key in ("base", "left", "right"))
        torch.testing.assert_close(found[name].double(), base + 0.5 * (left - base) + 0.5 * (right - base),
                                   rtol=0, atol=1e-6)


def test_a_changed_parameter_runs_exactly_what_depends_on_it(ran, planned):
    ran(MERGES)
    changed = planned(MERGES.replace("weight: 0.5", "weight: 0.6"))
    assert states(changed) == {"r/mean": "done", "r/sum": "ready", "r/both": "waiting"}


def test_a_changed_weight_runs_exactly_what_depends_on_it(ran, planned, place):
    only_left = MERGES + "  - {as: alone, step: merge, members: [left], method: linear}\n"
    ran(only_left)
    write_model(place / "models/right", weights(77))
    assert states(planned(only_left)) == {"r/mean": "ready", "r/sum": "ready", "r/both": "waiting", "r/alone": "done"}


def test_a_product_that_was_changed_by_hand_is_made_again(ran, planned):
    plan = ran(MERGES)
    write_model(Path(plan["mean"].path), weights(3))
    assert states(planned(MERGES))["r/mean"] == "ready"


def test_defaults_that_are_spelled_out_change_nothing(ran, planned):
    ran(MERGES)
    spelled = MERGES.replace("method: linear}", "method: {linear: {normalize: true, weight: 1.0}}}")
    assert set(states(planned(spelled)).values()) == {"done"}


def test_another_seed_is_another_origin(ran, planned, place):
    ran(MERGES)
    assert states(planned("seed: 1\n" + MERGES))["r/mean"] == "ready"


def test_an_equal_origin_under_another_name_is_the_same_member(ran):
    first = ran(MERGES)["mean"]
    other = ran(MERGES.replace("as: mean", "as: average").replace("[mean, sum]", "[average, sum]"))["average"]
    assert (other.path, other.digest) == (first.path, first.digest)


def test_the_bare_name_is_what_the_recipe_made_last(ran, place):
    first = ran(MERGES)["sum"]
    second = ran(MERGES.replace("weight: 0.5", "weight: 0.6"))["sum"]
    zoo = Zoo(place / "zoo.yaml")
    assert zoo["r/sum"].digest == second.digest != first.digest
    assert zoo[first.version].path == first.path
    ran(MERGES)
    assert Zoo(place / "zoo.yaml")["r/sum"].digest == first.digest


def test_shares_that_name_one_member_twice_are_refused(ran, planned):
    ran("steps: [{as: w, step: data, skill: kind, train: 5}]")
    with pytest.raises(GlueError, match="names one member twice: w, r/w"):
        planned("steps: [{as: w, step: data, skill: kind, train: 5}, {as: a, step: tune, base: base, steps: 1, "
                "learning_rate: 1e-3, data: {w: 1, r/w: 2}}]")


def test_a_name_in_the_zoo_points_to_the_newest_version(ran, place):
    first = ran(MERGES)["sum"]
    assert (place / "zoo/r/sum").resolve() == Path(first.path)
    second = ran(MERGES.replace("weight: 0.5", "weight: 0.6"))["sum"]
    assert (place / "zoo/r/sum").resolve() == Path(second.path) != Path(first.path)


def test_a_folder_that_was_published_and_not_registered_is_taken_as_it_is(ran, place, monkeypatch):
    """As after a kill between the two, or beside another run of the same recipe."""
    from glue import run as running

    member = ran(MERGES)["mean"]
    made = (Path(member.path) / "model.safetensors").stat().st_ino
    Zoo(place / "zoo.yaml").remove("r/mean")
    with monkeypatch.context() as patch:
        patch.setattr(running._Run, "_made", None)  # nothing is made
        again = ran(MERGES)["mean"]
    assert again == member and again.origin.made_with == member.origin.made_with
    assert (Path(member.path) / "model.safetensors").stat().st_ino == made
    assert not [path for path in (place / "zoo/r").iterdir() if "replaced" in path.name]


def test_a_published_folder_that_is_not_what_its_note_says_is_made_again(ran, place):
    member = ran(MERGES)["mean"]
    note = json.loads((member.folder / FOLDER_NOTE).read_text())
    for damage in ({"key": "0" * 64}, {"digest": "0" * 32}, {"origin": None}):
        (member.folder / FOLDER_NOTE).write_text(json.dumps({**note, **damage}))
        Zoo(place / "zoo.yaml").remove("r/mean")
        assert ran(MERGES)["mean"].digest == member.digest
    with open(member.folder / "model.safetensors", "r+b") as file:
        file.seek(-8, 2)
        file.write(b"\1" * 8)
    Zoo(place / "zoo.yaml").remove("r/mean")
    assert ran(MERGES)["mean"].digest == member.digest


def test_a_name_that_becomes_a_group_does_not_write_into_the_member_it_was(ran, place):
    member = ran("steps: [{as: merged, step: merge, members: [left, right], method: linear}]")["merged"]
    before = sorted(path.name for path in Path(member.path).iterdir())
    ran(FAMILIES)
    assert sorted(path.name for path in Path(member.path).iterdir()) == before
    assert (place / "zoo/r/merged").is_dir() and not (place / "zoo/r/merged").is_symlink()


FAMILIES = """
steps:
  - {as: families, step: cluster, members: [tag:all], threshold: 0.8}
  - {as: merged, step: merge, each: families, base: root, method: {task_arithmetic: {weight: 0.5}}}
  - {as: again, step: merge, members: [merged/base, left], method: linear}
"""


def test_what_a_group_decides_is_deferred_until_it_is_there(planned):
    plan = planned(FAMILIES)
    assert states(plan) == {"r/families": "ready", "r/merged": "deferred", "r/again": "waiting"}


def test_deferred_steps_have_their_words_checked_at_once(planned):
    with pytest.raises(GlueError, match="did you mean 'weight'"):
        planned(FAMILIES.replace("weight: 0.5", "wieght: 0.5"))


def test_families_are_clustered_merged_by_family_and_named_after_their_root(ran, place):
    plan = ran(FAMILIES)
    assert states(plan) == dict.fromkeys(["r/families", "r/merged/base", "r/merged/stranger", "r/merged/odd",
                                          "r/merged", "r/again"], "done")
    families = {element.name: [one.name for one in element.members] for element in plan["families"].elements}
    assert families == {"base": ["base", "left", "right"], "stranger": ["stranger"], "odd": ["odd"]}
    alias = plan["merged/odd"]
    assert alias.path == str(place / "models/odd") and alias.origin is not None
    assert [element.members[0].name for element in plan["merged"].elements] == ["r/merged/base", "r/merged/stranger",
                                                                               "r/merged/odd"]


def test_a_group_under_members_means_all_of_it_or_what_has_one_shape(ran):
    same = "  - {as: same, step: merge, members: [{group: merged, where: same_shape}], method: linear}\n"
    plan = ran(FAMILIES + same)
    assert plan["same"].origin.names["members"] == ("r/merged/base", "r/merged/stranger")
    with pytest.raises(GlueError, match="only members of one shape can be merged"):
        ran(FAMILIES + "  - {as: all, step: merge, members: [merged], method: linear}\n")


def test_a_failing_task_is_told_with_its_line_and_the_others_are_kept(ran, planned, place):
    text = MERGES + "  - {as: toomany, step: data, skill: kind, dev: 5000}\n"
    with pytest.raises(RunError, match=r"r\.yaml:6:6: r/toomany: .*5000"):
        ran(text)
    done = states(planned(text))
    assert done["r/mean"] == done["r/sum"] == "done" and done["r/toomany"] == "ready"
    journal = [json.loads(line) for line in next((place / "runs").glob("*.jsonl")).read_text().splitlines()]
    assert {entry["event"] for entry in journal} == {"started", "done", "failed"}


def test_a_product_says_in_its_folder_how_it_came_about(ran):
    member = ran(MERGES)["sum"]
    note = json.loads((Path(member.path) / FOLDER_NOTE).read_text())
    assert note["key"] == member.origin.key and note["digest"] == member.digest
    assert note["origin"]["params"]["method"]["params"] == {"weight": 0.5, "lambda": 1.0, "normalize": False}
    assert note["origin"]["names"] == {"members": ["left", "right"], "base": ["base"]}
    assert note["origin"]["made_with"]["torch"] == torch.__version__


def test_products_inherit_no_tags_and_selectors_see_only_this_recipe(ran, planned):
    tagged = "steps: [{as: mean, step: merge, members: [left, right], method: linear, tags: [all]}]"
    assert ran(tagged, "other")["mean"].tags == {"all"}
    plan = planned("steps: [{as: families, step: cluster, members: [tag:all]}]")
    assert {member.name for member in plan.tasks[0].inputs} == {"base", "left", "right", "stranger", "odd"}


def test_a_recipe_sees_the_products_of_its_includes_by_their_short_names(ran, place):
    (place / "first.yaml").write_text(MERGES)
    plan = ran("include: first.yaml\nsteps: [{as: top, step: merge, members: [both, left], method: linear}]")
    assert plan["top"].origin.names["members"] == ("first/both", "left")


def test_a_plan_tells_what_is_read_and_what_will_be_written(planned, place):
    row, = (told for told in plan_rows(planned(MERGES)) if told["name"] == "r/sum")
    sizes = {name: sum(file.stat().st_size for file in (place / "models" / name).iterdir())
             for name in ("base", "left", "right")}
    assert row["bytes_read"] == sum(sizes.values()) and row["bytes_written"] == max(sizes.values())
    assert row["folder"].startswith("zoo/r/sum-")
