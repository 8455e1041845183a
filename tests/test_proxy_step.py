"""Steps proxy and distill after a federation: what federated proxy-tuning is made of, each part held to the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glue.checkpoint import Checkpoint
from glue.errors import Mistakes
from glue.kinds import load, weights
from glue.kinds.proxy import members
from glue.member import Member
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo
from tests.words import word_zoo

SHAPE = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48}"
RECIPE = f"""\
seed: 0
steps:
  - {{as: small, step: pretrain, steps: 20, learning_rate: 1e-2, batch_size: 8, vocabulary: [ones, twos],
     data: {{ones: 1}}, architecture: {SHAPE}}}
  - {{as: large, step: pretrain, steps: 20, learning_rate: 1e-2, batch_size: 8, vocabulary: [ones, twos],
     data: {{ones: 1}}, architecture: {SHAPE.replace("32", "48")}}}
  - {{as: other, step: pretrain, steps: 2, learning_rate: 1e-2, batch_size: 8, vocabulary: [ones],
     data: {{ones: 1}}, architecture: {SHAPE}}}
  - {{as: one, step: federate, base: small, data: &data {{ones: 1, twos: 1}}, clients: 1, steps: 20, batch_size: 8,
     learning_rate: 1e-2, rank: 2, targets: [q_proj, v_proj], register_clients: true}}
  - {{as: sent, step: clients, of: one}}
  - {{as: all, step: federate, base: small, data: *data, clients: 3, steps: 60, learning_rate: 1e-2, rank: 4,
     batch_size: 8, targets: [q_proj, v_proj, up_proj, down_proj], register_clients: true}}
  - {{as: by-one, step: proxy, large: large, tuned: one}}
  - {{as: by-sent, step: proxy, large: large, tuned: sent/c0}}
  - {{as: by-all, step: proxy, large: large, tuned: all, alpha: [0, 0.5, 1, 2], suite: words:dev}}
  - {{as: none, step: proxy, large: large, tuned: all, alpha: 0}}
  - {{as: full, step: tune, base: small, data: {{twos: 1}}, steps: 20, learning_rate: 1e-2, batch_size: 8}}
  - {{as: by-full, step: proxy, large: by-one, tuned: full, small: small, alpha: 0.5}}
  - {{as: back, step: distill, teacher: by-all, student: small, data: *data, steps: 30, learning_rate: 1e-2,
     batch_size: 8}}
  - {{as: merged, step: merge, members: [back, small], method: linear}}
  - {{as: scored, step: evaluate, members: [large, by-one, by-all, none, by-full, back], suite: words:test, loss: true}}
"""
IDS = torch.tensor([[1, 60, 62, 65, 61], [1, 61, 59, 63, 70]])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    def answers(k: int, word: str) -> tuple[str, str]:
        return f"{k % 5} {word}", f"{(k + 1) % 5} {word}"

    suite = "tasks:\n" + "".join(f"  {task}: {{data: {task}, output: choice, metric: acc, chance: 0.5}}\n"
                                 for task in ("ones", "twos"))
    return word_zoo(tmp_path_factory.mktemp("steered"), answers, suite, RECIPE)


@pytest.fixture(scope="module")
def plan(place) -> Iterator[Plan]:
    with Workers(0) as workers:
        yield run(read_recipe(place / "t.yaml"), Zoo(place / "zoo.yaml"), workers)


@torch.no_grad()
def says(member: Member, ids: Tensor = IDS) -> Tensor:
    return load(member).model(ids).logits


def test_one_client_in_one_round_is_proxy_tuning_with_what_that_client_learnt_to_the_bit(plan):
    assert torch.equal(says(plan["by-one"]), says(plan["by-sent"]))
    assert float((says(plan["by-one"]) - says(plan["large"])).abs().max()) > 0.1


def test_with_alpha_0_it_is_the_large_member(plan):
    assert torch.equal(says(plan["none"]), says(plan["large"])[..., :load(plan["none"]).model.config.vocab_size])


def test_before_any_round_there_is_nothing_to_add(plan, place, tmp_path):
    recipe = tmp_path / "t.yaml"
    recipe.write_text(RECIPE + "  - {as: nothing, step: proxy, large: large, tuned: small, small: small}\n")
    with pytest.raises(Mistakes, match="they would cancel out"):
        make_plan(read_recipe(recipe), Zoo(place / "zoo.yaml"))


def test_the_expert_is_the_weighted_mean_of_what_the_clients_learnt(plan):
    """What flora promises holds in the proxy: large + alpha (mean of clients - small)."""
    rounds, = json.loads((plan["all"].folder / "rounds.json").read_text())
    below, mean = weights(plan["small"]), dict[str, Tensor]()
    for client, count in zip(rounds["clients"], rounds["examples"], strict=True):
        one = weights(Member(client, "adapter", str(plan["all"].folder / "clients" / client), base=plan["small"]))
        for name in below.headers:
            mean[name] = mean.get(name, 0.0) + one[name].double() * count / sum(rounds["examples"])
    expert = load(plan["small"])
    expert.model.load_state_dict({name: tensor.float() for name, tensor in mean.items()}, strict=False)
    alpha = json.loads((plan["by-all"].folder / "config.json").read_text())["alpha"]
    with torch.no_grad():
        v = load(plan["by-all"]).model.config.vocab_size
        by_hand = says(plan["large"]) + alpha * (expert.model(IDS).logits - says(plan["small"]))
    assert float((says(plan["by-all"]) - by_hand[..., :v]).abs().max()) < 1e-4


def test_a_proxy_over_a_proxy_adds_both_changes_and_a_full_tune_is_copied_whole(plan):
    by_hand = says(plan["by-one"]) + 0.5 * (says(plan["full"]) - says(plan["small"]))
    assert float((says(plan["by-full"]) - by_hand).abs().max()) < 1e-4
    _, small, tuned = members(plan["by-full"])
    assert tuned.kind == "model"
    for part, source in ((small, "small"), (tuned, "full")):
        held, was = Checkpoint(part.folder), weights(plan[source])
        assert all(torch.equal(held[name], was[name]) for name in was.headers)


def test_alpha_is_chosen_on_dev_items_only_and_the_note_says_what_each_came_to(plan):
    told = json.loads((plan["by-all"].folder / "alpha.json").read_text())
    assert [line["alpha"] for line in told["tried"]] == [0, 0.5, 1, 2]
    least = min(told["tried"], key=lambda line: line["loss"])
    assert told["alpha"] == least["alpha"] > 0 and least["loss"] < told["tried"][0]["loss"]
    assert plan["by-all"].seen == {*plan["by-all"].seen} and len(plan["by-all"].seen) == 2
    assert not plan["by-one"].seen and plan["back"].seen == plan["by-all"].seen  # what was chosen by goes on
    assert f"large + {told['alpha']:g} x (all - small)" == plan["by-all"].note


def test_what_was_distilled_is_an_ordinary_model_that_merges(plan):
    assert plan["back"].kind == "model" and plan["merged"].kind == "model"
    v = len(load(plan["small"]).tokenizer)
    teacher, before, after = (says(plan[name])[..., :v] for name in ("by-all", "small", "back"))
    apart = [float((teacher.softmax(-1) * (teacher.log_softmax(-1) - one.log_softmax(-1))).sum(-1).mean())
             for one in (before, after)]
    assert apart[1] < apart[0]
    table = json.loads((plan["scored"].folder / "loss.json").read_text())
    losses = {name: sum(map(sum, table[plan[name].digest].values())) for name in ("large", "by-all", "none")}
    assert losses["by-all"] < losses["large"] == losses["none"]


def test_other_tokens_and_other_small_models_are_refused_while_it_is_planned(plan, place, tmp_path):
    for line, match in (("{as: x, step: proxy, large: other, tuned: all}", "their numbers mean other tokens"),
                        ("{as: x, step: proxy, large: large, tuned: all, small: full}", "'t/all' sits on 't/small'"),
                        ("{as: x, step: distill, teacher: large, student: other, data: {ones: 1}, steps: 1, "
                         "learning_rate: 1}", "their numbers mean other tokens"),
                        ("{as: x, step: proxy, large: large, tuned: sent/c9}", "there is no member 'sent/c9'")):
        (tmp_path / "t.yaml").write_text(f"{RECIPE}  - {line}\n")
        with pytest.raises(Mistakes, match=match):
            make_plan(read_recipe(tmp_path / "t.yaml"), Zoo(place / "zoo.yaml"))


def test_a_second_run_makes_nothing(plan, place):
    assert all(task.state == "done" for task in make_plan(read_recipe(place / "t.yaml"), Zoo(place / "zoo.yaml")))
