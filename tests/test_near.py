"""`glue zoo near`: the nearest members, from sketches that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isnan
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glue.checkpoint import Checkpoint
from glue.cli import app
from glue.cluster.similarity import similarity
from glue.cluster.sketch import Sketch
from glue.errors import ZooError
from glue.near import near
from glue.zoo import Zoo


@pytest.fixture
def zoo(tmp_path: Path, plain_model: Callable[..., Path]) -> Zoo:
    """A root, two that come from it, and a stranger."""
    plain_model(tmp_path / "root", 0)
    plain_model(tmp_path / "one", 1, tmp_path / "root")
    plain_model(tmp_path / "two", 2, tmp_path / "root")
    plain_model(tmp_path / "stranger", 3)
    lines = [f"  {name}: {{path: {tmp_path / name}, tags: [{'kin' if name != 'stranger' else 'other'}]}}"
             for name in ("root", "one", "two", "stranger")]
    (tmp_path / "zoo.yaml").write_text("\n".join(["members:", *lines, ""]))
    return Zoo(tmp_path / "zoo.yaml")


def test_the_most_alike_come_first_within_the_error_that_is_told(zoo: Zoo, tmp_path: Path):
    found = near(zoo, "one")
    assert [each.name for each in found] == ["root", "two", "stranger"]
    exact = similarity([Checkpoint(tmp_path / name) for name in ("one", "root", "two", "stranger")])[0, 1:]
    for each, cosine in zip(found, exact, strict=True):
        assert each.cosine == pytest.approx(cosine, abs=each.within + 1e-5)
    # 3 layers of 32 columns fit a sketch whole
    assert [each.within for each in found] == [0, 0, 0]


def test_changes_are_compared_from_a_base_and_a_selector_picks(zoo: Zoo):
    found = near(zoo, "one", "tag:kin", base="root")
    assert [each.name for each in found] == ["two", "root"]  # the root has not changed at all: 0
    assert abs(found[0].cosine) < 0.1 and found[1].cosine == 0


def test_a_sketch_is_made_once(zoo: Zoo, monkeypatch: pytest.MonkeyPatch):
    near(zoo, "one")
    files = sorted((zoo.folder / "sketches").iterdir())
    assert len(files) == 4 and Sketch.load(files[0]).entries
    monkeypatch.setattr("glue.cluster.sketch.sketch", lambda *_: pytest.fail("sketched again"))
    assert [each.name for each in near(zoo, "one")] == ["root", "two", "stranger"]


def test_the_command_tells_both_ways(zoo: Zoo):
    ran = CliRunner().invoke(app, ["zoo", "near", "one", "--zoo", str(zoo.file), "--json", "-q"])
    told = json.loads(ran.stdout)
    assert [row["name"] for row in told] == ["root", "two", "stranger"] and not isnan(told[0]["cosine"])
    ran = CliRunner().invoke(app, ["zoo", "near", "one", "--zoo", str(zoo.file), "-q"])
    assert ran.stdout.split().index("root") < ran.stdout.split().index("stranger")


def test_alone_there_is_nobody_near(zoo: Zoo):
    with pytest.raises(ZooError, match="no other member"):
        near(zoo, "one", "one")


def test_a_wrong_part_is_told_before_anything_is_read(zoo: Zoo):
    with pytest.raises(ZooError, match="no part 'atention'; did you mean 'attention'"):
        near(zoo, "one", part="atention")  # type: ignore[arg-type]
    assert not (zoo.folder / "sketches").exists()
