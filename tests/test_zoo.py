"""The zoo: what may be written by hand, what the register remembers, and how members are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from glue.errors import GlueError, Mistakes, ZooError
from glue.hub import well_formed
from glue.member import Element, Member, Origin
from glue.zoo import Zoo


@pytest.fixture
def zoo(tmp_path, model_folder):
    """zoo("text of members") opens the zoo anew; a and b are model folders."""
    for seed, name in enumerate("ab"):
        model_folder(name, seed=seed)

    def opened(members: str = "{a: {path: a, tags: [x]}, b: {path: b, base: a}}", more: str = "") -> Zoo:
        (tmp_path / "zoo.yaml").write_text(f"members: {members}\n{more}")
        return Zoo(tmp_path / "zoo.yaml")
    return opened


def product(tmp_path: Path, name: str, digest: str = "", *, seed: int = 0, **more) -> Member:
    from glue.identity import identify

    folder = tmp_path / more.pop("folder", "a")
    fingerprint, own = identify(folder)
    return Member(name, "model", str(folder), origin=Origin("merge/1", {"members": ("d",)}, {}, seed),
                  fingerprint=fingerprint, digest=digest or own, **more)


@pytest.mark.parametrize("members, said", [
    ("[a]", "zoo.yaml is a mapping"), ("{../x: {path: a}}", "'../x' cannot be a name"),
    ("{/x: {path: a}}", "'/x' cannot be a name"),
    ('{"": {path: a}}', "'' cannot be a name"), ('{"a\\nb": {path: a}}', "'a\\nb' cannot be a name"),
    ("{а: {path: a}}", "'а' cannot be a name"), ("{a: a}", "needs a 'path'"), ("{a: {pth: a}}", "needs a 'path'"),
    ("{a: {path: a, tgas: [x]}}", "unknown key 'tgas'; did you mean 'tags'"),
    ("{a: {path: 3}}", "'path' must be a word"),
    ("{a: {path: ''}}", "is no path"), ('{a: {path: "x\\0"}}', "is no path"),
    ("{a: {path: a, tags: x}}", "must be a list"),
    ("{a: {path: a, tags: [-x]}}", "'-x' cannot be a tag"), ("{a: {path: a, tags: [[x]]}}", "cannot be a tag"),
    ("{a: {path: a, tags: [x/y]}}", "cannot be a tag"), ("{a: {path: a, kind: modl}}", "did you mean 'model'"),
    ("{a: {path: a, kind: group}}", "unknown kind 'group'"), ("{a: {path: a, kind: adapter}}", "names no base"),
    ("{a: {path: a, base: c}}", "names the base 'c', which is not"), ("{a: {path: a, base: a}}", "'a' is its own base"),
    ("{a: {path: hub:x/y/z}}", "is no hub path"), ("{a: {path: 'hub:'}}", "is no hub path"),
    ("{a: {path: hub:../x}}", "is no hub path"), ("{a: {path: hub:o/n@../../x}}", "is no hub path")])
def test_a_mistake_in_zoo_yaml_is_one_short_error_with_its_place(zoo, members, said):
    with pytest.raises(GlueError) as caught:
        zoo(members)
    assert said in str(caught.value) and "zoo.yaml:1:" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_all_mistakes_of_zoo_yaml_are_told_at_once(zoo):
    with pytest.raises(Mistakes) as caught:
        zoo("{a: {}, b: {path: b, base: c}, c: {path: c, base: d}, d: {path: d, base: c}}",
            "includ: x\ninclude: else.yaml\n")
    assert len(caught.value.errors) == 5
    assert "write  include: zoo/members.yaml" in str(caught.value) and "no key 'includ'" in str(caught.value)


def test_where_there_is_no_zoo_the_error_says_how_to_start_one(tmp_path):
    with pytest.raises(ZooError, match="there is no file .*zoo.yaml\n.*glue init"):
        Zoo(tmp_path / "zoo.yaml")


def test_a_chain_of_bases_is_whole_in_whatever_order_it_is_written(zoo):
    for order in ("abc", "cab", "cba", "bca"):
        entry = {"a": "a: {path: a}", "b": "b: {path: b, base: a}", "c": "c: {path: b, base: b}"}
        found = zoo("{" + ", ".join(entry[name] for name in order) + "}")
        assert [member.name for member in found["c"].lineage()] == ["b", "a"]


@pytest.mark.parametrize("path", ["hub:gpt2", "hub:meta-llama/Llama-2-7b-hf", "hub:o/n@main", "hub:o/n@refs/pr/1"])
def test_hub_paths_are_checked_without_the_network(path):
    well_formed(path)
    for broken in (path + "@", path.replace("hub:", "hub:/"), path + "/..", path + "\n"):
        with pytest.raises(ZooError, match="is no hub path"):
            well_formed(broken)


def test_what_is_added_is_found_again_by_name_version_and_origin(zoo, tmp_path):
    old, new = product(tmp_path, "r/x", seed=1), product(tmp_path, "r/x", seed=2, folder="b")
    for member in (old, new):
        zoo().add(member)
    found = zoo()
    assert found["r/x"] == new and found.versions("r/x") == [old, new] and found.made(old.origin) == old
    assert found[f"r/x@{old.digest[:8]}"] == old == found[f"r/x@{old.digest[:5]}"]
    for word in ("r/x@ffffffff", "r/x@", "r/y", "r/x@" + "\n" * 50):
        with pytest.raises(ZooError) as caught:
            found[word]
        assert len(str(caught.value).splitlines()) == 1


def test_a_hand_written_member_has_a_version_too(zoo):
    found = zoo()
    digest = found.identified(found["a"]).digest
    assert found[f"a@{digest[:8]}"].digest == digest
    with pytest.raises(ZooError, match="'a' has no version 'ffff'"):
        found["a@ffff"]


def test_the_register_survives_a_torn_line_and_names_a_damaged_one(zoo, tmp_path):
    zoo().add(product(tmp_path, "x", note="line\u2028separator \x85"))
    register = tmp_path / "zoo" / "members.yaml"
    whole = register.read_bytes()
    register.write_bytes(whole + whole.split(b"\n")[1][:50])
    assert zoo()["x"].note == "line\u2028separator \x85"
    zoo().add(product(tmp_path, "y"))
    assert [member.name for member in zoo()] == ["a", "b", "x", "y"]
    for bad in (b"- {", b"- []", b"- 3", b"{}", b"- {\"name\": \"\xff\"}", b"- " + b"[" * 10**5, b"\0" * 9, b"- {}"):
        register.write_bytes(whole + bad + b"\n" + whole.split(b"\n")[1] + b"\n")
        with pytest.raises(ZooError, match="members.yaml:3: this record is damaged") as caught:
            zoo()
        assert len(str(caught.value).splitlines()) == 2


def test_tags_are_recorded_for_products_and_for_hand_written_members(zoo, tmp_path):
    zoo().add(product(tmp_path, "x", tags=frozenset({"t"})))
    digest = zoo().identified(zoo()["a"]).digest
    zoo().tag("x", {"u"}, {"t"})
    zoo().tag(f"a@{digest[:8]}", {"v"}, set())
    found = zoo()
    assert found["x"].tags == {"u"} and found["a"].tags == {"x", "v"} and found.select("tag:v") == [found["a"]]
    assert found.made(product(tmp_path, "x").origin).tags == {"u"}
    for bad in ("-x", "", "a/b", "a b", "x\n"):
        with pytest.raises(ZooError, match="cannot be a tag"):
            found.tag("x", {bad}, set())


def test_what_is_removed_is_gone_also_after_it_was_tagged(zoo, tmp_path):
    old, new = product(tmp_path, "x", seed=1), product(tmp_path, "x", seed=2, folder="b")
    here = zoo()
    for member in (old, new):
        here.add(member)
    here.tag("x", {"t"}, set())
    here.remove(f"x@{old.digest[:5]}")
    for found in (here, zoo()):
        assert [member.digest for member in found.versions("x")] == [new.digest] and found.made(old.origin) is None
    here.remove("x")
    assert "x" not in here and "x" not in zoo() and zoo().made(new.origin) is None
    with pytest.raises(ZooError, match="stands in .*zoo.yaml, which glue does not rewrite"):
        here.remove("a")


def test_a_name_may_be_written_by_hand_once_its_product_is_removed_and_not_before(zoo, tmp_path):
    zoo().add(product(tmp_path, "c"))
    with pytest.raises(ZooError, match="'c' stands in .*zoo.yaml and in .*members.yaml"):
        zoo("{c: {path: b}}")
    zoo().remove("c")
    assert zoo("{c: {path: b}}")["c"].path.endswith("/b")


@pytest.mark.parametrize("name", ["../x", "/x", "", "x/", "x//y", ".x", "x\n", "а", "x/../y", "x" * 101])
def test_a_hostile_name_is_not_registered(zoo, tmp_path, name):
    with pytest.raises(ZooError, match="cannot be a name"):
        zoo().add(product(tmp_path, name))
    assert not (tmp_path / "zoo" / "members.yaml").exists()


def test_a_product_that_is_gone_or_damaged_is_not_made_and_an_older_one_is_found(zoo, tmp_path, model_folder):
    model_folder("c", seed=5)
    zoo().add(product(tmp_path, "x"))
    zoo().add(product(tmp_path, "x", folder="c"))
    origin = product(tmp_path, "x").origin
    assert zoo().made(origin).path.endswith("/c")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"short")
    assert zoo().made(origin).path.endswith("/a")
    (tmp_path / "a" / "config.json").write_text("{}")
    assert zoo().made(origin) is None


def test_elements_of_a_group_may_be_hand_written_members_that_changed_since(zoo, tmp_path):
    here = zoo()
    a, b = here.identified(here["a"]), here.identified(here["b"])
    here.add(Member("g", "group", str(tmp_path / "a"), digest="g", elements=(Element("a", a, (a, b)),)))
    element, = zoo()["g"].elements
    assert [member.digest for member in element.members] == [a.digest, b.digest] and element.root.name == "a"
    (tmp_path / "a" / "config.json").write_text("{}")
    fresh = zoo()
    root = fresh["g"].elements[0].root
    assert root.digest == a.digest != fresh.identified(root).digest


def test_a_base_that_is_gone_is_not_mistaken_for_another(zoo, tmp_path):
    zoo().add(product(tmp_path, "x", base=Member("gone", "model", "/gone")))
    assert zoo()["x"].base.name == "gone"


def test_an_adapter_is_another_on_another_base(zoo, tmp_path):
    text = "{{a: {{path: a}}, b: {{path: b}}, l: {{path: a, kind: adapter, base: {}}}}}"
    digests = {zoo(text.format(base)).identified(zoo(text.format(base))["l"]).digest for base in "ab"}
    assert len(digests) == 2 and zoo().identified(zoo()["a"]).digest not in digests


def test_listing_a_zoo_imports_nothing_heavy(zoo, tmp_path):
    zoo().add(product(tmp_path, "x"))
    code = (f"import sys; from glue.zoo import Zoo; assert len(list(Zoo({str(tmp_path / 'zoo.yaml')!r}))) == 3\n"
            "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
