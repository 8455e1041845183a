"""Care of a zoo: adding, verifying, and clearing out what nobody refers to and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from glue.care import added, start, verified
from glue.errors import ZooError
from glue.identity import identify
from glue.member import FOLDER_NOTE, Element, Member, Origin
from glue.spare import ANSWERED, DRAFTS, products, pruned, stale, unreferenced
from glue.zoo import Zoo


@pytest.fixture
def zoo(tmp_path) -> Zoo:
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    return Zoo(tmp_path / "zoo.yaml")


@pytest.fixture
def made(zoo, model_folder):
    """made("x", seed) puts a product into zoo/ and registers it, as a run does."""
    def make(name: str, seed: int = 0, *, inputs: tuple[Member, ...] = (), **more) -> Member:
        origin = Origin("merge/1", {"members": tuple(member.digest for member in inputs)}, {"name": name}, seed)
        folder = model_folder(f"zoo/r/{name}-{origin.key[:8]}", seed=seed)
        (folder / FOLDER_NOTE).write_text(json.dumps({"key": origin.key}))
        fingerprint, digest = identify(folder)
        return zoo.add(Member(f"r/{name}", "model", str(folder), origin=origin, fingerprint=fingerprint, digest=digest,
                              **more))
    return make


def cleared(zoo: Zoo, *, delete: bool = False) -> list[str]:
    return [folder for folder, _ in unreferenced(Zoo(zoo.file), delete=delete)]


def test_a_removed_product_is_found_and_only_deleted_when_told(zoo, made):
    gone, kept = made("gone", 1), made("kept", 2)
    assert cleared(zoo) == []
    zoo.remove("r/gone")
    assert cleared(zoo) == [gone.path] and Path(gone.path).exists()
    assert cleared(zoo, delete=True) == [gone.path] and not Path(gone.path).exists() and Path(kept.path).exists()
    assert cleared(zoo) == []


def test_an_older_version_is_kept_while_something_newest_was_made_from_it(zoo, made):
    old = made("x", 1)
    user = made("user", 5, inputs=(old,))
    made("x", 2)
    assert cleared(zoo) == []
    zoo.remove("r/user")
    assert sorted(cleared(zoo)) == sorted([old.path, user.path])


def test_what_an_older_version_that_is_needed_stands_on_is_kept_too(zoo, made):
    base = made("base", 1)
    old = made("x", 2, base=base)
    made("user", 5, inputs=(old,))
    zoo.remove("r/base")
    made("x", 3)
    assert cleared(zoo) == []


def test_members_of_a_group_and_their_root_are_kept_without_names_of_their_own(zoo, made):
    root, one = made("root", 1), made("one", 2)
    zoo.add(Member("r/g", "group", "/g", digest="g", elements=(Element("root", root, (one,)),)))
    for name in ("r/root", "r/one"):
        zoo.remove(name)
    assert cleared(zoo) == []
    zoo.remove("r/g")
    assert sorted(cleared(zoo)) == sorted([root.path, one.path])


def test_a_folder_that_a_member_leads_to_under_another_name_is_kept(zoo, made):
    member = made("x", 1)
    zoo.add(replace(member, name="r/alias"))
    zoo.remove("r/x")
    assert cleared(zoo) == []


def test_the_log_of_a_search_that_found_a_member_as_it_is_is_kept(zoo, made, tmp_path):
    single, found = made("single", 1), made("best", 2)
    zoo.remove("r/best")
    zoo.add(replace(found, path=single.path))
    assert cleared(zoo) == []
    zoo.remove("r/best")
    assert cleared(zoo) == [found.path]


def test_a_folder_that_was_put_aside_is_found_though_its_key_is_that_of_a_living_member(zoo, made, tmp_path):
    member = made("x", 1)
    aside = Path(f"{member.path}.replaced-1")
    aside.mkdir()
    (aside / FOLDER_NOTE).write_text((Path(member.path) / FOLDER_NOTE).read_text())
    assert cleared(zoo, delete=True) == [str(aside)] and Path(member.path).exists() and not aside.exists()


def test_nothing_outside_the_zoo_and_nothing_without_our_note_is_deleted(zoo, made, tmp_path, model_folder):
    made("x", 1)
    outside = model_folder("outside")
    (outside / FOLDER_NOTE).write_text('{"key": "k"}')
    (tmp_path / "zoo" / "link").symlink_to(outside)
    for name, note in (("mine", None), ("damaged", "{"), ("listed", "[]"), (".drafts/now-1", '{"key": "k"}')):
        folder = model_folder(f"zoo/{name}")
        if note:
            (folder / FOLDER_NOTE).write_text(note)
    before = sorted(tmp_path.rglob("*"))
    assert cleared(zoo, delete=True) == [] and sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_kept_while_a_member_lies_inside_it(zoo, made, model_folder):
    outer = made("outer", 1)
    inner = model_folder(f"{outer.path}/inner", seed=3)
    added(zoo, str(inner), "inner", "model", None, set(), "")
    zoo.remove("r/outer")
    assert cleared(zoo, delete=True) == [] and inner.exists()


@pytest.mark.parametrize("arguments, said", [
    (("no", None, "model", None, set(), ""), "does not exist"),
    (("a", None, "modl", None, set(), ""), "mean 'model'"),
    (("a", None, "group", None, set(), ""), "no kind 'group'"),
    (("a", None, "adapter", None, set(), ""), "needs its base"),
    (("a", "../x", "model", None, set(), ""), "cannot be a name"),
    (("a", None, "model", "b", set(), ""), "no member 'b'"),
    (("a", None, "model", None, {"-x"}, ""), "cannot be a tag"),
    (("hub:../x", None, "model", None, set(), ""), "no hub path"),
    (("my model", None, "model", None, set(), ""), "'my model' cannot be a name"),
    (("l", None, "model", None, set(), ""), "holds an adapter")])
def test_what_cannot_be_added_is_refused_and_nothing_is_written(zoo, model_folder, tmp_path, monkeypatch, arguments,
                                                                said):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "my model", "l"):
        model_folder(name)
    (tmp_path / "l" / "config.json").rename(tmp_path / "l" / "adapter_config.json")
    with pytest.raises(ZooError, match=said):
        added(zoo, *arguments)
    assert not zoo.register.exists()


def test_an_added_member_is_there_with_its_identity(zoo, model_folder):
    folder = model_folder("a")
    added(zoo, str(folder), None, "model", None, {"t"}, "mit")
    member = Zoo(zoo.file)["a"]
    assert (member.digest, member.tags, member.licence) == (identify(folder)[1], {"t"}, "mit")
    with pytest.raises(ZooError, match="has a member 'a' already"):
        added(zoo, str(folder), None, "model", None, set(), "")


def test_verify_reads_every_byte_and_notices_one(zoo, made):
    member = made("x", 1)
    lines = list(verified(zoo, "r/x"))
    assert len(lines) == 4 and lines[-1] == f"{member.digest}  digest as registered"
    file = Path(member.path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ZooError, match="'r/x' has changed"):
        list(verified(zoo, "r/x"))


def test_a_zoo_is_started_once_and_can_be_opened(tmp_path):
    wrote = [str(file.relative_to(tmp_path)) for file in start(tmp_path)]
    assert wrote == ["zoo.yaml", "recipes/average.yaml", ".gitignore"] and list(Zoo(tmp_path / "zoo.yaml")) == []
    with pytest.raises(ZooError, match="is there already"):
        list(start(tmp_path))


def test_drafts_of_runs_that_have_ended_and_answers_of_members_that_are_gone_are_cleared_too(zoo, made):
    member = made("x", 1)
    drafts, answered = zoo.folder / DRAFTS, zoo.folder / ANSWERED
    for name in (f"{'a' * 16}-{os.getpid()}", f"{'b' * 16}-{2**22 + 1}"):
        (drafts / name).mkdir(parents=True)
        (drafts / name / "part").write_text("12345")
    answered.mkdir()
    for digest in (member.digest, "0" * 32):
        (answered / f"{digest}-tasks-dev.jsonl").write_text("{}\n")
    found = Zoo(zoo.file)
    assert [(one.path.name, one.size) for one in stale(found, delete=False)] == [
        (f"{'b' * 16}-{2**22 + 1}", 5), (f"{'0' * 32}-tasks-dev.jsonl", 3)]
    assert len(list(drafts.iterdir())) == len(list(answered.iterdir())) == 2
    stale(found, delete=True)
    assert [path.name for path in drafts.iterdir()] == [f"{'a' * 16}-{os.getpid()}"]
    assert [path.name for path in answered.iterdir()] == [f"{member.digest}-tasks-dev.jsonl"]


def test_answers_are_left_alone_where_a_member_is_not_here_to_tell_whose_they_are(zoo):
    zoo.file.write_text("members:\n  away: {path: hub:nobody/nothing}\n")
    (zoo.folder / ANSWERED).mkdir(parents=True)
    (zoo.folder / ANSWERED / f"{'0' * 32}-tasks-dev.jsonl").write_text("{}\n")
    assert stale(Zoo(zoo.file), delete=True) == []


def test_digests_of_folders_that_are_gone_are_forgotten(zoo, made):
    gone, kept = made("gone", 1), made("kept", 2)
    for member in (gone, kept):
        identify(Path(member.path), zoo.digests)
    assert set(json.loads(zoo.digests.read_bytes())) == {gone.path, kept.path} and pruned(zoo, delete=True) == 0
    shutil.rmtree(gone.path)
    assert pruned(zoo, delete=False) == 1 and len(json.loads(zoo.digests.read_bytes())) == 2
    assert pruned(zoo, delete=True) == 1 and set(json.loads(zoo.digests.read_bytes())) == {kept.path}


def test_products_are_counted_with_their_bytes(zoo, made):
    one, other = made("one", 1), made("other", 2)
    files = [file for member in (one, other) for file in Path(member.path).rglob("*") if file.is_file()]
    assert products(zoo) == (2, sum(file.stat().st_size for file in files))
    os.link(files[0], files[0].with_name("again"))
    assert products(zoo)[1] == sum(file.stat().st_size for file in files), "a file with two names lies there once"
