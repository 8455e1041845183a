"""The laws of routing, tested over every router there is: a new file in the folder is tested without an edit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glue.family import families
from glue.kinds import load
from glue.kinds.modelling.model_mixture import chosen
from glue.member import Member
from glue.mix import routing
from glue.mix.build import build
from glue.mix.site import Site, survey

ROUTERS = [method.name for method in routing]
WAYS = [(name, k) for name in ROUTERS for k in ([1, 2, 3] if "top_k" in routing[name].parameters else [None])]
TEXTS = ["w3 w9 w4", "w30", "w22 w22 w7 w15 w8", "w11 w12", "w39 w38 w37", "w5"]
every_router = pytest.mark.parametrize("name", ROUTERS)
every_way = pytest.mark.parametrize("name, k", WAYS)


def choice(name: str, k: int | None = None):
    """The router with its defaults, and k experts a prompt."""
    return families("routing").choose({name: {} if k is None else {"top_k": k}})


def a_site(*, m: int = 60, h: int = 12, e: int = 3, seed: int = 0) -> Site:
    """Three blobs of prompts, a task each, and for each blob an expert that answers it."""
    rng = torch.Generator().manual_seed(99 + seed)
    tasks = torch.arange(m) % e
    centres = 3 * torch.randn(e, h, generator=rng)

    def states(texts: list[str]) -> Tensor:
        return centres[:1] + torch.randn(len(texts), h, generator=rng)

    return Site(tuple(f"expert{i}" for i in range(e)), centres[tasks] + torch.randn(m, h, generator=rng),
                torch.nn.functional.one_hot(tasks, e).float(), tasks, [f"p{j}" for j in range(m)], states, seed=seed)


@every_way
@torch.no_grad()
def test_a_mixture_of_copies_is_the_model_itself(name, k, tiny, tmp_path):
    copies = [Member(f"copy{i}", "model", tiny("model").path) for i in range(3)]
    wins = torch.eye(3).repeat(2, 1)
    site = survey(copies, TEXTS, wins, torch.arange(6) % 3)
    build(tmp_path / "mixture", copies, choice(name, k), site)
    running, alone = load(Member("mixture", "mixture", str(tmp_path / "mixture"))), load(copies[0])
    encoded = running.tokenizer(TEXTS, return_tensors="pt", padding=True)
    asked = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    real = asked["attention_mask"].bool()
    where = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = alone.model(**asked, position_ids=where).logits[real]
    difference = running.model(**asked).logits[real] - expected
    assert float(difference.abs().max() / expected.abs().max()) <= 1e-6


@every_way
def test_weights_are_shares_of_k_experts(name, k):
    site = a_site()
    gate = choice(name, k)(site)
    weights = chosen(gate.logits(site.hidden), gate.top_k)
    assert gate.top_k == (k or 3)
    assert float((weights.sum(1) - 1).abs().max()) <= 1e-6 and float(weights.min()) >= 0
    assert set((weights > 0).sum(1).tolist()) == {gate.top_k}


@every_router
def test_the_same_seed_makes_the_same_gate(name):
    one, two = choice(name)(a_site()), choice(name)(a_site())
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


@every_router
def test_a_router_leaves_its_site_alone(name):
    site, untouched = a_site(), a_site()
    choice(name)(site)
    assert all(torch.equal(getattr(site, field), getattr(untouched, field)) for field in ("hidden", "wins", "tasks"))


@pytest.mark.parametrize("name", [name for name in ROUTERS if routing[name].traits["needs"] in ("scores", "text")])
def test_experts_in_another_order_are_chosen_for_the_same_prompts(name):
    site, order = a_site(), [2, 0, 1]
    moved = replace(site, names=tuple(site.names[i] for i in order), wins=site.wins[:, order])
    before = choice(name)(site).logits(site.hidden).argmax(1)
    after = choice(name)(moved).logits(site.hidden).argmax(1)
    assert torch.equal(before, torch.tensor(order)[after])


@pytest.mark.parametrize("name", [name for name in ROUTERS if routing[name].traits["needs"] in ("scores", "text")])
def test_a_router_that_looks_at_scores_sends_new_prompts_to_the_expert_that_answers_them(name):
    """Half of the prompts make the gate, the other half judge it."""
    site = a_site(m=120)
    half = replace(site, hidden=site.hidden[:60], wins=site.wins[:60], tasks=site.tasks[:60], prompts=site.prompts[:60])
    routes = choice(name)(half).logits(site.hidden[60:]).argmax(1)
    assert float(site.wins[60:].gather(1, routes[:, None]).mean()) >= 0.95


@every_router
def test_every_router_says_what_it_needs_and_what_it_is(name):
    assert routing[name].traits["needs"] in ("none", "hidden", "text", "scores")
    assert routing[name].traits["form"] == ("linear" if choice(name)(a_site()).inner is None else "module")


@pytest.mark.parametrize("name", [name for name in ROUTERS if routing[name].traits["needs"] == "none"])
def test_a_router_that_needs_nothing_looks_at_nothing(name):
    site = a_site()
    blind = replace(site, hidden=torch.full_like(site.hidden, torch.nan), wins=torch.full_like(site.wins, torch.nan))
    assert torch.equal(choice(name)(site).weight, choice(name)(blind).weight)
