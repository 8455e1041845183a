"""How large a member is, and how fast it writes: what a board tells of costs."""

from __future__ import annotations

import json

import pytest
import torch

from glue.board import costs, leaderboard
from glue.errors import GlueError
from glue.family import families
from glue.kinds import load, weights
from glue.kinds.size import Size, size
from glue.kinds.text import pace
from glue.member import Member
from glue.mix.levels import ffn, model, text
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, gates, plain
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.report.markdown import markdown
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo


def gate(e: int, h: int = 32, top_k: int = 1) -> Gate:
    return plain(torch.zeros(e, h), top_k)


def count(member: Member, *words: str) -> int:
    """Numbers in the tensors of a model whose names have one of the words."""
    state = load(member).model.state_dict()
    return sum(tensor.numel() for name, tensor in state.items() if any(word in name for word in words or ("",)))


def test_a_model_is_all_active_and_a_tied_head_counts_once(tiny):
    member = tiny("tied", tie_word_embeddings=True)
    whole = sum(parameter.numel() for parameter in load(member).model.parameters())
    assert size(member) == Size(whole, whole)


@pytest.mark.parametrize("top_k", [1, 2])
def test_of_whole_models_so_many_are_active_as_answer(tiny, tmp_path, top_k):
    experts = tuple(tiny(f"m{k}", seed=k) for k in range(3))
    model.write(tmp_path / "out", Parts(experts, None, experts[0]), [gate(3, top_k=top_k)])
    one, router = size(experts[0]).whole, 3 * 32 + 3 + 2 * 32
    assert size(Member("out", "mixture", str(tmp_path / "out"))) == Size(3 * one + router, top_k * one + router)


def test_at_level_ffn_what_is_shared_counts_once(tiny, tmp_path):
    experts = tuple(tiny(f"m{k}", seed=k) for k in range(3))
    parts = Parts(experts, weights(experts[0]), experts[0])
    ffn.write(tmp_path / "out", parts, [gate(3), gate(3)])
    mlps = count(experts[0], ".mlp.")
    shared = size(experts[0]).whole - mlps + 2 * 3 * 32
    assert size(Member("out", "mixture", str(tmp_path / "out"))) == Size(shared + 3 * mlps, shared + mlps)


def test_at_level_text_the_largest_expert_is_what_may_be_asked(tiny, tmp_path):
    experts = (tiny("small", hidden_size=24), tiny("large"))
    parts = Parts(experts, None, experts[0])
    dev = Dev(["w3 w4", "w5"], torch.eye(2), torch.zeros(2, dtype=torch.long))
    made = gates(families("routing").choose("random"), text.sites(parts, dev))
    text.write(tmp_path / "out", parts, made)
    sizes = [size(expert).whole for expert in experts]
    assert size(Member("out", "mixture", str(tmp_path / "out"))) == Size(sum(sizes), max(sizes))


def test_what_has_no_weights_has_no_size(tmp_path):
    with pytest.raises(GlueError, match="does not exist|no |not"):
        size(Member("gone", "model", str(tmp_path / "gone")))


def test_the_pace_is_that_of_the_middle_run(tiny, monkeypatch):
    ticks = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])  # runs of 2, 1 and 4 seconds
    monkeypatch.setattr("glue.kinds.text.perf_counter", lambda: next(ticks))
    assert pace(load(tiny("m")), "w3 w4", tokens=5) == 5 / 2.0


def test_a_board_tells_costs_only_where_they_were_measured(tiny, tmp_path):
    assert families("steps")["evaluate"].parameters["speed"].default is False
    member, folder = tiny("m"), tmp_path / "asked"
    folder.mkdir()
    item = {"question": "w3", "choices": ["w4", "w5"], "gold": 0, "answer": "w4"}
    for split in ("dev", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "zoo.yaml").write_text(f"members:\n  m: {{path: {member.path}}}\n"
                                       f"  asked: {{path: {folder}, kind: dataset}}\n")
    (tmp_path / "own.yaml").write_text("tasks:\n  things: {data: asked, output: choice, metric: acc, chance: 0.5}\n")
    for name, more in (("plain", ""), ("timed", ", speed: true")):
        (tmp_path / f"{name}.yaml").write_text(
            f"steps:\n  - {{as: scored, step: evaluate, members: [m], suite: own.yaml:test{more}}}\n"
            "board: {table: scored}\n")
        zoo, recipe = Zoo(tmp_path / "zoo.yaml"), read_recipe(tmp_path / f"{name}.yaml")
        run(recipe, zoo, Workers(0))
        board = leaderboard(make_plan(recipe, Zoo(tmp_path / "zoo.yaml")))
        assert list(costs(board)) == ([] if name == "plain" else ["parameters", "active", "tokens/s"])
        assert ("| tokens/s |" in "\n".join(markdown(board))) == (name == "timed")
    digests = {json.loads(line[2:])["digest"] for line in (tmp_path / "zoo" / "members.yaml").read_text().splitlines()
               if line.startswith("- ")}
    assert len(digests) == 1, "how fast it was is no part of a table"
