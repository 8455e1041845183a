"""The tree of a member: its parents by origin and by base, each once, by content and not by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from glue.errors import ZooError
from glue.lineage import lineage
from glue.member import Member, Origin
from glue.zoo import Zoo


@pytest.fixture
def zoo(tmp_path: Path, model_folder) -> Zoo:
    """Two hand-written models, the second tuned from the first; data; a merge of both, and a mixture with the merge."""
    for seed, name in enumerate(("llama", "chat")):
        model_folder(name, seed=seed)
    (tmp_path / "zoo.yaml").write_text(
        "members:\n  llama: {path: llama, licence: llama2}\n  chat: {path: chat, base: llama}\n")
    found = Zoo(tmp_path / "zoo.yaml")
    llama, chat = (found.identified(found[name]) for name in ("llama", "chat"))
    data = made(found, "r/data", "dataset", "data/1", "d" * 32)
    merged = made(found, "r/merged", "model", "merge/1", "a" * 32, members=[llama, chat], base=[llama])
    made(found, "r/glued", "mixture", "mix/2", "b" * 32, members=[merged, chat], suite=[data])
    return found


def made(zoo: Zoo, name: str, kind: str, step: str, digest: str, **roles: list[Member]) -> Member:
    origin = Origin(step, {role: tuple(one.digest for one in some) for role, some in roles.items()}, {}, 0,
                    {role: tuple(one.name for one in some) for role, some in roles.items()})
    return zoo.add(Member(name, kind, str(zoo.folder / name), origin=origin, digest=digest))


def test_parents_come_by_origin_and_by_base_and_are_told_once(zoo):
    tree = lineage(zoo, "r/glued")
    assert [one.name for one in tree] == ["r/glued", "r/merged", "llama", "chat"]
    merged, chat = tree.parents
    assert merged.roles == ("members",) and chat.again and chat.parents == ()
    llama, once = merged.parents
    assert llama.roles == ("members", "base") and llama.licence == "llama2"
    assert not once.again and [(one.name, one.roles, one.again) for one in once.parents] == [
        ("llama", ("derives from",), True)]


def test_the_text_draws_what_stands_below_what(zoo):
    marks = {name: zoo.identified(zoo[name]).digest[:8] for name in ("llama", "chat")}
    assert list(lineage(zoo, "r/glued").lines()) == [
        "r/glued  (mixture, mix/2, bbbbbbbb)",
        "├─ r/merged  (model, merge/1, aaaaaaaa)  as members",
        f"│  ├─ llama  (model, {marks['llama']}, llama2)  as members, base",
        f"│  └─ chat  (model, {marks['chat']})  as members",
        f"│     └─ llama  (model, {marks['llama']}, llama2)  as derives from",
        f"└─ chat  (model, {marks['chat']})  as members  see above"]


def test_datasets_are_told_where_they_are_wanted(zoo):
    assert "r/data" not in [one.name for one in lineage(zoo, "r/glued")]
    assert [one.name for one in lineage(zoo, "r/glued", data=True)][-1] == "r/data"


def test_another_member_under_the_same_name_is_no_parent(zoo, tmp_path, model_folder):
    zoo.remove("r/merged")
    made(zoo, "r/merged", "model", "merge/1", "c" * 32)
    parent = lineage(Zoo(zoo.file), "r/glued").parents[0]
    assert (parent.name, parent.kind, parent.digest) == ("r/merged", "gone", "a" * 32)
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "other"}')
    assert [one.kind for one in lineage(Zoo(zoo.file), "r/merged@cccccccc")] == ["model"]


def test_a_parent_that_was_renamed_is_found_by_its_content(zoo):
    again = zoo["r/merged"].named("r/better")
    zoo.remove("r/merged")
    zoo.add(again)
    assert lineage(Zoo(zoo.file), "r/glued").parents[0].name == "r/better"


def test_the_data_of_a_tree_holds_all_of_it(zoo):
    told = lineage(zoo, "r/glued").as_data()
    assert told["roles"] == [] and told["step"] == "mix/2"
    assert [parent["name"] for parent in told["parents"][0]["parents"]] == ["llama", "chat"]


def test_an_unknown_member_is_told_with_the_nearest(zoo):
    with pytest.raises(ZooError, match="did you mean 'r/glued'"):
        lineage(zoo, "glued")
