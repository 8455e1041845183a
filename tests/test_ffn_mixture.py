"""Mixtures of MLPs: routed by token they are stock models of transformers, routed by sentence they are ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from glue.checkpoint import Checkpoint, InMemory, weights_digest
from glue.errors import CheckpointError, MethodError
from glue.family import families
from glue.kinds import load, weights
from glue.kinds.mixture import register
from glue.kinds.modelling.ffn_mixture import SentenceCache
from glue.member import Member
from glue.mix.levels import ffn
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, Site, plain

TEXTS = ["w3 w4 w5", "w30 w31", "w9", "w38 w2 w20 w11", "w7 w7", "w25"]
DEV = Dev(TEXTS, torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3), torch.arange(6) % 2)
every_routing = pytest.mark.parametrize("routing", ["token", "sentence"])


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def make(tmp_path):
    """make("name", "qwen2", seed=1, sliding_window=4) writes a tiny model of any architecture; biases are not zero."""
    from tests.conftest import WORDS, word_tokenizer

    def written(name: str, model_type: str = "llama", *, seed: int = 0, **shape) -> Member:
        config = AutoConfig.for_model(model_type, **{
            "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, **shape})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            for part, tensor in model.named_parameters():
                if part.endswith(".bias"):
                    torch.nn.init.normal_(tensor, std=0.3)
        model.save_pretrained(tmp_path / name)
        word_tokenizer(WORDS).save_pretrained(tmp_path / name)
        return Member(name, "model", str(tmp_path / name))

    return written


def some_prompts(b: int = 9, s: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, 40, (b, s), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, by: int) -> dict[str, Tensor]:
    """The same prompts with junk on the left that the mask hides."""
    junk = torch.full((len(ids), by), 17)
    return {"input_ids": torch.cat([junk, ids], dim=1),
            "attention_mask": torch.cat([torch.zeros_like(junk), torch.ones_like(ids)], dim=1)}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def average(experts) -> InMemory:
    """The plain mean of models, as a trunk."""
    parts = [weights(expert) for expert in experts]
    return InMemory({name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]})


def random_gates(experts, layers: int, k: int = 1, routing: str = "token", width: int = 0) -> list[Gate]:
    """Gates that send tokens to all experts; of sentences with everything that a gate can have."""
    rng, e = torch.Generator().manual_seed(5), len(experts)
    def draw(*shape):
        return torch.randn(*shape, generator=rng)
    if routing == "token":
        return [plain(draw(e, 32), k) for _ in range(layers)]
    inner = (lambda: (draw(width, 32), draw(width))) if width else (lambda: None)
    return [Gate(draw(e, width or 32), 0.3 * draw(e), 0.3 * draw(32), draw(32).abs() + 0.2, inner(), 1.7, k)
            for _ in range(layers)]


def mixed(tmp_path, experts, *, dense: int = 0, k: int = 1, routing: str = "token", gates=None, trunk=None,
          name: str = "mixture", width: int = 0, **more) -> Member:
    """A mixture of these experts, written to a folder; around them their mean, behind random gates."""
    layers = AutoConfig.from_pretrained(experts[0].path).num_hidden_layers - dense
    parts = Parts(tuple(experts), trunk or average(experts), experts[0], dense)
    gates = random_gates(experts, layers, k, routing, width) if gates is None else gates
    ffn.write(tmp_path / name, parts, gates, routing=routing, **more)
    return Member(name, "mixture", str(tmp_path / name))


def by_hand(experts, gates, ids: Tensor, dense: int, routing: str, trunk=None) -> Tensor:
    """An oracle in fp64: the trunk, whose MLPs from layer `dense` on are written out as the paper defines them."""
    models = [load(expert).model.double() for expert in experts]
    base = load(experts[0]).model
    base.load_state_dict({**(trunk or average(experts))}, strict=False)
    base.double()

    def layer(i: int, gate: Gate):
        def answered(states: Tensor) -> Tensor:
            asked = states if routing == "token" else states.mean(1, keepdim=True)
            logits = (asked - gate.mean.double()) / gate.scale.double()
            if gate.inner is not None:
                logits = torch.relu(logits @ gate.inner[0].double().T + gate.inner[1].double())
            logits = (logits @ gate.weight.double().T + gate.bias.double()) / gate.temperature
            shares = logits.exp() * (logits >= logits.topk(gate.top_k, -1).values[..., -1:])
            shares = shares / shares.sum(-1, keepdim=True)
            outputs = torch.stack([model.model.layers[i].mlp(states) for model in models], -1)
            return (outputs * shares[..., None, :]).sum(-1)
        return answered

    for i, gate in enumerate(gates, dense):
        base.model.layers[i].mlp.forward = layer(i, gate)
    return base(ids).logits


# laws

@every_routing
@pytest.mark.parametrize("dense, k", [(0, 1), (0, 3), (1, 1), (1, 2)])
def test_a_mixture_of_copies_is_the_model_itself(make, tmp_path, routing, dense, k):
    model, ids = make("model"), some_prompts()
    copies = [Member(f"copy{i}", "model", model.path) for i in range(3)]
    member = mixed(tmp_path, copies, dense=dense, k=k, routing=routing, trunk=weights(model))
    assert difference(load(member).model(ids).logits, load(model).model(ids).logits) <= 1e-5


@every_routing
def test_a_mixture_whose_layers_are_all_dense_is_the_trunk_bit_for_bit(make, tmp_path, routing):
    experts, trunk, ids = [make("one", seed=1), make("two", seed=2)], make("trunk", seed=3), some_prompts()
    member = mixed(tmp_path, experts, dense=3, routing=routing, trunk=weights(trunk))
    assert torch.equal(load(member).model(ids).logits, load(trunk).model(ids).logits)


@every_routing
@pytest.mark.parametrize("dense", [0, 2])
def test_gates_of_zeros_that_choose_all_experts_average_what_their_mlps_answer(make, tmp_path, routing, dense):
    experts, ids = [make(f"e{i}", seed=i) for i in range(3)], some_prompts()
    gates = [plain(torch.zeros(3, 32), 3)] * (3 - dense)
    member = mixed(tmp_path, experts, dense=dense, routing=routing, gates=gates)
    models, alone = [load(expert).model for expert in experts], load(experts[0]).model
    alone.load_state_dict({**average(experts)})
    for i in range(dense, 3):
        alone.model.layers[i].mlp.forward = lambda states, i=i: sum(
            model.model.layers[i].mlp(states) for model in models) / 3
    assert difference(load(member).model(ids).logits, alone(ids).logits) <= 5e-6


@pytest.mark.parametrize("routing, width, k, dense", [
    ("token", 0, 1, 0), ("token", 0, 2, 0), ("token", 0, 1, 1), ("token", 0, 2, 1), ("sentence", 0, 1, 0),
    ("sentence", 0, 2, 1), ("sentence", 5, 1, 1), ("sentence", 5, 3, 0)])
def test_tokens_and_sentences_are_answered_as_written_out_by_hand(make, tmp_path, routing, width, k, dense):
    experts, ids = [make(f"e{i}", seed=i) for i in range(3)], some_prompts()
    gates = random_gates(experts, 3 - dense, k, routing, width)
    member = mixed(tmp_path, experts, dense=dense, routing=routing, gates=gates)
    expected = by_hand(experts, gates, ids, dense, routing)
    assert difference(load(member).model(ids).logits.double(), expected) <= 1e-5


@every_routing
def test_experts_in_another_order_with_their_rows_are_the_same_mixture(make, tmp_path, routing):
    experts, ids, order = [make(f"e{i}", seed=i) for i in range(3)], some_prompts(), [2, 0, 1]
    gates = random_gates(experts, 3, 2, routing)
    trunk = average(experts)
    moved = [Gate(gate.weight[order], gate.bias[order], gate.mean, gate.scale, None, gate.temperature, 2)
             for gate in gates]
    one = mixed(tmp_path, experts, routing=routing, gates=gates, trunk=trunk)
    two = mixed(tmp_path, [experts[i] for i in order], routing=routing, gates=moved, trunk=trunk, name="moved")
    assert difference(load(one).model(ids).logits, load(two).model(ids).logits) <= 5e-6


@every_routing
@pytest.mark.parametrize("dense", [0, 1])
def test_padding_on_the_left_changes_nothing(make, tmp_path, routing, dense):
    experts, ids = [make(f"e{i}", seed=i) for i in range(3)], some_prompts()
    model = load(mixed(tmp_path, experts, dense=dense, k=2, routing=routing)).model
    asked = padded(ids, 5)
    where = (asked["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert difference(model(**asked, position_ids=where).logits[:, 5:], model(ids).logits) <= 5e-6
    if routing == "sentence":
        assert difference(model(**asked).logits[:, 5:], model(ids).logits) <= 5e-6


@every_routing
def test_decoding_with_the_cache_is_reading_the_whole_text(make, tmp_path, routing):
    experts, text = [make(f"e{i}", seed=i) for i in range(3)], some_prompts(s=12)
    model = load(mixed(tmp_path, experts, dense=1, k=2, routing=routing)).model
    first = model(text[:, :6], use_cache=True)
    pieces, asked = [first.logits], {} if routing == "token" else {"routes": first.routes}
    for step in range(6, 12):
        pieces.append(model(text[:, step:step + 1], past_key_values=first.past_key_values, use_cache=True).logits)
    assert difference(torch.cat(pieces, 1), model(text, **asked).logits) <= 5e-6


@every_routing
def test_a_saved_mixture_comes_back_bit_for_bit(make, tmp_path, routing):
    experts, ids = [make(f"e{i}", seed=i) for i in range(3)], some_prompts()
    model = load(mixed(tmp_path, experts, dense=1, k=2, routing=routing, width=4 * (routing == "sentence"))).model
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)


HOW = {"greedy": {}, "beams": {"num_beams": 3}, "without cache": {"use_cache": False},
       "beams without cache": {"num_beams": 2, "use_cache": False}}


@every_routing
@pytest.mark.parametrize("how", HOW)
def test_a_padded_batch_continues_as_each_prompt_does_alone(make, tmp_path, routing, how):
    experts, ids = [make(f"e{i}", seed=i) for i in range(3)], some_prompts(6)
    model = load(mixed(tmp_path, experts, dense=1, routing=routing)).model
    model.generation_config.eos_token_id = None
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **HOW[how]}
    made = model.generate(**padded(ids, 4), **asked)[:, 4:]
    for row, line in zip(ids, made, strict=True):
        assert torch.equal(line, model.generate(row[None], **asked)[0])


def test_beam_search_finds_what_its_own_steps_would_find(make, tmp_path):
    """A search over two beams written out, each beam read whole at every step on the routes of its prompt."""
    experts, ids = [make(f"e{i}", seed=i) for i in range(3)], some_prompts(1)
    model = load(mixed(tmp_path, experts, k=2, routing="sentence")).model
    model.generation_config.eos_token_id = None
    routes, beams = model(ids).routes, [(0.0, ids)]
    for _ in range(5):
        found = [(score + float(value), torch.cat([text, token.view(1, 1)], 1)) for score, text in beams
                 for value, token in zip(*model(text, routes=routes).logits[0, -1].log_softmax(-1).topk(2),
                                         strict=True)]
        beams = sorted(found, key=lambda one: -one[0])[:2]
    made = model.generate(ids, num_beams=2, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made, beams[0][1])


# routing by sentence

def test_a_batch_of_mixed_routes_is_answered_as_single_prompts_are(make, tmp_path):
    experts, ids = [make(f"e{i}", seed=i) for i in range(3)], some_prompts()
    model = load(mixed(tmp_path, experts, routing="sentence")).model
    output = model(ids)
    assert all(len(set(output.routes[:, layer].argmax(1).tolist())) > 1 for layer in range(3))
    for row, logits, routes in zip(ids, output.logits, output.routes, strict=True):
        alone = model(row[None])
        assert torch.equal(alone.routes[0], routes) and difference(alone.logits[0], logits) <= 1e-5


def test_one_expert_in_every_layer_is_the_trunk_with_its_mlps(make, tmp_path):
    experts, ids = [make(f"e{i}", seed=i) for i in range(2)], some_prompts()
    running = load(mixed(tmp_path, experts, routing="sentence", trunk=weights(experts[0])))
    with running.pinned(0):
        assert torch.equal(running.model(ids).logits, load(experts[0]).model(ids).logits)
    assert torch.equal(running.model(ids, routes=torch.zeros(9, dtype=torch.long)).logits,
                       load(experts[0]).model(ids).logits)


@pytest.mark.parametrize("k", [1, 2])
def test_a_context_has_a_route_that_what_follows_can_be_pinned_to(make, tmp_path, k):
    experts = [make(f"e{i}", seed=i) for i in range(3)]
    running = load(mixed(tmp_path, experts, k=k, dense=1, routing="sentence"))
    contexts, text = some_prompts(4).tolist(), torch.tensor([[5, 6, 7, 8]])
    routes = running.route(contexts)
    assert running.route(contexts[::-1]) == routes[::-1] and len(set(routes)) > 1
    for context, route in zip(contexts, routes, strict=True):
        with running.pinned(route):
            pinned = running.model(text).logits
        given = running.model(torch.tensor([context])).routes
        assert difference(pinned, running.model(text, routes=given).logits) <= 1e-5
    assert not torch.equal(running.model(text).logits, pinned)


def test_a_reordered_or_repeated_cache_is_the_cache_of_such_prompts(make, tmp_path):
    experts, ids, step = [make(f"e{i}", seed=i) for i in range(3)], some_prompts(), some_prompts(9, 1, seed=1)
    model = load(mixed(tmp_path, experts, k=2, routing="sentence")).model
    order = torch.tensor([4, 4, 0, 8, 2, 2, 7, 1, 1])
    moved, fresh, whole = (model(rows, use_cache=True).past_key_values for rows in (ids, ids[order], ids[:3]))
    moved.reorder_cache(order)
    expected = model(step, past_key_values=fresh).logits
    assert difference(model(step, past_key_values=moved).logits, expected) <= 1e-5
    whole.batch_repeat_interleave(3)
    again = model(ids[:3].repeat_interleave(3, 0), use_cache=True).past_key_values
    assert difference(model(step, past_key_values=whole).logits, model(step, past_key_values=again).logits) <= 1e-5


def test_a_cache_that_was_made_by_hand_learns_the_routes(make, tmp_path):
    model = load(mixed(tmp_path, [make("one"), make("two", seed=1)], routing="sentence")).model
    cache = SentenceCache(model.trunk.config)
    output = model(some_prompts(), past_key_values=cache)
    assert torch.equal(torch.stack(cache.routes.weights, 1), output.routes) and cache.get_seq_length() == 7


def test_what_a_mixture_by_sentence_cannot_follow_is_refused(make, tmp_path):
    from transformers import DynamicCache

    model, ids = load(mixed(tmp_path, [make("one"), make("two", seed=1)], routing="sentence")).model, some_prompts(2)
    for asked, said in [({"past_key_values": DynamicCache()}, "keeps a SentenceCache, this is a DynamicCache"),
                        ({"attention_mask": torch.ones(2, 1, 7, 7)}, r"the attention mask is \[b, s\]"),
                        ({"routes": torch.tensor([0, 1, 0])}, "2 prompts, but routes for 3"),
                        ({"routes": torch.tensor([0, 2])}, "routes are expert indices"),
                        ({"routes": torch.zeros(2, 3, 2)}, "routes are expert indices"),
                        ({"routes": torch.ones(2, 5)}, "routes are expert indices")]:
        with pytest.raises(ValueError, match=said):
            model(ids, **asked)


def test_embeddings_and_labels_can_be_given(make, tmp_path):
    member, ids = mixed(tmp_path, [make("one"), make("two", seed=1)], k=2, routing="sentence"), some_prompts()
    model = load(member).model
    expected = model(ids)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected.logits)
    loss = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(model(ids, labels=ids).loss - loss)) <= 1e-5
    assert len(model(ids, output_hidden_states=True).hidden_states) == 4
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model()


def test_routers_stay_in_fp32_whatever_the_model_is_loaded_as(make, tmp_path):
    register()
    member = mixed(tmp_path, [make("one"), make("two", seed=1)], routing="sentence", width=4)
    half = AutoModelForCausalLM.from_pretrained(member.path, dtype=torch.bfloat16)
    assert {tensor.dtype for name, tensor in half.state_dict().items() if ".router." in name} == {torch.float32}
    assert half.mixed[0].experts[1].up_proj.weight.dtype == torch.bfloat16


# sites

def walked(parts: Parts, gates, routing: str) -> list[Site]:
    """The sites behind these gates; None is a gate that is not told."""
    walk = ffn.sites(parts, DEV, routing=routing)
    return [next(walk), *(walk.send(gate) for gate in gates[:-1])]


@pytest.mark.parametrize("routing, dense, k, told", [
    ("token", 0, 1, True), ("token", 1, 2, True), ("token", 0, 2, False), ("sentence", 0, 1, True),
    ("sentence", 1, 2, True), ("sentence", 0, 2, False)])
def test_states_of_sites_are_those_that_gates_see_when_they_serve(make, tmp_path, routing, dense, k, told):
    """Behind the gates that were sent back, or without them behind equal weights."""
    experts = [make(f"e{i}", seed=i) for i in range(2)]
    parts = Parts(tuple(experts), average(experts), experts[0], dense)
    gates = random_gates(experts, 3 - dense, k, routing) if told else [plain(torch.zeros(2, 32), 2)] * (3 - dense)
    sites = walked(parts, gates if told else [None] * len(gates), routing)
    assert [site.where for site in sites] == [f"layer {i}" for i in range(dense, 3)]
    assert {site.affine for site in sites} == {routing == "sentence"} and sites[0].names == ("e0", "e1")
    running, served = load(mixed(tmp_path, experts, dense=dense, routing=routing, gates=gates)), []
    for layer in getattr(running.model, "trunk", running.model).model.layers[dense:]:
        layer.mlp.register_forward_pre_hook(lambda _, asked: served.append(asked[0][0]))
    for row, text in enumerate(TEXTS):
        served.clear()
        running.model(torch.tensor([running.tokenizer(text)["input_ids"]]))
        for site, states in zip(sites, served, strict=True):
            if routing == "sentence":
                assert difference(site.hidden[row], states.mean(0)) <= 1e-5
            else:
                assert_one_of_each_part(site.hidden[4 * row:4 * row + 4], states)


def assert_one_of_each_part(rows: Tensor, states: Tensor) -> None:
    """Row k of r is the state of a token that begins, at the latest, where part k of r of the text ends."""
    r, length = len(rows), len(states)
    for k, row in enumerate(rows):
        here = [j for j, state in enumerate(states) if difference(row, state) <= 1e-5]
        assert len(here) == 1 and k * length // r <= here[0] <= max((k + 1) * length - 1, 0) // r


def test_a_gate_that_judges_tokens_learns_from_some_of_each_prompt_and_no_more_than_a_few_thousand(make, monkeypatch):
    experts = [make(f"e{i}", seed=i) for i in range(2)]
    parts = Parts(tuple(experts), average(experts), experts[0], 1)
    site, again, other = (next(ffn.sites(parts, dev)) for dev in (DEV, DEV, replace(DEV, seed=3)))
    assert site.prompts == [text for text in TEXTS for _ in range(4)]
    assert torch.equal(site.wins, DEV.wins.repeat_interleave(4, 0))
    assert torch.equal(site.tasks, DEV.tasks.repeat_interleave(4))
    assert torch.equal(site.hidden, again.hidden) and not torch.equal(site.hidden, other.hidden)
    for rows, each in ((23, 3), (12, 2), (5, 1)):
        monkeypatch.setattr(ffn, "ROWS", rows)
        assert len(next(ffn.sites(parts, DEV)).hidden) == 6 * each
    assert next(ffn.sites(parts, DEV, routing="sentence")).prompts == TEXTS


@every_routing
def test_new_texts_of_a_router_take_the_way_of_the_dev_prompts(make, routing):
    """They are told by their means, also where a gate judges tokens."""
    experts = [make(f"e{i}", seed=i) for i in range(2)]
    parts = Parts(tuple(experts), average(experts), experts[0], 1)
    sites = walked(parts, random_gates(experts, 2, routing=routing), routing)
    assert not torch.equal(sites[0].hidden, sites[1].hidden)
    for site in sites:  # the first of them again, when the texts have gone further
        whole = site.prompt_states(TEXTS)
        assert difference(site.prompt_states(TEXTS[2:4]), whole[2:4]) <= 1e-5
        if routing == "sentence":
            assert difference(whole, site.hidden) <= 1e-5


@pytest.mark.parametrize("routing, router", [("token", "random"), ("token", "uniform"), ("token", "linear"),
                                             ("token", "prompt"), ("sentence", "linear"),
                                             ("sentence", {"mlp": {"width": 5}}), ("sentence", "prompt")])
def test_registered_routers_make_gates_that_the_level_can_hold(make, tmp_path, routing, router):
    experts = [make(f"e{i}", seed=i) for i in range(2)]
    parts = Parts(tuple(experts), average(experts), experts[0], 1)
    choice = families("routing").choose(router)
    walk, gates = ffn.sites(parts, DEV, routing=routing), []
    site = next(walk)
    while site is not None:
        gates.append(choice(site))
        try:
            site = walk.send(gates[-1])
        except StopIteration:
            site = None
    assert len(gates) == 2
    member = mixed(tmp_path, experts, dense=1, routing=routing, gates=gates)
    expected = by_hand(experts, gates, some_prompts(), 1, routing)
    assert difference(load(member).model(some_prompts()).logits.double(), expected) <= 1e-4


# what is written

VARIANTS = {"tied": {"tie_word_embeddings": True}, "head": {"head_dim": 16},
            "rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0,
                                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                         "original_max_position_embeddings": 16}},
            "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
            "gelu": {"hidden_act": "gelu"}, "eps": {"rms_norm_eps": 0.1},
            "qwen2": {"model_type": "qwen2"}, "mistral": {"model_type": "mistral", "sliding_window": None}}


@every_routing
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dense", [0, 1])
def test_the_shape_of_the_experts_is_kept(make, tmp_path, routing, variant, dense):
    model, ids = make("model", **VARIANTS[variant]), some_prompts(3, 30)
    member = mixed(tmp_path, [model, model], dense=dense, routing=routing, trunk=weights(model))
    assert difference(load(member).model(ids).logits, load(model).model(ids).logits) <= 5e-6


@pytest.mark.parametrize("routing, model_type, shape, dense", [
    ("token", "mistral", {"sliding_window": 5}, 0), ("sentence", "mistral", {"sliding_window": 5}, 1),
    ("sentence", "llama", {"attention_bias": True}, 1), ("sentence", "llama", {"mlp_bias": True}, 0),
    ("sentence", "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, 1)])
def test_windows_and_biases_are_kept_where_there_is_a_place_for_them(make, tmp_path, routing, model_type, shape, dense):
    model, ids = make("model", model_type, **shape), some_prompts(3, 12)
    running = load(mixed(tmp_path, [model, model], dense=dense, routing=routing, trunk=weights(model)))
    assert difference(running.model(ids).logits, load(model).model(ids).logits) <= 5e-6
    first = running.model(ids[:, :7], use_cache=True)
    rest = running.model(ids[:, 7:], past_key_values=first.past_key_values).logits
    assert difference(rest, load(model).model(ids).logits[:, 7:]) <= 5e-6


def test_files_have_the_names_of_single_experts_and_configurations_that_old_versions_read(make, tmp_path):
    experts = [make(f"e{i}", seed=i, rope_parameters={"rope_type": "default", "rope_theta": 123.0}) for i in range(2)]
    plain_, hybrid = (Checkpoint(mixed(tmp_path, experts, dense=dense, name=f"d{dense}").folder) for dense in (0, 1))
    up = weights(experts[1])["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(plain_["model.layers.1.block_sparse_moe.experts.1.w3.weight"], up)
    assert torch.equal(hybrid["model.layers.1.mlp.experts.1.up_proj.weight"], up)
    assert hybrid["model.layers.0.mlp.up_proj.weight"].shape == up.shape
    assert not any(hybrid[f"model.layers.2.mlp.shared_expert.{name}.weight"].any()
                   for name in ("gate_proj", "up_proj", "down_proj"))
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("d0", "d1")]
    assert [one["model_type"] for one in told] == ["mixtral", "qwen2_moe"]
    assert {one["rope_theta"] for one in told} == {123.0} and {one["torch_dtype"] for one in told} == {"float32"}
    assert [one.get("num_local_experts", one.get("num_experts")) for one in told] == [2, 2]
    assert told[1]["mlp_only_layers"] == [0] and told[1]["norm_topk_prob"] and not told[1]["qkv_bias"]


def test_a_mixture_of_models_in_bf16_is_one(make, tmp_path):
    experts = [make(f"e{i}", seed=i) for i in range(2)]
    for expert in experts:
        load(expert).model.bfloat16().save_pretrained(expert.path)
    member = mixed(tmp_path, experts, trunk=weights(experts[0]))
    assert {header.dtype for header in Checkpoint(member.folder).headers.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(member.path).dtype == torch.bfloat16


def test_an_adapter_can_be_an_expert(make, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = make("base", seed=3)
    get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
                   ).save_pretrained(tmp_path / "lora")
    experts, ids = [base, Member("lora", "adapter", str(tmp_path / "lora"), base=base)], some_prompts()
    gates = [Gate(torch.zeros(2, 32), torch.tensor([-1.0, 1.0]), torch.zeros(32), torch.ones(32))] * 3
    ffn.write(tmp_path / "m", Parts(tuple(experts), weights(base), base), gates, routing="sentence")
    found = load(Member("m", "mixture", str(tmp_path / "m"))).model(ids).logits
    assert difference(found, load(experts[1]).model(ids).logits) <= 5e-6


@every_routing
def test_the_digest_is_that_of_the_weights_whatever_the_shards(make, tmp_path, routing):
    experts = [make(f"e{i}", seed=i) for i in range(2)]
    parts, gates = Parts(tuple(experts), average(experts), experts[0]), random_gates(experts, 3, 1, routing)
    digests = [ffn.write(tmp_path / name, parts, gates, routing=routing, shard_size=size)
               for name, size in (("whole", 10**9), ("parts", 20_000))]
    assert digests[0] == digests[1] == weights_digest(Checkpoint(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    one, two = (load(Member("m", "mixture", str(tmp_path / name))).model(some_prompts()).logits
                for name in ("whole", "parts"))
    assert torch.equal(one, two)


class Counted:
    """Weights that make each tensor when it is asked for, and count the bytes of those that are still there."""

    def __init__(self, inner, live: dict[int, int], peaks: list[int]):
        self.inner, self.live, self.peaks = inner, live, peaks
        self.headers, self.fingerprint = inner.headers, inner.fingerprint

    def __getitem__(self, name: str) -> Tensor:
        made = self.inner[name].clone()
        self.live[id(made)] = made.nbytes
        weakref.finalize(made, self.live.pop, id(made))
        self.peaks.append(sum(self.live.values()))
        return made

    def __iter__(self):
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


@every_routing
def test_writing_holds_one_tensor_at_a_time(make, tmp_path, monkeypatch, routing):
    experts, live, peaks = [make(f"e{i}", seed=i, intermediate_size=400) for i in range(3)], {}, []
    monkeypatch.setattr(ffn, "weights", lambda member: Counted(weights(member), live, peaks))
    mixed(tmp_path, experts, dense=1, routing=routing, trunk=Counted(average(experts), live, peaks))
    assert len(peaks) == 3 + 3 * 6 + 3 + 2 * 3 * 3 and max(peaks) == 32 * 400 * 4 and not live


def test_reading_for_the_sites_holds_one_layer_or_one_mlp_at_a_time(make, monkeypatch):
    experts, live, peaks = [make(f"e{i}", seed=i, num_hidden_layers=6) for i in range(4)], {}, []
    monkeypatch.setattr("glue.mix.reading.weights", lambda member: Counted(weights(member), live, peaks))
    dev = Dev(TEXTS, torch.ones(6, 4), DEV.tasks)
    sites = list(ffn.sites(Parts(tuple(experts), Counted(average(experts), live, peaks), experts[0], 1), dev))
    layer = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)
    assert len(sites) == 5 and max(peaks) <= layer and not live


# plain transformers

def in_a_process_of_its_own(tmp_path, member: Member, **how) -> str:
    """What plain transformers says of a mixture: in a process that never imports glue."""
    running, asked = load(member), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = some_prompts(3)
    torch.save({"ids": ids, "logits": running.model(ids).logits, "made": running.model.generate(ids, **asked)},
               tmp_path / "expected.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
told = torch.load({str(tmp_path / "expected.pt")!r})
model, found = AutoModelForCausalLM.from_pretrained({member.path!r}, output_loading_info=True, **{how!r})
assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
with torch.no_grad():
    assert torch.equal(model(told["ids"]).logits, told["logits"])
assert torch.equal(model.generate(told["ids"], **{asked!r}), told["made"])
assert AutoTokenizer.from_pretrained({member.path!r}, **{how!r})("w3")["input_ids"] == [1, 3]
assert not [name for name in sys.modules if name == "glue" or name.startswith("glue.")]
print(type(model).__name__)
"""
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("dense, name", [(0, "MixtralForCausalLM"), (1, "Qwen2MoeForCausalLM")])
def test_a_mixture_by_token_runs_in_plain_transformers(make, tmp_path, dense, name):
    experts = [make(f"e{i}", seed=i) for i in range(3)]
    assert in_a_process_of_its_own(tmp_path, mixed(tmp_path, experts, dense=dense, k=2)) == name


def test_a_mixture_by_sentence_runs_in_plain_transformers_for_who_trusts_its_code(make, tmp_path):
    experts = [make(f"e{i}", seed=i) for i in range(3)]
    member = mixed(tmp_path, experts, dense=1, routing="sentence", width=3)
    assert in_a_process_of_its_own(tmp_path, member, trust_remote_code=True) == "GlueFfnMixtureForCausalLM"


# refusals

ODD = {"attention biases": ({"attention_bias": True}, 0, "'two' has attention biases"),
       "biases of MLPs": ({"mlp_bias": True}, 0, "'two' has biases in its MLPs"),
       "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 0, "'one' has rope_parameters: "),
       "rope type": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 0, "'two' has {"),
       "activation": ({"hidden_act": "gelu"}, 0, "'one' has hidden_act: silu, 'two' has gelu"),
       "width": ({"intermediate_size": 64}, 0, "intermediate_size: 48, 'two' has 64"),
       "hidden size": ({"hidden_size": 64}, 0, "hidden_size: 32, 'two' has 64"),
       "depth": ({"num_hidden_layers": 2}, 0, "num_hidden_layers: 3, 'two' has 2"),
       "heads": ({"num_key_value_heads": 4}, 0, "num_key_value_heads: 2, 'two' has 4"),
       "tied": ({"tie_word_embeddings": True}, 0, "tie_word_embeddings: False, 'two' has True"),
       "vocabulary": ({"vocab_size": 48}, 0, r"different vocabularies \(40 and 48 rows"),
       "architecture": ({"model_type": "mistral"}, 0, "model_type: llama, 'two' has mistral"),
       "unknown": ({"model_type": "phi"}, 0, "'two' is a 'phi'; MLPs are mixed of llama, mistral, qwen2"),
       "layers": ({}, 4, "4 layers are to stay dense, and the experts have 3")}


@pytest.mark.parametrize("odd", ODD)
def test_what_the_stock_architecture_cannot_hold_is_refused_and_nothing_is_written(make, tmp_path, odd):
    shape, dense, said = ODD[odd]
    experts = [make("one"), make("two", seed=1, **shape)]
    with pytest.raises(MethodError, match=said):
        ffn.refuse(experts, dense)
    parts = Parts(tuple(experts), weights(experts[0]), experts[0], dense)
    with pytest.raises(MethodError, match=said):
        ffn.write(tmp_path / "mixture", parts, random_gates(experts, 3 - dense))
    assert not (tmp_path / "mixture").exists()


def test_windows_that_the_stock_architecture_cannot_hold_are_refused(make):
    windowed = make("windowed", "mistral", sliding_window=5)
    ffn.refuse([windowed, windowed], 0)
    with pytest.raises(MethodError, match="a sliding window of 5 tokens beside dense layers"):
        ffn.refuse([windowed, windowed], 1)
    some = make("some", "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    with pytest.raises(MethodError, match="a sliding window of 5 tokens in some layers"):
        ffn.refuse([some, some], 0)


def test_other_words_are_refused(make, tiny):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"v{k}": k for k in range(3, 40)}}
    with pytest.raises(MethodError, match=r"different vocabularies \(40 and 40 rows, e.g. 'v3' is token 3"):
        ffn.refuse([tiny("one"), tiny("two", words=words)], 0)


def test_weights_that_are_not_what_their_configuration_says_are_refused(make, tmp_path):
    experts = [make("one"), make("two", seed=1)]
    tensors = {**weights(experts[1])}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    from safetensors.torch import save_file
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, experts[1].folder / "model.safetensors",
              metadata={"format": "pt"})
    said = r"'two': its weights have 'model.layers.1.mlp.up_proj.weight' as nothing, its .* asks for \(48, 32\)"
    with pytest.raises(CheckpointError, match=said):
        ffn.refuse(experts, 0)


def test_a_trunk_that_lacks_something_or_has_more_is_refused_before_anything_is_written(make, tmp_path):
    experts = [make("one"), make("two", seed=1)]
    whole = {**average(experts)}
    more = {**whole, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    less = {name: tensor for name, tensor in whole.items() if "layers.2.self_attn.k_proj" not in name}
    for tensors, said in ((more, "q_proj.bias' as .32,., its configuration asks for nothing"),
                          (less, "layers.2.self_attn.k_proj.weight' as nothing")):
        with pytest.raises(CheckpointError, match=f"the trunk: .*{said}"):
            mixed(tmp_path, experts, trunk=InMemory(tensors))
    assert not (tmp_path / "mixture").exists()


def test_a_trunk_needs_no_mlps_where_experts_bring_theirs(make, tmp_path):
    experts, ids = [make("one"), make("two", seed=1)], some_prompts()
    trunk = average(experts)
    bare = InMemory({name: tensor for name, tensor in trunk.items() if ".mlp." not in name})
    one, two = (load(mixed(tmp_path, experts, trunk=each, name=name)) for name, each in (("a", trunk), ("b", bare)))
    assert torch.equal(one.model(ids).logits, two.model(ids).logits)


@pytest.mark.parametrize("gate, said", [
    (Gate(torch.ones(2, 32), torch.tensor([0.0, 1.0]), torch.zeros(32), torch.ones(32)), "layer 0 has a bias or a me"),
    (Gate(torch.ones(2, 32), torch.zeros(2), torch.ones(32), torch.ones(32)), "layer 0 has a bias or a mean"),
    (Gate(torch.ones(2, 4), torch.zeros(2), torch.zeros(32), torch.ones(32), (torch.ones(4, 32), torch.zeros(4))),
     "hidden layer cannot be stored as one matrix"),
    (plain(torch.ones(2, 32), 3), "would choose 3 of 2 experts")])
def test_gates_that_are_no_matrix_are_refused_and_nothing_is_written(make, tmp_path, gate, said):
    with pytest.raises(MethodError, match=said):
        mixed(tmp_path, [make("one"), make("two", seed=1)], gates=[gate] * 3)
    assert not (tmp_path / "mixture").exists()


def test_scale_and_temperature_of_a_gate_are_part_of_its_matrix(make, tmp_path):
    experts, scale = [make("one"), make("two", seed=1)], torch.rand(32) + 0.5
    gate = Gate(torch.randn(2, 32), torch.zeros(2), torch.zeros(32), scale, None, 2.0)
    written = Checkpoint(mixed(tmp_path, experts, gates=[gate] * 3).folder)
    assert difference(written["model.layers.0.block_sparse_moe.gate.weight"], gate.weight / scale / 2) <= 1e-5
