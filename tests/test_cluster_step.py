"""The step that clusters: the same families for every order, scores of all kinds, sketches that are kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from glue.checkpoint import Checkpoint, Header
from glue.cluster.similarity import similarity
from glue.errors import GlueError
from glue.family import families
from glue.member import Member
from glue.steps import Job
from glue.workers import Workers
from glue.writer import Writer

SHAPES = {"model.embed_tokens.weight": (10, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
          "model.layers.0.mlp.up_proj.weight": (24, 16)}


@pytest.fixture
def member(tmp_path) -> Callable[..., Member]:
    """A member on disk: near another by so much, or of its own."""
    made: dict[str, dict[str, torch.Tensor]] = {}

    def make(name: str, seed: int, near: str = "", much: float = 0.1, words: int = 10, base: Member | None = None,
             **config) -> Member:
        rng = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(words if "embed" in key else shape[0], shape[1], generator=rng)
                   for key, shape in SHAPES.items()}
        if near:
            tensors = {key: (made[near][key] if made[near][key].shape == drawn.shape else 0) + much * drawn
                       for key, drawn in tensors.items()}
        made[name] = tensors
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        with Writer(folder, {key: Header(value.dtype, tuple(value.shape)) for key, value in tensors.items()}) as writer:
            for key, value in tensors.items():
                writer.write(key, value)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4} | config))
        return Member(name, "model", str(folder), base=base, digest=f"{seed * 7919 % 1000:03d}{'0' * 29}")

    return make


@pytest.fixture
def zoo(member) -> list[Member]:
    """A base and two children, two siblings without any declared base, and one that is alone."""
    base = member("base", 1)
    return [base, member("left", 2, "base", base=base), member("right", 3, "base", base=base),
            member("up", 4), member("down", 5, "up"), member("alone", 6)]


@pytest.fixture
def clustered(tmp_path):
    """Run the step; returns (elements as {root: names}, what similarity.json tells)."""
    count = itertools.count()

    def go(members: list[Member], **params):
        folder = tmp_path / f"out-{next(count)}"
        folder.mkdir()
        choice = families("steps")["cluster"].bind({"members": [one.name for one in members], **{
            key: value.name if isinstance(value, Member) else value for key, value in params.items()}})
        with Workers(0) as workers:
            job = Job("r/families", folder, 0, workers, tmp_path / "zoo")
            named = {key: value for key, value in params.items() if isinstance(value, Member)}
            for what in ("words", "check"):
                choice.method.traits[what](**{**choice.params, "members": members, **named})
            made = choice(job, members=members, **named)
        told = json.loads((folder / "similarity.json").read_text())
        return {one.root.name: {each.name for each in one.members} for one in made.elements}, told

    return go


PLANTED = {"base": {"base", "left", "right"}, "up": {"up", "down"}, "alone": {"alone"}}


@pytest.mark.parametrize("linkage", ["single", "average", "complete"])
def test_families_and_roots_are_the_planted_ones_in_every_order(zoo, clustered, linkage):
    first, told = clustered(zoo, linkage=linkage, threshold=0.9)
    middle = next(root for root in first if root in ("up", "down"))
    assert first == {"base": PLANTED["base"], middle: PLANTED["up"], "alone": PLANTED["alone"]}
    for order in list(itertools.permutations(zoo))[::7]:
        assert clustered(list(order), linkage=linkage, threshold=0.9) == (first, told)


def test_members_that_are_equally_near_are_not_decided_by_their_order(member, clustered):
    """Copies of one model between two others: which side they go to depends on content alone."""
    low, high = member("low", 1), member("high", 2, "low", 0.35)
    between = member("between", 3, "low", 0.2)
    members = [low, high, between, *(Member(f"copy{k}", "model", between.path, digest=between.digest) for k in (1, 2))]
    found = [clustered(list(order), linkage="complete", threshold=0.95)[0]
             for order in itertools.permutations(members)][::11]
    assert all(one == found[0] for one in found)


def test_all_scores_are_told_beside_the_one_that_counts(zoo, clustered):
    _, told = clustered(zoo, part="mlp", threshold=0.9)
    sources = [Checkpoint(next(one.path for one in zoo if one.name == name)) for name in told["names"]]
    for part in ("all", "attention", "mlp"):
        assert np.abs(np.array(told["cosine"][part]) - similarity(sources, part=part)).max() < 1e-9
    assert told["similarity"] == told["cosine"]["mlp"] and np.array(told["ratio"]).shape == (6, 6)
    assert (told["part"], told["mode"], told["linkage"], told["threshold"]) == ("mlp", "raw", "average", 0.9)


def test_changes_are_measured_from_the_common_ancestor_or_from_a_base_that_is_named(zoo, clustered):
    base, left, right, *_ = zoo
    families_, told = clustered([left, right], mode="delta", threshold=0.5)
    assert told["base"] == "base" and abs(told["similarity"][0][1]) < 0.3 and len(families_) == 2
    assert 0.3 < told["agreement"][0][1] < 0.7 and told["overlap"][0][1] > 0.99
    assert clustered([left, right], mode="delta", base=base, threshold=0.5)[1]["similarity"] == told["similarity"]


def test_words_that_make_no_sense_together_are_refused(zoo, clustered):
    with pytest.raises(GlueError, match="mode raw compares whole weights"):
        clustered(zoo, base=zoo[0])
    with pytest.raises(GlueError, match="a sketch holds some columns"):
        clustered(zoo, sketch=True, per="tensor")
    with pytest.raises(GlueError, match="declare no common ancestor"):
        clustered(zoo[3:], mode="delta")


def test_one_cosine_for_each_matrix_can_be_asked_for(zoo, clustered):
    _, told = clustered(zoo, per="tensor", threshold=0.9)
    sources = [Checkpoint(next(one.path for one in zoo if one.name == name)) for name in told["names"]]
    assert np.abs(np.array(told["similarity"]) - similarity(sources, per="tensor")).max() < 1e-9


def test_members_with_more_tokens_are_apart_unless_the_vocabulary_may_differ(member, clustered):
    members = [member("one", 1), member("longer", 2, "one", words=12)]
    apart, told = clustered(members, threshold=0.9)
    assert apart == {"one": {"one"}, "longer": {"longer"}} and told["similarity"][0][1] is None
    together, told = clustered(members, threshold=0.9, vocabulary="any")
    assert list(together.values()) == [{"one", "longer"}] and told["similarity"][0][1] > 0.9
    assert any("vocabulary differs" in line for _, _, line in told["differences"])


def test_another_number_of_heads_is_another_architecture_and_another_rope_is_told(member, clustered):
    members = [member("one", 1), member("heads", 2, "one", num_attention_heads=2),
               member("turned", 3, "one", rope_theta=1e6)]
    found, told = clustered(members, threshold=0.9)
    assert sorted(map(sorted, found.values())) == [["heads"], ["one", "turned"]]
    assert any("rotary embedding differs" in line for *_, line in told["differences"])


def test_sketches_are_kept_by_digest_and_a_new_member_costs_one_read_of_itself(zoo, clustered, tmp_path, monkeypatch):
    import glue.cluster.sketch as sketches

    made = []
    real = sketches.sketch
    monkeypatch.setattr(sketches, "sketch", lambda source, **how: made.append(str(source.path)) or real(source, **how))
    exact, whole = clustered(zoo[:-1], threshold=0.9)
    assert not made
    found, told = clustered(zoo[:-1], threshold=0.9, sketch=True)
    assert found == exact and made == [one.path for one in sorted(zoo[:-1], key=lambda one: one.digest)]
    assert np.abs(np.array(told["similarity"]) - np.array(whole["similarity"])).max() < 1e-6
    assert np.array(told["error"]).max() == 0  # these are so small that a sketch holds them whole
    assert {file.name for file in (tmp_path / "zoo/sketches").iterdir()} == \
        {f"{one.digest[:16]}.safetensors" for one in zoo[:-1]}
    made.clear()
    clustered(zoo, threshold=0.9, sketch=True)
    assert made == [zoo[-1].path]


def test_a_sketch_that_is_damaged_or_of_other_weights_is_made_again(zoo, clustered, tmp_path):
    first, told = clustered(zoo, threshold=0.9, sketch=True)
    files = sorted((tmp_path / "zoo/sketches").iterdir())
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(whole[0][:100])
    files[1].write_bytes(whole[2])
    assert clustered(zoo, threshold=0.9, sketch=True) == (first, told)
    assert [file.read_bytes() for file in files] == whole


def test_deltas_by_sketch_need_the_sketch_of_the_base_and_make_it(zoo, clustered, tmp_path):
    base, left, right, *_ = zoo
    exact = clustered([left, right], mode="delta", threshold=0.5)[1]["similarity"]
    told = clustered([left, right], mode="delta", threshold=0.5, sketch=True)[1]
    assert np.abs(np.array(told["similarity"]) - np.array(exact)).max() < 1e-6
    assert (tmp_path / f"zoo/sketches/{base.digest[:16]}.safetensors").is_file()
