"""The atlas: what it says of families, of pairs, and of members that it cannot look at; and its picture."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from glue.align import align
from glue.atlas import Atlas, Family, Pair, atlas
from glue.checkpoint import Checkpoint, Header
from glue.cluster.build import Build, differences
from glue.cluster.twins import Permuted
from glue.cluster.verdict import Facts, Verdict, verdict
from glue.errors import GlueError, ZooError
from glue.report.atlas import picture, tree
from glue.report.drawing import Words, room, save, svg
from glue.writer import Writer
from glue.zoo import Zoo

# --- the rule ---------------------------------------------------------------------------------------------------------

NEAR = Facts(0.97, base="root", change=0.1, agree=0.51, uneven=1.5)
TABLE = [  # what is known, the word, the cause
    (NEAR, "merge", "near"),
    (Facts(0.97), "merge", "near"),
    (replace(NEAR, apart="different layers (3 and 4)"), "do not merge", "build"),
    (replace(NEAR, apart="different layers (3 and 4)", equal=True), "do not merge", "build"),
    (replace(NEAR, equal=True), "do not merge", "copy"),
    (replace(NEAR, cosine=1 - 1e-6, retyped=True), "do not merge", "copy"),
    (replace(NEAR, cosine=1 - 1e-6), "merge", "near"),
    (Facts(), "do not merge", "unknown"),
    (Facts(0.19), "do not merge", "unrelated"),
    (Facts(-0.5), "do not merge", "unrelated"),
    (Facts(0.21), "merge with care", "far"),
    (Facts(0.95), "merge with care", "far"),
    (Facts(0.9501), "merge", "near"),
    (Facts(0.01, aligned=0.998), "merge with care", "twin"),
    (Facts(0.01, aligned=1.0), "do not merge", "copy"),
    (replace(NEAR, change=-0.31), "do not merge", "opposed"),
    (replace(NEAR, change=-0.1), "merge with care", "against"),
    (replace(NEAR, change=-0.04), "merge", "near"),
    (replace(NEAR, agree=0.44), "merge with care", "signs"),
    (replace(NEAR, uneven=5.1), "merge with care", "uneven"),
    (replace(NEAR, uneven=float("inf")), "merge with care", "uneven"),
    (replace(NEAR, is_base="root"), "merge with care", "base"),
    (replace(NEAR, differs=("rotary embedding differs",)), "merge with care", "build"),
]


@pytest.mark.parametrize(("facts", "word", "cause"), TABLE, ids=lambda each: each if isinstance(each, str) else "")
def test_the_rule(facts: Facts, word: str, cause: str):
    found = verdict(facts)
    assert (found.word, found.cause) == (word, cause) and found.reason


def test_all_cares_are_told_and_numbers_with_them():
    found = verdict(replace(NEAR, cosine=0.9, change=-0.2, differs=("vocabulary differs: 8 and 9 rows",)))
    assert found.reason == (
        "vocabulary differs: 8 and 9 rows; not near: cosine 0.900, not above 0.95; their changes to root pull apart "
        "(cosine -0.20): use a method that settles signs, such as ties")


def test_the_threshold_of_families_is_that_of_nearness():
    assert [verdict(Facts(0.9), threshold=limit).word for limit in (0.85, 0.95)] == ["merge", "merge with care"]


# --- builds -----------------------------------------------------------------------------------------------------------

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "rope_theta": 1e4}
SHAPES = {"model.embed_tokens.weight": (10, 8), "lm_head.weight": (10, 8), "model.layers.0.mlp.w": (8, 8)}
TOKENS = {f"t{k}": k for k in range(10)}


def build(shapes=SHAPES, tokens=TOKENS, **config) -> Build:
    return Build({**CONFIG, **config}, shapes, tokens)


@pytest.mark.parametrize(("other", "hard", "soft"), [
    (build(), "", ()),
    (build(num_key_value_heads=2, head_dim=4, rope_scaling=None), "", ()),  # what silence means anyway
    (Build({**CONFIG, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, SHAPES,
           {}), "", ()),
    (build(model_type="gpt2", num_hidden_layers=3), "different architecture (llama and gpt2), layers (2 and 3)", ()),
    (build(num_key_value_heads=1), "different key-value heads (2 and 1)", ()),
    (build({**SHAPES, "model.layers.0.mlp.w": (8, 9)}),
     "different shapes: 'model.layers.0.mlp.w' is [8, 8] and [8, 9]", ()),
    (build({**SHAPES, "extra": (1,)}), "different shapes: 'extra' is only in the second", ()),
    (build({**SHAPES, "model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8)}, {**TOKENS, "new": 10}), "",
     ("vocabulary differs: 10 and 12 rows; give both the same tokenizer first",)),
    (build(tokens={f"t{k}": 9 - k for k in range(10)}),
     "vocabulary differs: only 0 of 10 tokens have the same number in both", ()),
    (build(tokens={**TOKENS, "t9": 99}), "", ("vocabulary differs: 1 of 10 tokens have another number",)),
    (build({name: shape for name, shape in SHAPES.items() if "head" not in name}), "",
     ("only one has an output layer of its own, the other uses its embedding: merge with --untie",)),
    (build(rope_theta=1000000), "",
     ("rotary embedding differs (rope_theta 10000.0 and 1000000.0): positions mean other angles in the two",)),
    (build(rope_scaling={"type": "linear", "factor": 2}), "",
     ("rotary embedding differs (factor none and 2.0, rope_type default and linear): positions mean other angles in "
      "the two",)),
])
def test_differences_in_build(other: Build, hard: str, soft: tuple[str, ...]):
    assert differences(build(), other) == (hard, soft)


# --- the atlas of a zoo -----------------------------------------------------------------------------------------------

@pytest.fixture
def zoo(tmp_path: Path, plain_model: Callable[..., Path]) -> Callable[..., Zoo]:
    """zoo(a=0, b="a", c="a") writes models: a number is a beginning of its own, a name what it was tuned from."""
    def make(lineage: dict[str, str] | None = None, **models: int | str) -> Zoo:
        lines = ["members:"]
        for k, (name, source) in enumerate(models.items()):
            base = tmp_path / source if isinstance(source, str) else None
            plain_model(tmp_path / name, 100 + k if base else int(source), base)
            below = f", base: {lineage[name]}" if lineage and name in lineage else ""
            lines.append(f"  {name}: {{path: {name}, tags: [mine]{below}}}")
        (tmp_path / "zoo.yaml").write_text("\n".join(lines) + "\n")
        return Zoo(tmp_path / "zoo.yaml")

    return make


def pair(found: Atlas, one: str, other: str) -> Pair:
    return next(each for each in found.pairs if {each.one, each.other} == {one, other})


@pytest.mark.parametrize("linkage", ["average", "single", "complete"])
def test_families_and_verdicts_are_as_planted_whatever_the_order(zoo, linkage):
    planted = {"a": 0, "a1": "a", "a2": "a", "b": 1, "b1": "b"}
    made = zoo(**planted)
    lines, roots = made.file.read_text().splitlines(), []
    for order in ((1, 2, 3, 4, 5), (5, 3, 1, 2, 4)):
        made.file.write_text("\n".join([lines[0], *(lines[k] for k in order)]) + "\n")
        found = atlas(Zoo(made.file), linkage=linkage)
        assert {frozenset(family.members) for family in found.families} == {frozenset(("a", "a1", "a2")),
                                                                            frozenset(("b", "b1"))}
        roots.append({family.root for family in found.families})
        assert pair(found, "a1", "a2").verdict.word == "merge" and pair(found, "b", "b1").verdict.word == "merge"
        assert pair(found, "a", "b").verdict.cause == "unrelated"
        assert found.counts() == {"merge": 4, "merge with care": 0, "do not merge": 6}
    assert roots[0] == roots[1] and "a" in roots[0]


def test_a_base_is_known_by_its_place_among_its_children(zoo):
    found = atlas(zoo(x1=0, a=1, y="a", z="a"))
    family = next(family for family in found.families if "a" in family.members)
    assert (family.root, family.why) == ("a", "nearest to each of the others, as an ancestor is")
    facts = pair(found, "y", "z").facts  # from the root, what they have learnt is independent
    assert facts.base == "a" and abs(facts.change) < 0.1


def test_declared_lineage_decides_the_root_and_weights_that_contradict_it_are_told(zoo):
    found = atlas(zoo({"y": "a", "z": "a", "other": "a"}, a=1, y="a", z="a", other=2))
    assert (found.families[0].root, found.families[0].why) == \
        ("a", "declared by 2 of the 2 others, and nearest to each of them")
    assert pair(found, "a", "y").verdict.cause == "base"
    assert len(found.notes) == 1
    assert found.notes[0].startswith("other declares a as its base, and their weights have a cosine of ")


def test_an_ancestor_that_is_not_looked_at_is_named_all_the_same(zoo, tmp_path):
    made = zoo({"y": "a", "z": "a"}, a=1, y="a", z="a")
    made = Zoo(made.file)
    text = made.file.read_text().replace("a: {path: a, tags: [mine]}", "a: {path: a}")
    made.file.write_text(text)
    found = atlas(Zoo(made.file), "tag:mine")
    assert found.names == ("y", "z")
    assert found.families == (Family("a", "declared by 2 of the 2 members, and not among them", ("y", "z"), True),)


def test_changes_are_measured_from_the_base_that_is_asked_for(zoo):
    made = zoo(a=1, y="a", z="a")
    assert pair(atlas(made, base="z"), "a", "y").facts.base == "z"
    assert pair(atlas(made, base="z"), "a", "y").facts.change > 0.4  # both lack what z has learnt
    assert pair(atlas(made, base="z"), "a", "z").verdict.cause == "base"


def test_words_and_numbers_that_mean_nothing_are_refused_before_anything_is_read(zoo):
    made = zoo(a=1, y="a")
    for wrong, told in (({"base": "q"}, "no member 'q'"), ({"threshold": 1.0}, "a threshold of 1 separates nothing"),
                        ({"linkage": "averge"}, "no linkage 'averge'; did you mean 'average'"),
                        ({"part": "mpl"}, "no part 'mpl'; did you mean 'mlp'")):
        with pytest.raises(ZooError, match=told):
            atlas(made, progress=lambda names: pytest.fail("read"), **wrong)


def test_a_copy_is_told_from_what_is_only_near(zoo, tmp_path):
    made = zoo(a=0, b="a")
    for name in "cd":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    made.file.write_text(made.file.read_text() + "  c: {path: c}\n  d: {path: d}\n  same: {path: a}\n")
    found = atlas(Zoo(made.file))
    assert pair(found, "a", "c").verdict.cause == "copy" and pair(found, "b", "c").verdict.word == "merge"
    assert found.notes == ("a is also called same",)
    assert [(each.one, each.other) for each in found.worth_a_look()] == [("a", "c"), ("a", "d")]


def test_an_adapter_is_seen_through_its_base(zoo, tmp_path):
    made = zoo(a=0, b="a", other=1)
    for name, base in (("lora", "a"), ("lora2", "b")):
        folder = tmp_path / name
        folder.mkdir()
        shapes = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight": shape
                  for side, shape in (("A", (2, 32)), ("B", (48, 2)))}
        random = torch.Generator().manual_seed(len(name))
        with Writer(folder, {key: Header(torch.float32, shape) for key, shape in shapes.items()}) as writer:
            for key, shape in shapes.items():
                writer.write(key, 0.1 * torch.randn(shape, generator=random))
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}))
        made.file.write_text(made.file.read_text() + f"  {name}: {{path: {name}, kind: adapter, base: {base}}}\n")
    found = atlas(Zoo(made.file))
    assert [pair(found, "lora", name).verdict.cause for name in ("a", "other")] == ["base", "unrelated"]
    assert pair(found, "lora", "lora2").verdict.reason.startswith("adapters over different bases (a and b)")


def test_what_cannot_be_looked_at_is_told_and_the_rest_goes_on(zoo, tmp_path):
    made = zoo(a=0, b="a")
    (tmp_path / "empty").mkdir()
    made.file.write_text(made.file.read_text() + "  empty: {path: empty}\n  far: {path: 'hub:some/model'}\n"
                                                 "  words: {path: a, kind: dataset}\n")
    found = atlas(Zoo(made.file))
    assert found.names == ("a", "b") and set(found.left_out) == {"empty", "far"}
    assert "holds no safetensors weights" in found.left_out["empty"] and "not on this machine" in found.left_out["far"]
    assert [line.split(":")[:2] for line in found.remarks()[:2]] == [["left out", " empty"], ["left out", " far"]]
    with pytest.raises(ZooError, match="needs two models or adapters, and 0 can be read\n  empty: .*no safetensors"):
        atlas(Zoo(made.file), "empty")


def test_all_of_it_is_plain_data(zoo):
    found = atlas(zoo(a=0, b="a", c=1))
    told = json.loads(json.dumps(found.data(), allow_nan=False))
    assert [each["name"] for each in told["members"]] == ["a", "b", "c"] and len(told["pairs"]) == 3
    assert told["pairs"][0]["word"] == "merge" and told["pairs"][0]["agree"] is None
    assert told["similarity"]["all"][0][1] == pytest.approx(0.995, abs=0.002) and told["verdicts"]["do not merge"] == 2


# --- twins ------------------------------------------------------------------------------------------------------------

def shuffle(folder: Path, out: Path) -> None:
    """A copy of a model folder with the neurons of every layer in another order."""
    shutil.copytree(folder, out)
    weights, rng = Checkpoint(folder), torch.Generator().manual_seed(0)
    orders = {k: torch.randperm(48, generator=rng) for k in range(3)}
    with Writer(out, weights.headers) as writer:
        for name in weights:
            tensor = weights[name]
            if ".mlp." in name:
                order = orders[int(name.split(".")[2])]
                tensor = tensor[:, order] if "down" in name else tensor[order]
            writer.write(name, tensor)


def test_hidden_twins_are_found_when_asked_for(zoo, tmp_path):
    made = zoo(a=0, b="a", other=1)
    shuffle(tmp_path / "a", tmp_path / "copy")
    shuffle(tmp_path / "b", tmp_path / "twin")
    made.file.write_text(made.file.read_text() + "  copy: {path: copy}\n  twin: {path: twin}\n")
    made = Zoo(made.file)
    assert pair(atlas(made, part="mlp"), "a", "copy").verdict.cause == "unrelated"
    found = atlas(made, part="mlp", twins=True)
    assert pair(found, "a", "copy").verdict.cause == "copy" and pair(found, "a", "twin").verdict.cause == "twin"
    assert pair(found, "a", "twin").facts.aligned == pytest.approx(0.995, abs=0.002)
    assert pair(found, "other", "twin").verdict.cause == "unrelated"


def test_aligning_writes_a_model_that_lies_beside_its_twin_and_computes_what_it_did(tiny, tmp_path):
    from glue.kinds import load

    one, other = tiny("one"), tiny("other")  # the same seed: copies
    folder, rng = Path(other.path), torch.Generator().manual_seed(1)
    order: dict[str, torch.Tensor] = {"stream": torch.randperm(32, generator=rng)}
    for k in range(2):
        order[f"model.layers.{k}.mlp"] = torch.randperm(48, generator=rng)
        for axis, size in (("key", 8), ("value", 8), ("query", 16), ("output", 16)):  # two groups change places
            order[f"model.layers.{k}.{axis}"] = torch.arange(2 * size).roll(size)
    turned = {name: tensor.clone() for name, tensor in Permuted(Checkpoint(folder), order).items()}
    with Writer(folder, Checkpoint(folder).headers) as writer:
        for name, tensor in turned.items():
            writer.write(name, tensor)
    (tmp_path / "zoo.yaml").write_text("members:\n  one: {path: one}\n  other: {path: other}\n")
    done = align(Zoo(tmp_path / "zoo.yaml"), "other", "one", tmp_path / "out")
    assert abs(done["cosine_before"]) < 0.1 and done["cosine_after"] > 0.999 and done["reordered"] == 11
    assert all(torch.equal(Checkpoint(tmp_path / "out")[name], Checkpoint(one.folder)[name]) for name in turned)
    tokens = torch.tensor([[1, 5, 9, 30, 4]])
    with torch.no_grad():
        before, after = (load(replace(other, path=str(path))).model(tokens).logits
                         for path in (folder, tmp_path / "out"))
    assert torch.allclose(before, after, atol=1e-5) and float(before.std()) > 0.1
    told = json.loads((tmp_path / "out" / "glue.json").read_text())
    assert told["aligned"].startswith("other@") and told["weights"] == done["weights"]


def test_aligning_strangers_is_refused_and_nothing_is_left(zoo, tmp_path):
    made = zoo(a=0, other=1)
    with pytest.raises(ZooError, match=r"'other' is no twin of 'a': its neurons resemble theirs by 0\.\d\d"):
        align(made, "other", "a", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(ZooError, match="is there already"):
        align(made, "other", "a", tmp_path / "a")


# --- the picture ------------------------------------------------------------------------------------------------------

def test_the_tree_lists_relatives_together_and_strangers_join_last():
    alike = np.array([[1, 0.1, 0.9, np.nan], [0.1, 1, 0.2, np.nan], [0.9, 0.2, 1, np.nan], [np.nan] * 3 + [1]])
    order, branches = tree(alike, "average")
    assert order == [0, 2, 1, 3] and [branch.rows for branch in branches] == [(0, 1), (0.5, 2), (1.25, 3)]
    assert [branch.depth for branch in branches] == pytest.approx([0.1 ** 0.5, 0.85 ** 0.5, 1.12])


def test_the_picture_names_every_member_and_says_in_tooltips_why(zoo, tmp_path):
    found = atlas(zoo(a=0, b="a", c=1))
    save(picture(found), tmp_path / "atlas.svg")
    root = ElementTree.parse(tmp_path / "atlas.svg").getroot()
    words = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(words.count(name) == 2 for name in "abc") and "merge (1)" in words and "do not merge (2)" in words
    titles = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 6 and titles[0].startswith("a and b\nmerge: near: cosine 0.99")


def many(n: int) -> Atlas:
    """An atlas of n members in four families, without weights."""
    names = tuple(f"owner/some-model-of-7b-v{k}" for k in range(n))
    alike = np.array([[1.0 if i == j else 0.96 if i % 4 == j % 4 else 0.01 for j in range(n)] for i in range(n)])
    families = tuple(Family(names[k], "alone", names[k::4]) for k in range(min(4, n)))
    pairs = tuple(Pair(names[i], names[j], Facts(alike[i, j]), verdict(Facts(alike[i, j])))
                  for i in range(n) for j in range(i + 1, n))
    return Atlas(names, ("model",) * n, alike, alike, {"all": alike}, families, pairs, "all", "average", 0.95)


def test_labels_can_be_read_and_do_not_meet_with_sixty_members():
    drawing = picture(many(60))
    labels = [shape for shape in drawing.shapes if isinstance(shape, Words) and shape.text.startswith("some-model")]
    rows = sorted(shape.y for shape in labels if not shape.turned)
    assert len(labels) == 120 and all(shape.size >= 7 for shape in labels)
    assert min(b - a for a, b in zip(rows, rows[1:], strict=False)) >= labels[0].size
    assert all(0 <= shape.x <= drawing.width and 0 <= shape.y <= drawing.height for shape in labels)


@pytest.mark.parametrize("n", [2, 9, 60])
def test_nothing_lies_beyond_the_page(n):
    drawing = picture(many(n))
    words = [shape for shape in drawing.shapes if isinstance(shape, Words) and not shape.turned]
    for shape in words:
        reach = shape.x + room([shape.text], shape.size) * {"middle": 0.5, "start": 1.0, "end": 0.0}[shape.anchor]
        assert shape.x >= 0 and reach <= drawing.width


def test_the_same_atlas_gives_the_same_bytes(tmp_path):
    assert svg(picture(many(9))) == svg(picture(many(9))) and "20" + "26-" not in svg(picture(many(9)))


def test_names_cannot_break_out_of_a_picture():
    bad = replace(many(4), names=("a<b>&", *many(4).names[1:]))
    bad = replace(bad, families=(), pairs=(Pair(bad.names[0], bad.names[1], Facts(0.5), Verdict("merge", "<&", "x")),))
    assert ElementTree.fromstring(svg(picture(bad))) is not None


def test_a_kind_of_picture_that_is_not_known_and_a_png_without_matplotlib_are_refused(tmp_path, monkeypatch):
    with pytest.raises(GlueError, match="'atlas.gif' says no kind of picture"):
        save(picture(many(4)), tmp_path / "atlas.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GlueError, match="matplotlib, which is not installed") as told:
        save(picture(many(4)), tmp_path / "atlas.png")
    assert "pip install 'glue[plots]'" in told.value.fix and not list(tmp_path.iterdir())
