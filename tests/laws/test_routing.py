"""The laws of routing, tested over every router there is: a new file in the folder is tested without an edit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import Tensor

from glue.errors import MethodError
from glue.family import families
from glue.kinds import load, weights
from glue.kinds.features import text_features
from glue.kinds.modelling.model_mixture import chosen
from glue.member import Member
from glue.mix import PLACES, fitting, routing, why_not
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, LossGate, Site, gates

ROUTERS = [method.name for method in routing]
GATES = [name for name in ROUTERS if routing[name].traits["form"] != "text"]
LINEAR = [name for name in ROUTERS if routing[name].traits["form"] == "linear"]
LEARN = [name for name in GATES if routing[name].traits["needs"] in ("scores", "text")]
WAYS = [(name, k) for name in GATES for k in ([1, 2, 3] if "top_k" in routing[name].parameters else [None])]
PAIRS = [(level, unit, name) for level, unit in PLACES for name in fitting(level, unit)]
every_router = pytest.mark.parametrize("name", ROUTERS)
every_gate = pytest.mark.parametrize("name", GATES)
every_linear_gate = pytest.mark.parametrize("name", LINEAR)
every_gate_that_learns = pytest.mark.parametrize("name", LEARN)


def choice(name: str, k: int | None = None):
    """The router with its defaults, and k experts a prompt."""
    return families("routing").choose({name: {} if k is None else {"top_k": k}})


def a_site(*, m: int = 60, h: int = 12, e: int = 3, seed: int = 0, **more) -> Site:
    """Three blobs of prompts around a common middle, a task each, and for each blob an expert that answers it."""
    rng = torch.Generator().manual_seed(99)
    tasks = torch.arange(m) % e
    middle, centres = 4 * torch.randn(h, generator=rng), 3 * torch.randn(e, h, generator=rng)

    def states(texts: list[str]) -> Tensor:
        return middle + centres[:1] + torch.randn(len(texts), h, generator=rng)

    return Site(tuple(f"expert{i}" for i in range(e)), middle + centres[tasks] + torch.randn(m, h, generator=rng),
                torch.nn.functional.one_hot(tasks, e).float(), tasks, [f"p{j}" for j in range(m)], states, seed=seed,
                **more)


@cache
def made(name: str, k: int | None = None, affine: bool = True) -> Gate:
    """What the router makes of the plain site; a trained one takes a second."""
    return choice(name, k)(a_site(affine=affine))


def share_won(gate: Gate, site: Site) -> float:
    """What a prompt scores where the first of its experts answers it."""
    return float(site.wins.gather(1, gate.logits(site.hidden).argmax(1)[:, None]).mean())


def alike(one: Gate, other: Gate) -> bool:
    """Equal bits."""
    pairs = [(one.weight, other.weight), (one.bias, other.bias), (one.mean, other.mean), (one.scale, other.scale),
             *zip(one.inner or (), other.inner or (), strict=True)]
    return all(torch.equal(*pair) for pair in pairs) and one.temperature == other.temperature


# what every router is

@every_router
def test_every_router_says_what_it_needs_and_what_it_is(name):
    gate, form = made(name), routing[name].traits["form"]
    assert routing[name].traits["needs"] in ("none", "hidden", "text", "scores")
    assert form == ("text" if isinstance(gate, LossGate) else "module" if gate.inner else "linear")


@every_router
def test_every_router_fits_some_level_and_is_refused_with_a_reason_by_all_others(name):
    found = [place for place in PLACES if not why_not(*place, choice(name))]
    assert found and found == [place for place in PLACES if name in fitting(*place)]
    for level, unit in set(PLACES) - set(found):
        said = why_not(level, unit, choice(name))
        assert f"router '{name}'" in said
        assert all(other in said for other in fitting(level, unit)), "it names what would work"


@every_router
def test_a_router_leaves_its_site_alone(name):
    site, untouched = a_site(), a_site()
    choice(name)(site)
    assert all(torch.equal(getattr(site, field), getattr(untouched, field)) for field in ("hidden", "wins", "tasks"))


@pytest.mark.parametrize("name", [name for name in GATES if routing[name].traits["needs"] == "none"])
def test_a_router_that_needs_nothing_looks_at_nothing(name):
    site = a_site()
    blind = replace(site, hidden=torch.full_like(site.hidden, torch.nan), wins=torch.full_like(site.wins, torch.nan))
    assert torch.equal(choice(name)(site).weight, choice(name)(blind).weight)


@pytest.mark.parametrize("name", [name for name in GATES if routing[name].traits["needs"] == "hidden"])
def test_a_router_that_needs_states_alone_looks_at_no_scores(name):
    site = a_site()
    assert alike(choice(name)(site), choice(name)(replace(site, wins=site.wins.roll(1, 1), tasks=site.tasks * 0)))


# gates

@pytest.mark.parametrize("name, k", WAYS)
@pytest.mark.parametrize("affine", [True, False])
def test_weights_are_shares_of_k_experts(name, k, affine):
    if not affine and name not in LINEAR:
        return
    site = a_site(affine=affine)
    gate = made(name, k, affine)
    shares = chosen(gate.logits(site.hidden), gate.top_k)
    assert gate.top_k == (k or 3)
    assert float((shares.sum(1) - 1).abs().max()) <= 1e-6 and float(shares.min()) >= 0
    assert int((shares > 0).sum(1).max()) <= gate.top_k


@pytest.mark.parametrize("name", [name for name in GATES if "top_k" in routing[name].parameters])
def test_how_many_experts_answer_changes_nothing_else(name):
    assert alike(made(name, 1), made(name, 3))


@every_gate
def test_a_gate_has_a_row_for_each_expert_and_a_column_for_each_feature(name):
    gate = choice(name)(a_site(h=7, e=5))
    assert gate.logits(torch.zeros(4, 7)).shape == (4, 5)
    assert gate.weight.shape[0] == 5 and gate.mean.shape == gate.scale.shape == (7,)
    assert all(tensor.dtype == torch.float32 for tensor in (gate.weight, gate.bias, gate.mean, gate.scale))


@every_gate
def test_the_same_seed_makes_the_same_gate(name):
    one = made(name)
    torch.manual_seed(2)
    assert alike(one, choice(name)(a_site()))


def test_the_random_router_follows_the_seed_and_the_place():
    gate = choice("random")
    assert not alike(gate(a_site(seed=0)), gate(a_site(seed=1)))
    assert not alike(gate(a_site(where="layer 3")), gate(a_site(where="layer 4")))


@every_gate
def test_experts_in_another_order_get_the_same_rows(name):
    site, order = a_site(), [2, 0, 1]
    moved = replace(site, names=tuple(site.names[i] for i in order), wins=site.wins[:, order])
    before, after = made(name).logits(site.hidden), choice(name)(moved).logits(site.hidden)
    assert float((before[:, order] - after).abs().max()) <= 1e-3 * float(before.abs().max().clamp(min=1))
    assert torch.equal(before.argmax(1), torch.tensor(order)[after.argmax(1)]) or name == "uniform"


@every_gate_that_learns
@pytest.mark.parametrize("affine", [True, False])
def test_a_router_that_looks_at_scores_sends_new_prompts_to_the_expert_that_answers_them(name, affine):
    """Half of the prompts make the gate, the other half judge it."""
    if not affine and name not in LINEAR:
        return
    site, half = a_site(m=120, affine=affine), torch.arange(60)
    assert share_won(choice(name)(site.only(half)), site.only(half + 60)) >= 0.95


# a place that holds one matrix and no more

@every_linear_gate
def test_a_gate_where_there_is_no_bias_is_one_matrix(name):
    site = a_site(affine=False)
    gate = made(name, None, False)
    matrix, bias = gate.matrix()
    assert not gate.mean.any() and not gate.bias.any() and not bias.any()
    assert bool((gate.scale == 1).all()) and gate.temperature == 1 and torch.equal(matrix, gate.weight)
    assert torch.allclose(site.hidden @ matrix.T, gate.logits(site.hidden), rtol=1e-5, atol=1e-6)


@every_linear_gate
def test_a_matrix_and_a_bias_say_what_a_gate_says(name):
    site = a_site()
    gate = made(name)
    matrix, bias = gate.matrix()
    logits = gate.logits(site.hidden)
    assert float((site.hidden @ matrix.T + bias - logits).abs().max()) <= 1e-4 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("name", [name for name in GATES if name not in LINEAR])
def test_a_hidden_layer_where_there_is_room_for_a_matrix_is_refused(name):
    with pytest.raises(MethodError, match="no room at layer 7"):
        choice(name)(a_site(affine=False, where="layer 7"))


# sites that have little to tell

ODD = {"one prompt": lambda site: site.only(torch.tensor([4])),
       "two prompts": lambda site: site.only(torch.tensor([0, 1])),
       "one text, many times": lambda site: replace(site, prompts=["p"] * len(site.prompts)),
       "one task": lambda site: replace(site, tasks=torch.zeros_like(site.tasks)),
       "an expert that never wins": lambda site: replace(site, wins=site.wins * torch.tensor([1.0, 1.0, 0.0])),
       "an expert that always wins": lambda site: replace(site, wins=torch.tensor([[0.0, 1.0, 0.0]]).repeat(60, 1)),
       "an expert that wins once": lambda site: replace(site, wins=torch.tensor(
           [[1.0, 0.0, 0.0]] * 59 + [[0.0, 1.0, 0.0]])),
       "states that are all the same": lambda site: replace(site, hidden=torch.full_like(site.hidden, 0.3)),
       "states that are all zero": lambda site: replace(site, hidden=torch.zeros_like(site.hidden)),
       "one feature that is large": lambda site: replace(site, hidden=site.hidden * torch.tensor([1e4] + [1.0] * 11)),
       "more features than prompts": lambda site: a_site(m=9, h=200, affine=site.affine)}


@every_gate
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("odd", ODD)
def test_a_site_that_has_little_to_tell_still_makes_a_sound_gate(name, affine, odd):
    if not affine and name not in LINEAR:
        return
    site = ODD[odd](a_site(affine=affine))
    gate = choice(name)(site)
    assert all(bool(tensor.isfinite().all()) for tensor in (gate.weight, gate.bias, gate.mean, *(gate.inner or ())))
    assert bool((gate.scale > 0).all()) and 0 < gate.temperature < float("inf")
    shares = chosen(gate.logits(site.hidden), gate.top_k)
    assert bool(shares.isfinite().all()) and float((shares.sum(1) - 1).abs().max()) <= 1e-6


@every_gate_that_learns
@pytest.mark.parametrize("affine", [True, False])
def test_an_expert_that_never_wins_is_not_chosen(name, affine):
    if not affine and name not in LINEAR:
        return
    site = a_site(affine=affine)
    site = replace(site, wins=torch.stack([site.wins[:, 0], 1 - site.wins[:, 0], torch.zeros(60)], 1))
    gate = choice(name)(site)
    assert 2 not in gate.logits(site.hidden).argmax(1).tolist() and share_won(gate, site) >= 0.9


@every_gate_that_learns
def test_the_unit_in_which_states_are_measured_makes_no_difference(name):
    """Standardised states are the same in any unit; a power of two keeps their every bit."""
    site = a_site()
    larger = replace(site, hidden=site.hidden * 1024)
    one, other = made(name).logits(site.hidden), choice(name)(larger).logits(larger.hidden)
    assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())


# mixtures

@pytest.mark.parametrize("level, unit, name", PAIRS)
@torch.no_grad()
def test_a_mixture_of_copies_is_the_model_itself(level, unit, name, tiny, tmp_path):
    """For every pair of level and router that the plan allows; at level text the text that it writes is the same."""
    from glue.kinds.text import continued

    copies = [Member(f"copy{i}", "model", tiny("model").path) for i in range(3)]
    texts = ["w3 w9 w4", "w30", "w22 w22 w7 w15 w8", "w11 w12", "w39 w38 w37", "w5"]
    parts = Parts(tuple(copies), None if level in ("model", "text") else weights(copies[0]), copies[0])
    dev = Dev(texts, torch.eye(3).repeat(2, 1), torch.arange(6) % 3)
    module = import_module(f"glue.mix.levels.{level}")
    by = {"routing": unit} if level == "ffn" else {}
    module.write(tmp_path / "mixture", parts, gates(choice(name), module.sites(parts, dev, **by)), **by)
    running = load(Member("mixture", "mixture", str(tmp_path / "mixture")))
    alone = load(copies[0])
    if level == "text":
        assert [continued(running, text, 6) for text in texts] == [continued(alone, text, 6) for text in texts]
        return
    encoded = running.tokenizer(texts, return_tensors="pt", padding=True)
    asked = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    real = asked["attention_mask"].bool()
    where = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = alone.model(**asked, position_ids=where).logits[real]
    difference = running.model(**asked, position_ids=where).logits[real] - expected
    assert float(difference.abs().max() / expected.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", fitting("text", "sentence"))
def test_text_alone_tells_a_router_as_much_as_states_do(name):
    kinds = ["add {} and {}", "who wrote the book about {} and {}", "sort the words {} {}"]
    texts = [kinds[j % 3].format(f"w{j}", f"v{7 * j % 31}") for j in range(120)]
    tasks = torch.arange(120) % 3
    site = Site(("a", "b", "c"), text_features(texts), torch.nn.functional.one_hot(tasks, 3).float(), tasks, texts,
                text_features)
    gate = choice(name)(site.only(torch.arange(60)))
    if isinstance(gate, LossGate):
        assert gate.logits(torch.tensor([[2.0, 1.0, 3.0]])).argmax(1).tolist() == [1]
    else:
        assert share_won(gate, site.only(torch.arange(60, 120))) >= (0.95 if name in LEARN else 0.1)
