"""`step: mergekit`: a merge config as a line of a recipe, over members of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glue.checkpoint import Checkpoint
from glue.errors import GlueError
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo

CONFIG = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: one, parameters: {weight: 0.5}}
  - {model: two, parameters: {weight: 0.25}}
"""
STEP = "steps:\n  - {as: frank, step: mergekit, config: frank.yaml}\n"


@pytest.fixture
def place(tmp_path: Path, plain_model) -> Path:
    plain_model(tmp_path / "models/base", 0)
    for k, name in enumerate(("one", "two"), start=1):
        plain_model(tmp_path / "models" / name, k, tmp_path / "models/base")
    (tmp_path / "zoo.yaml").write_text("members:\n" + "".join(
        f"  {name}: {{path: models/{name}}}\n" for name in ("base", "one", "two")))
    (tmp_path / "frank.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def planned(place: Path) -> Callable[..., Plan]:
    def plan(text: str = STEP) -> Plan:
        (place / "r.yaml").write_text(text)
        return make_plan(read_recipe(place / "r.yaml"), Zoo(place / "zoo.yaml"))
    return plan


def ran(place: Path, text: str = STEP) -> Plan:
    (place / "r.yaml").write_text(text)
    with Workers(0) as workers:
        return run(read_recipe(place / "r.yaml"), Zoo(place / "zoo.yaml"), workers)


def test_a_config_makes_a_member_with_its_origin(place):
    made = ran(place)["frank"]
    assert made.kind == "model" and made.base is not None and made.base.name == "base"
    assert made.origin.step.startswith("mergekit/") and made.origin.params == {"config": CONFIG}
    base, one, two, got = (Checkpoint(path)["lm_head.weight"].double() for path in (
        place / "models/base", place / "models/one", place / "models/two", made.folder))
    assert torch.allclose(got, base + 0.5 * (one - base) + 0.25 * (two - base), atol=1e-3)
    assert "merge_method: task_arithmetic" in (made.folder / "README.md").read_text()


def test_another_text_of_the_config_is_another_member_and_the_same_is_done(place, planned):
    ran(place)
    assert planned().done
    (place / "frank.yaml").write_text(CONFIG.replace("0.25", "0.3"))
    assert [task.state for task in planned()] == ["ready"]


def test_models_of_a_config_may_be_products_of_earlier_lines(place, planned):
    text = ("steps:\n  - {as: half, step: merge, members: [one, two], method: linear}\n"
            "  - {as: frank, step: mergekit, config: frank.yaml}\n")
    (place / "frank.yaml").write_text(CONFIG.replace("model: two", "model: half"))
    assert [task.state for task in planned(text)] == ["ready", "waiting"]


@pytest.mark.parametrize("config, step, said", [
    (CONFIG.replace("weight: 0.5", "weigth: 0.5"), STEP, r"frank.yaml:5:.*did you mean 'weight'"),
    (CONFIG.replace("one", "noe"), STEP, r"there is no member 'noe'; did you mean 'one'"),
    (CONFIG, STEP.replace("frank.yaml", "frnk.yaml"), r"r.yaml:2:.*there is no merge config 'frnk.yaml'"),
    (CONFIG + "---\n" + CONFIG.replace("\nmerge", "\nname: b\nmerge"), STEP, "holds 2 merges"),
    (CONFIG + "tokenizer: {source: union}\n", STEP, "has to go through mergekit itself")])
def test_mistakes_are_found_while_planning(place, planned, config, step, said):
    (place / "frank.yaml").write_text(config)
    with pytest.raises(GlueError, match=said):
        planned(step)
