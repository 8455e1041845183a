"""Routers: what each makes of dev items, how sure it is of it, and where it may stand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glue.errors import MethodError
from glue.family import families
from glue.kinds.modelling.model_mixture import chosen
from glue.mix import PLACES, fitting, why_not
from glue.mix.fit import calibrated, fitted, standardisation, temperature
from glue.mix.site import NEVER, Gate, LossGate, Site, carrier, gates, plain

ROUTERS = families("routing")


def site_of(wins: Tensor, hidden: Tensor, tasks: Tensor | None = None, **more) -> Site:
    """Prompts whose texts are numbers, of which the states are made."""
    m, e = wins.shape
    return Site(tuple("abcdefgh"[:e]), hidden, wins, torch.zeros(m, dtype=torch.long) if tasks is None else tasks,
                [f"p{j}" for j in range(m)], lambda texts: torch.tensor([[float(text), 1.0] for text in texts]), **more)


def a_zoo(m: int, *, seed: int = 0, h: int = 16, **more) -> Site:
    """Four tasks and experts: each answers its own task in 9 of 10 items, every other one in 3; one is worse at all."""
    rng = torch.Generator().manual_seed(seed)
    where = torch.Generator().manual_seed(5)
    centres, middle = 2 * torch.randn(4, h, generator=where), 5 * torch.randn(h, generator=where)
    tasks = torch.arange(m) % 4
    chance = torch.full((4, 4), 0.3).fill_diagonal_(0.9)
    chance[3] = torch.tensor([0.8, 0.3, 0.3, 0.5])
    wins = torch.bernoulli(chance[tasks], generator=rng)
    return site_of(wins, middle + centres[tasks] + torch.randn(m, h, generator=rng), tasks, **more)


def score(gate: Gate, site: Site) -> float:
    """What an item scores where the first expert answers."""
    return float(site.wins.gather(1, gate.logits(site.hidden).argmax(1)[:, None]).mean())


# learning who answers what

@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["centroid", "linear", "mlp", "prompt"])
def test_a_router_from_noisy_scores_is_nearly_as_good_as_knowing_the_task(name, affine):
    """Each dev item says little of who is good at its task: three of ten wrong experts are right by luck."""
    if name == "mlp" and not affine:
        return
    dev, test = a_zoo(400, affine=affine), a_zoo(4000, seed=1)
    by_task = float(test.wins[torch.arange(4000), torch.tensor([0, 1, 2, 0])[test.tasks]].mean())
    assert by_task - score(ROUTERS.choose(name)(dev), test) <= 0.02
    assert float(test.wins.mean(0).max()) <= by_task - 0.2, "and no single expert would do"


def test_a_hidden_layer_learns_what_no_plane_separates():
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).repeat(10, 1)
    right = (corners[:, 0] != corners[:, 1]).long()
    site = site_of(torch.nn.functional.one_hot(right, 2).float(), corners)
    found = {name: float((ROUTERS.choose(name)(site).logits(corners).argmax(1) == right).float().mean())
             for name in ("linear", "mlp")}
    assert found["mlp"] == 1.0 and found["linear"] <= 0.75


def test_the_linear_router_is_penalised_logistic_regression():
    """With two experts that are never right together, scikit-learn finds the same probabilities at the same penalty."""
    from sklearn.linear_model import LogisticRegression

    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(200, 3, generator=rng) * torch.tensor([1.0, 5.0, 0.1]) + 2
    label = (hidden[:, 0] + hidden[:, 1] / 5 + torch.randn(200, generator=rng) > 2.4).long()
    site = site_of(torch.nn.functional.one_hot(label, 2).float(), hidden)
    standard = ((hidden - hidden.mean(0)) / hidden.std(0, correction=0) / 3 ** 0.5).numpy()
    for penalty in (0.1, 1e-3):
        gate, = fitted(site, width=0, top_k=1, penalties=[penalty])
        ours = gate.logits(hidden).softmax(1)[:, 1].double()
        # two rows of weights v and -v cost v^2 where scikit-learn's one row 2v costs 4 v^2 / 2
        known = LogisticRegression(C=2 / (penalty * 200), tol=1e-10, max_iter=1000).fit(standard, label.numpy())
        assert float((ours - torch.from_numpy(known.predict_proba(standard)[:, 1])).abs().max()) <= 1e-4


@pytest.mark.parametrize("h, m", [(3, 40), (60, 12)])
def test_a_fitted_gate_lies_at_the_lowest_point_of_what_it_minimises(h, m):
    """The gradient of loss plus penalty at the gate's own numbers, by fp64 autograd in all dimensions."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(m, h, generator=rng) + 3
    wins = torch.rand(m, 3, generator=rng)
    gate, = fitted(site_of(wins, hidden), width=0, top_k=1, penalties=[0.01])
    state = (hidden.double() - gate.mean.double()) / gate.scale.double()
    weight, bias = (tensor.double().requires_grad_() for tensor in (gate.weight, gate.bias))
    chance = (state @ weight.T + bias).softmax(1)
    loss = -(chance * wins / wins.amax(1, keepdim=True)).sum(1).log().mean() + 0.01 * h / 2 * weight.square().sum()
    loss.backward()
    assert float(torch.cat([weight.grad.flatten() / h ** 0.5, bias.grad]).abs().max()) <= 1e-5


def test_without_a_bias_a_gate_is_fitted_as_it_is_applied():
    """Two experts split the line at 2, which a matrix can only say of the second feature, a constant."""
    hidden = torch.stack([torch.linspace(1, 3, 41), torch.full((41,), 7.0)], 1)
    right = (hidden[:, 0] > 1.99).long()
    gate = ROUTERS.choose("linear")(site_of(torch.nn.functional.one_hot(right, 2).float(), hidden, affine=False))
    assert not gate.bias.any() and not gate.mean.any()
    assert torch.equal((hidden @ gate.weight.T).argmax(1), right)


def test_items_on_which_experts_agree_teach_nothing():
    hidden = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    wins = torch.nn.functional.one_hot((hidden[:, 0] > 0).long(), 2).float()
    wins[20:] = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).repeat(10, 1)
    site = site_of(wins, hidden)
    scrambled = replace(site, wins=torch.cat([wins[:20], 1 - wins[20:]]))
    for name in ("linear", "mlp", "centroid"):
        one, other = (ROUTERS.choose(name)(each) for each in (site, scrambled))
        assert torch.equal(one.logits(hidden), other.logits(hidden)) and float(one.weight.abs().max()) > 0.1


def test_a_share_won_counts_for_what_it_is_worth_against_the_best():
    hidden = torch.ones(10, 2)
    site = site_of(torch.tensor([[0.2, 0.6, 0.4]]).repeat(10, 1), hidden)
    assert int(ROUTERS.choose("linear")(site).logits(hidden)[0].argmax()) == 1


def test_an_item_that_two_experts_answer_is_content_with_either():
    """The third is right where the others both are not; who of the two answers the rest is all the same."""
    hidden = torch.cat([torch.randn(30, 2, generator=torch.Generator().manual_seed(1)) + shift for shift in (3, -3)])
    wins = torch.tensor([[1.0, 1.0, 0.0]] * 30 + [[0.0, 0.0, 1.0]] * 30)
    chance = ROUTERS.choose("linear")(site_of(wins, hidden)).logits(hidden).softmax(1)
    assert float(chance[:30, :2].sum(1).min()) > 0.9 and torch.allclose(chance[:, 0], chance[:, 1], atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "mlp", "centroid"])
def test_experts_that_differ_nowhere_cannot_teach_a_router(name):
    with pytest.raises(MethodError, match="the same on each of the 4 dev items"):
        ROUTERS.choose(name)(site_of(torch.ones(4, 2), torch.randn(4, 2)))


def test_a_feature_that_never_changes_does_not_blow_up():
    hidden = torch.tensor([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0], [4.0, 7.0]])
    gate = ROUTERS.choose("linear")(site_of(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), hidden))
    assert float(gate.scale[1]) == 1.0 and gate.logits(hidden).argmax(1).tolist() == [0, 0, 1, 1]


# how sure a gate is

@pytest.mark.parametrize("true", [0.25, 1.0, 6.0])
def test_the_temperature_is_the_one_that_the_results_were_drawn_with(true):
    rng = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(20_000, 4, generator=rng)
    right = torch.multinomial((logits / true).softmax(1), 1, generator=rng)[:, 0]
    found, _ = temperature(logits, torch.nn.functional.one_hot(right, 4))
    assert abs(found / true - 1) <= 0.08


def test_the_temperature_is_the_best_by_a_search_of_scipy():
    from scipy.optimize import minimize_scalar

    rng = torch.Generator().manual_seed(3)
    logits, wins = torch.randn(50, 3, generator=rng).double(), torch.rand(50, 3, generator=rng).double()

    def loss(log_at: float) -> float:
        p = (logits / math.exp(log_at)).softmax(1)
        return float(-(p * wins / wins.amax(1, keepdim=True)).sum(1).log().sum() - p.log().mean())

    found, value = temperature(logits, wins)
    best = minimize_scalar(loss, bounds=(math.log(0.01), math.log(10_000)), method="bounded")
    assert value <= best.fun + 1e-3 * abs(best.fun)
    assert abs(loss(math.log(found)) - value) <= 1e-9


def test_a_gate_that_made_no_mistake_on_few_items_is_not_certain():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    few, _ = temperature(logits.repeat(2, 1), torch.eye(2).repeat(2, 1))
    many, _ = temperature(logits.repeat(500, 1), torch.eye(2).repeat(500, 1))
    sure = [float((logits / t).softmax(1)[0, 0]) for t in (few, many)]
    assert 0.8 < sure[0] < 0.95 and 0.995 < sure[1] < 1


@pytest.mark.parametrize("name", ["centroid", "linear", "mlp"])
def test_a_router_is_as_sure_of_new_prompts_as_it_is_right(name):
    """Where one expert of four is right about an item, mean probability of the first is about how often it is right."""
    def blurred(m: int, seed: int) -> Site:
        rng = torch.Generator().manual_seed(seed)
        centres = torch.eye(4, 30) * 3
        right = torch.arange(m) % 4
        return site_of(torch.nn.functional.one_hot(right, 4).float(), centres[right] + torch.randn(m, 30, generator=rng)
                       * 1.5)

    gate, test = ROUTERS.choose(name)(blurred(240, 0)), blurred(4000, 1)
    chance = gate.logits(test.hidden).softmax(1)
    assert abs(float(chance.amax(1).mean()) - score(gate, test)) <= 0.06


def test_prompts_of_one_text_are_judged_together():
    """A gate that remembers texts knows nothing of others; were a text in two folds, it would seem to know all."""
    def remembering(site: Site) -> list[Gate]:
        weight = torch.zeros(2, 40)
        for text, row in zip(site.prompts, site.wins, strict=True):
            weight[:, int(text.split()[0])] = row
        return [plain(weight)]

    def found(*texts: str) -> float:
        right = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0)).repeat(3)
        site = replace(site_of(torch.nn.functional.one_hot(right, 2).float(), torch.eye(40).repeat(3, 1)),
                       prompts=[f"{j} {text}" for text in texts for j in range(40)])
        return calibrated(site, remembering).temperature

    assert found("once", "once", "once") == 1.0
    assert found("once", "again", "and again") < 0.5


# centroid

def test_the_centroid_router_sends_a_prompt_to_the_nearest_mean():
    hidden = torch.tensor([[0.0, 0], [2, 0], [10, 0], [12, 0], [0, 10], [2, 12]])
    wins = torch.eye(3).repeat_interleave(2, 0)
    gate = ROUTERS.choose("centroid")(site_of(wins, hidden))
    mean, scale = standardisation(hidden)
    means = ((hidden - mean) / scale).view(3, 2, 2).mean(1)
    new = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) * 20 - 4
    distance = torch.cdist(((new - mean) / scale), means).square()
    logits = gate.logits(new) * gate.temperature
    assert torch.allclose((logits - logits[:, :1]), (distance[:, :1] - distance) / 2, atol=1e-4)


def test_experts_that_are_equally_good_share_a_prompt():
    hidden = torch.tensor([[0.0], [4.0], [8.0]])
    wins = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.2, 0.1], [0.0, 0.0, 1.0]])
    gate = ROUTERS.choose("centroid")(site_of(wins, hidden))
    mean, scale = standardisation(hidden)
    # a has half of the first and all of the second, b half of the first
    assert torch.allclose(gate.weight[:, 0], (torch.tensor([8 / 3, 0.0, 8.0]) - mean) / scale, atol=1e-6)


# prompts by hand

def test_prompts_given_by_name_make_the_gate():
    site = site_of(torch.eye(2), torch.zeros(2, 2))
    gate = ROUTERS.choose({"prompt": {"prompts": {"b": ["4", "6"], "a": ["-1", "1"]}}})(site)
    assert torch.allclose(gate.weight, torch.tensor([[-1.0, 0.0], [1.0, 0.0]])) and float(gate.mean[0]) == 2.5
    assert gate.logits(torch.tensor([[2.4, 9.0], [2.6, -9.0]])).argmax(1).tolist() == [0, 1]


def test_negative_prompts_point_an_expert_away_from_them():
    """States of three features; b's negatives differ from its prompts in the last one alone."""
    known = {"one": [4.0, 0, 0], "two": [0, 4.0, 0], "not two": [0, 4.0, 4.0]}
    site = replace(site_of(torch.eye(2), torch.zeros(2, 3)),
                   prompt_states=lambda texts: torch.tensor([known[text] for text in texts]))
    router = ROUTERS.choose({"prompt": {"prompts": {"a": ["one"], "b": ["two"]}, "negatives": {"b": ["not two"]}}})
    gate = router(site)
    assert torch.allclose(gate.weight[1], torch.tensor([0.0, 0.0, -1.0]))
    assert torch.allclose(gate.weight[0], torch.tensor([0.5, -0.5, 0.0]).sqrt().nan_to_num(-math.sqrt(0.5)))


@pytest.mark.parametrize("given, said", [
    ({"prompts": {"a": ["1"], "bb": ["2"]}}, "'bb', which is no expert"),
    ({"prompts": {"a": ["1"]}}, "no prompts for the expert 'b'"),
    ({"prompts": {"a": ["1"], "b": ["2"]}, "negatives": {"c": ["1"]}}, "'c', which is no expert"),
    ({"prompts": {"a": ["1"], "b": ["2"]}, "negatives": {"a": []}}, "an empty list of negatives for the expert 'a'"),
    ({"negatives": {"a": ["1"]}}, "negatives and no prompts")])
def test_prompts_that_fit_no_expert_are_refused(given, said):
    with pytest.raises(MethodError, match=said):
        ROUTERS.choose({"prompt": given})(site_of(torch.eye(2), torch.zeros(2, 2)))


def test_an_expert_that_is_best_on_no_task_is_never_chosen_by_the_prompt_router():
    hidden = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 0.0], [5.0, 1.0]])
    wins = torch.tensor([[1.0, 0, 0.5]] * 2 + [[0, 1.0, 0.5]] * 2)
    site = site_of(wins, hidden, torch.tensor([0, 0, 1, 1]))
    gate = ROUTERS.choose({"prompt": {"top_k": 3}})(site)
    shares = chosen(gate.logits(hidden), 3)
    assert shares.argmax(1).tolist() == [0, 0, 1, 1] and shares[:, 2].tolist() == [0.0] * 4
    bare = ROUTERS.choose("prompt")(replace(site, affine=False))
    new = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 10
    assert int((bare.logits(new).argmax(1) == 2).sum()) == 0, "without a bias it is barred by the mean of the others"


# the place of a gate

def test_a_bias_rides_on_the_mean_where_there_is_no_place_for_it():
    """States that differ at right angles to their mean: the matrix says exactly what mean and bias would have."""
    rng = torch.Generator().manual_seed(0)
    middle = torch.tensor([3.0, 4.0, 0.0, 0.0])
    away = torch.randn(20, 4, generator=rng)
    away = away - torch.outer(away @ middle, middle) / middle.square().sum()
    site = site_of(torch.rand(20, 2, generator=rng), middle + away - away.mean(0), affine=False)
    weight, bias = torch.randn(2, 4, generator=rng), torch.tensor([2.0, -1.0])
    mean, scale = site.hidden.mean(0), torch.ones(4)
    bare = site.gate(weight, bias, mean, scale, temperature=2.0)
    full = replace(site, affine=True).gate(weight, bias, mean, scale, temperature=2.0)
    assert torch.allclose(bare.logits(site.hidden), full.logits(site.hidden), atol=1e-5)
    assert torch.allclose(site.hidden.double() @ carrier(site.hidden, mean, scale), torch.ones(20).double())


def test_what_carries_a_bias_is_as_near_to_one_as_any_multiple_of_the_mean():
    site = a_zoo(200)
    mean, scale = standardisation(site.hidden)
    found = carrier(site.hidden, mean, scale)
    size = (site.hidden / scale).double() @ found
    best = float((size - 1).square().mean())
    assert all(best < float((size * more - 1).square().mean()) for more in (0.99, 1.01))
    assert float(carrier(torch.zeros(4, 3), torch.zeros(3), torch.ones(3)).abs().max()) == 0


def test_a_gate_with_a_hidden_layer_is_no_matrix():
    gate = Gate(torch.ones(2, 3), torch.zeros(2), torch.zeros(4), torch.ones(4), (torch.ones(3, 4), torch.zeros(3)))
    with pytest.raises(MethodError, match="cannot be stored as one matrix"):
        gate.matrix()


def test_no_gate_holds_infinities():
    site = a_zoo(40)
    gate = site.gate(torch.ones(4, 16), torch.zeros(4), torch.zeros(16), torch.ones(16), barred=[2])
    shares = chosen(gate.cooled(10_000.0, True).logits(site.hidden), 4)
    assert float(gate.bias[2]) == NEVER and shares[:, 2].tolist() == [0.0] * 40


def test_more_experts_a_prompt_than_there_are_is_refused():
    with pytest.raises(MethodError, match="would choose 5 of 4 experts"):
        gates(ROUTERS.choose({"random": {"top_k": 5}}), [a_zoo(8)])


def test_gates_are_made_one_place_after_the_other_and_sent_back():
    sent = []

    def places():
        for layer in range(3):
            sent.append((yield replace(a_zoo(40), where=f"layer {layer}")))

    made = gates(ROUTERS.choose("random"), places())
    assert sent == made and len(made) == 3
    one_by_one = gates(ROUTERS.choose("random"), [replace(a_zoo(40), where=f"layer {layer}") for layer in range(3)])
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(made, one_by_one, strict=True))
    assert gates(ROUTERS.choose("random"), iter([])) == [] == gates(ROUTERS.choose("random"), (x for x in ()))


# which router goes where

@pytest.mark.parametrize("place, router, said", [
    (("ffn", "token"), "mlp", "room for one matrix a layer; use centroid, linear, prompt, random or uniform"),
    (("model", "sentence"), "loss", "which only level text does; use centroid, linear, mlp, prompt, random or uniform"),
    (("text", "sentence"), "uniform", "one has to answer alone; use centroid, linear, loss, mlp, prompt or random"),
    (("text", "sentence"), {"linear": {"top_k": 2}}, "several experts answer together"),
    (("block", "token"), "linear", "only level ffn can route token by token")])
def test_a_pair_of_level_and_router_that_cannot_be_is_refused_with_what_could(place, router, said):
    assert said in why_not(*place, ROUTERS.choose(router))


def test_every_level_takes_some_router():
    assert all(fitting(*place) for place in PLACES)
    assert why_not("ffn", "sentence", ROUTERS.choose("mlp")) == ""
    assert why_not("text", "sentence", ROUTERS.choose("loss")) == ""


def test_the_loss_router_picks_whoever_is_least_surprised():
    gate = ROUTERS.choose("loss")(a_zoo(4))
    assert isinstance(gate, LossGate) and gate.top_k == 1
    assert gate.logits(torch.tensor([[0.7, 0.2], [0.1, 3.0]])).argmax(1).tolist() == [1, 0]
