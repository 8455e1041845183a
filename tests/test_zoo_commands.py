"""`glue zoo atlas`, `glue zoo align`, `glue generate` and `glue run --on`, as people type them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from glue.checkpoint import Checkpoint
from glue.cli import app
from glue.cluster.twins import Permuted
from glue.errors import GlueError
from glue.family import families
from glue.kinds import load
from glue.kinds.text import continued
from glue.member import Member
from glue.mix.levels import text
from glue.mix.parts import Dev, Parts
from glue.mix.site import gates
from glue.writer import Writer


@pytest.fixture
def zoo(tmp_path: Path, plain_model: Callable[..., Path], tiny: Callable[..., Member]) -> Path:
    """A root, one that comes from it, its twin with other neurons first, and a stranger."""
    plain_model(tmp_path / "root", 0)
    plain_model(tmp_path / "one", 1, tmp_path / "root")
    plain_model(tmp_path / "stranger", 3)
    turned = torch.arange(47, -1, -1)
    twin = Permuted(Checkpoint(tmp_path / "one"), {f"model.layers.{k}.mlp": turned for k in range(3)})
    (tmp_path / "twin").mkdir()
    with Writer(tmp_path / "twin", twin.headers) as writer:
        for name in twin:
            writer.write(name, twin[name])
    (tmp_path / "twin" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    tiny("words")
    for file in (tmp_path / "words").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "twin")
    lines = [f"  {name}: {{path: {tmp_path / name}}}" for name in ("root", "one", "twin", "stranger")]
    (tmp_path / "zoo.yaml").write_text("\n".join(["members:", *lines, ""]))
    return tmp_path / "zoo.yaml"


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=True)


def test_the_atlas_tells_families_and_verdicts_and_draws_them(zoo: Path, tmp_path: Path):
    picture = tmp_path / "atlas.svg"
    ran = typed("zoo", "atlas", "--zoo", str(zoo), "--twins", "--json", "--picture", str(picture))
    told = json.loads(ran.stdout)
    families = {frozenset(family["members"]) for family in told["families"]}
    assert frozenset({"root", "one"}) in families and frozenset({"stranger"}) in families
    causes = {frozenset((pair["one"], pair["other"])): pair["cause"] for pair in told["pairs"]}
    assert causes[frozenset({"one", "twin"})] == "copy" and causes[frozenset({"one", "stranger"})] == "unrelated"
    assert picture.read_text().startswith("<svg") and "stranger" in picture.read_text()
    shown = typed("zoo", "atlas", "--zoo", str(zoo), "-q")
    assert shown.exit_code == 0 and "4 members" in shown.stdout and "Traceback" not in shown.stdout


def test_a_picture_of_a_kind_that_cannot_be_drawn_is_refused_before_anything_is_read(zoo: Path, tmp_path: Path):
    ran = typed("zoo", "atlas", "--zoo", str(tmp_path / "nowhere.yaml"), "--picture", str(tmp_path / "atlas.doc"))
    assert isinstance(ran.exception, GlueError) and "atlas.doc" in str(ran.exception)


def test_align_writes_the_twin_in_the_order_of_the_other(zoo: Path, tmp_path: Path):
    ran = typed("zoo", "align", "twin", str(tmp_path / "aligned"), "--to", "one", "--zoo", str(zoo), "--json")
    told = json.loads(ran.stdout)
    assert told["cosine_before"] < 0.9 and told["cosine_after"] > 0.999
    one, aligned = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "aligned")
    assert all(aligned[name].equal(one[name]) for name in one)


def test_workers_that_are_nowhere_are_refused_with_the_right_word(zoo: Path, tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps:\n  - {as: average, step: merge, members: [root, one], method: linear}\n")
    ran = typed("run", str(recipe), "--zoo", str(zoo), "--on", "rays")
    assert isinstance(ran.exception, GlueError) and "did you mean 'ray'" in str(ran.exception)


def test_generate_goes_on_from_the_prompt_for_a_model_and_for_a_mixture_by_text(tmp_path: Path,
                                                                              tiny: Callable[..., Member]):
    experts = (tiny("one", seed=1), tiny("two", seed=2))
    dev = Dev(["w3 w4", "w5"], torch.eye(2), torch.zeros(2, dtype=torch.long))
    parts = Parts(experts, None, experts[0])
    text.write(tmp_path / "both", parts, gates(families("routing").choose("random"), text.sites(parts, dev)))
    (tmp_path / "zoo.yaml").write_text(f"members:\n  one: {{path: {tmp_path / 'one'}}}\n"
                                       f"  both: {{path: {tmp_path / 'both'}, kind: mixture}}\n")
    said = {name: typed("generate", name, "--prompt", "w3 w4", "--tokens", "4", "--zoo", str(tmp_path / "zoo.yaml"))
            for name in ("one", "both")}
    alone = {expert.name: continued(load(expert), "w3 w4", 4) for expert in experts}
    assert said["one"].stdout.rstrip("\n") == alone["one"] and alone["one"] != alone["two"]
    assert said["both"].stdout.rstrip("\n") in alone.values()
