"""Block-level mixtures: each layer of a model is chosen for a prompt from those of several experts."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from glue.checkpoint import Checkpoint, InMemory, weights_digest
from glue.errors import CheckpointError, MethodError
from glue.family import families
from glue.kinds import load, weights
from glue.kinds.mixture import register
from glue.kinds.modelling.block_mixture import (
    GlueBlockMixtureConfig,
    GlueBlockMixtureForCausalLM,
    chosen,
)
from glue.member import Member
from glue.mix.levels import block
from glue.mix.parts import Dev, Parts

SHAPE = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
KINDS = {"llama": SHAPE, "llama with biases": {**SHAPE, "attention_bias": True, "mlp_bias": True},
         "mistral with a window": {**SHAPE, "model_type": "mistral", "sliding_window": 6},
         "qwen2 with windows": {**SHAPE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6,
                                "max_window_layers": 1}, "qwen3": {**SHAPE, "model_type": "qwen3"},
         "llama, tied": {**SHAPE, "tie_word_embeddings": True}}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def a_mixture(k: int = 1, dense: int = 0, shape=SHAPE, **more) -> GlueBlockMixtureForCausalLM:
    """Three experts, and routers whose choices differ between prompts and layers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = GlueBlockMixtureForCausalLM(GlueBlockMixtureConfig(
            shape, experts=3, dense=dense, experts_per_prompt=k, **more)).eval()
        for layer in mixed(model):
            torch.nn.init.normal_(layer.router.outer.weight, std=0.2)
            for bias in (part for name, part in layer.experts.named_parameters() if name.endswith("bias")):
                torch.nn.init.normal_(bias, std=0.3)
    model.generation_config.eos_token_id = None
    return model


def mixed(model: GlueBlockMixtureForCausalLM) -> list:
    return list(model.trunk.model.layers[model.config.dense:])


def path_model(model: GlueBlockMixtureForCausalLM, path: list[int]):
    """The dense model of plain transformers that has the trunk's ends and these experts' layers between them."""
    state, first = model.trunk.state_dict(), model.config.dense
    mine = {name: tensor for name, tensor in state.items() if ".experts." not in name and ".router." not in name}
    for i, expert in enumerate(path, first):
        start = f"model.layers.{i}.experts.{expert}."
        mine |= {f"model.layers.{i}.{name.removeprefix(start)}": tensor for name, tensor in state.items()
                 if name.startswith(start)}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.trunk)).eval()
    dense.load_state_dict(mine)
    dense.generation_config.eos_token_id = None
    return dense


def alike(model: GlueBlockMixtureForCausalLM) -> GlueBlockMixtureForCausalLM:
    """The same with the first expert in the place of all."""
    for layer in mixed(model):
        for expert in layer.experts[1:]:
            expert.load_state_dict(layer.experts[0].state_dict())
    return model


def some_prompts(b: int = 9, s: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, (b, s), generator=torch.Generator().manual_seed(seed))


def padded(ids: torch.Tensor, by: int) -> dict[str, torch.Tensor]:
    """The same prompts with junk on the left that the mask hides."""
    junk = torch.full((len(ids), by), 17)
    mask = torch.cat([torch.zeros_like(junk), torch.ones_like(ids)], dim=1)
    return {"input_ids": torch.cat([junk, ids], dim=1), "attention_mask": mask}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


# what a mixture computes

@every_kind
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_mixture_of_copies_is_the_model_itself(kind, k):
    model, ids = alike(a_mixture(k, shape=KINDS[kind])), some_prompts()
    assert difference(model(ids).logits, path_model(model, [0, 0, 0])(ids).logits) <= 1e-5


def test_a_mixture_with_all_layers_dense_is_the_trunk():
    model, ids = a_mixture(dense=3), some_prompts()
    assert torch.equal(model(ids).logits, path_model(model, [])(ids).logits)
    assert model(ids).routes.shape == (9, 0, 3) and model.route(ids).shape == (9, 0)
    with model.pinned(()):
        made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=2)
    assert made.shape == (9, 13)


@every_kind
def test_a_path_is_the_model_that_has_these_layers(kind):
    model, ids = a_mixture(dense=1, shape=KINDS[kind]), some_prompts()
    for path in ([0, 0], [2, 1], [1, 2]):
        alone = path_model(model, path)(ids).logits
        assert torch.equal(model(ids, routes=torch.tensor([path] * 9)).logits, alone)
        with model.pinned(path):
            assert torch.equal(model(ids).logits, alone)


def test_one_expert_can_be_given_for_all_layers():
    model, ids = a_mixture(), some_prompts()
    alone = path_model(model, [2, 2, 2])(ids).logits
    assert torch.equal(model(ids, routes=torch.full((9,), 2)).logits, alone)
    with model.pinned(2):
        assert torch.equal(model(ids).logits, alone)


def test_routers_of_zeros_with_all_experts_make_the_mean_of_the_layers():
    """The oracle goes through the layers by hand, in fp64."""
    model, ids = a_mixture(k=3, dense=1), some_prompts()
    for layer in mixed(model):
        torch.nn.init.zeros_(layer.router.outer.weight)
        torch.nn.init.zeros_(layer.router.outer.bias)
    found = model(ids).logits
    inner = model.double().trunk.model
    state, hide = inner.embed_tokens(ids), torch.full((9, 9), -torch.inf, dtype=torch.double).triu(1)[None, None]
    turned = inner.rotary_emb(state, torch.arange(9)[None])
    for i, layer in enumerate(inner.layers):
        parts = [layer] if i == 0 else layer.experts
        state = torch.stack([part(state, attention_mask=hide, position_embeddings=turned) for part in parts]).mean(0)
    assert difference(found.double(), model.trunk.lm_head(inner.norm(state))) <= 1e-5


def test_several_experts_are_summed_with_their_weights():
    model, ids = a_mixture(k=2, dense=2), some_prompts()
    shares = model.gate(ids)[:, 0]
    assert set((shares > 0).sum(1).tolist()) == {2} and float((shares.sum(1) - 1).abs().max()) <= 1e-6
    ends = [path_model(model, [i]) for i in range(3)]
    for end in ends:
        end.model.norm = torch.nn.Identity()
    last = torch.einsum("be,ebsh->bsh", shares, torch.stack([end.model(ids).last_hidden_state for end in ends]))
    assert difference(model(ids).logits, model.trunk.lm_head(model.trunk.model.norm(last))) <= 1e-5


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_batch_of_mixed_routes_is_the_single_prompts(k):
    model, ids = a_mixture(k), some_prompts()
    found = model(ids)
    assert len(set(map(str, found.routes.argmax(-1).tolist()))) >= 4
    for row in range(9):
        alone = model(ids[row:row + 1])
        assert difference(found.logits[row], alone.logits[0]) <= 1e-5
        assert difference(found.routes[row], alone.routes[0]) <= 1e-5


def test_rows_with_one_expert_and_rows_with_several_stand_in_one_batch():
    model, ids = a_mixture(), some_prompts(3)
    routes = torch.tensor([[1.0, 0, 0], [0.25, 0.5, 0.25], [0, 0.5, 0.5]])
    found = model(ids, routes=routes).logits
    for row in range(3):
        assert difference(found[row], model(ids[row:row + 1], routes=routes[row:row + 1]).logits[0]) <= 1e-5
    hardly = torch.tensor([[1e-30, 0, 1.0]])  # which leaves 1 to the last expert, and still asks the first
    alone = model(ids[:1], routes=torch.tensor([2])).logits
    assert difference(model(ids[:1], routes=hardly).logits, alone) <= 1e-5


@pytest.mark.parametrize("k", [1, 2])
def test_padding_on_the_left_changes_nothing(k):
    model, ids = a_mixture(k, dense=1), some_prompts()
    assert difference(model.gate(**padded(ids, 5)), model.gate(ids)) <= 1e-5
    assert difference(model(**padded(ids, 5)).logits[:, 5:], model(ids).logits) <= 1e-5


def test_padding_on_the_left_is_no_position():
    """Rotary positions forgive a shift, so what the layers are told is looked at."""
    model, told = a_mixture(), []
    model.trunk.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["position_ids"]), with_kwargs=True)
    model.generate(**padded(some_prompts(2), 4), max_new_tokens=2, do_sample=False, pad_token_id=0)
    model(**padded(some_prompts(2), 4))
    assert [places[0, -9:].tolist() for places in told] == [list(range(9)), [9], list(range(9))]


def test_positions_of_the_caller_are_respected():
    model, ids, path = a_mixture(), some_prompts(), [1, 0, 2]
    asked = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).expand(9, 9) * 3}
    routes = torch.tensor([path] * 9)
    alone = path_model(model, path)(ids, **asked, use_cache=False).logits
    assert torch.equal(model(ids, **asked, routes=routes).logits, alone)
    assert difference(alone, model(ids, routes=routes).logits) > 1e-2
    one, other = routes.clone(), routes.clone()
    one[4:], other[:4] = 0, 0  # rows that part ways take their own positions along
    places = torch.arange(9) + torch.arange(9)[:, None]
    apart = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9) * (1 + places % 3)}
    found = model(ids, **apart, routes=one).logits
    for row in range(9):
        single = path_model(model, one[row].tolist())(
            ids[row:row + 1], attention_mask=torch.ones(1, 9), position_ids=apart["position_ids"][row:row + 1])
        assert difference(found[row], single.logits[0]) <= 1e-5


def test_embeddings_can_be_given_instead_of_tokens():
    model, ids = a_mixture(), some_prompts()
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_the_loss_is_that_of_the_logits():
    model, ids = a_mixture(k=2), some_prompts()
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 40), ids[:, 1:].reshape(-1))
    assert abs(float(model(ids, labels=ids).loss - expected)) <= 1e-5


@pytest.mark.parametrize("asked, said", [
    ({}, "give either input_ids or inputs_embeds"),
    ({"input_ids": some_prompts(2), "attention_mask": torch.ones(2, 1, 9, 9)}, r"the attention mask is \[b, s\]"),
    ({"input_ids": some_prompts(2), "attention_mask": torch.tensor([[1] * 9, [0] * 9])}, "row 1 of this batch is padd"),
    ({"input_ids": some_prompts(2), "routes": torch.tensor([0, 1, 2])}, "2 prompts, but routes for 3"),
    ({"input_ids": some_prompts(2), "routes": torch.tensor([0, 3])}, "routes are expert indices below 3"),
    ({"input_ids": some_prompts(2), "routes": torch.zeros(2, 3)}, "routes are expert indices below 3"),
    ({"input_ids": some_prompts(2), "routes": torch.ones(2, 2)}, "routes are expert indices below 3"),
    ({"input_ids": some_prompts(2), "output_hidden_states": True}, "does not tell what its layers see")])
def test_what_a_mixture_cannot_follow_is_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        a_mixture()(**asked)


# the cache

@every_kind
@pytest.mark.parametrize("k", [1, 2])
def test_decoding_with_the_cache_is_reading_the_whole_text_on_frozen_routes(kind, k):
    model, text = a_mixture(k, dense=1, shape=KINDS[kind]), some_prompts(s=14)
    asked = padded(text, 3)
    first = model(**padded(text[:, :6], 3), use_cache=True)
    pieces = [first.logits[:, 3:]]
    for step in range(6, 14):
        output = model(text[:, step:step + 1], attention_mask=asked["attention_mask"][:, :step + 4], use_cache=True,
                       past_key_values=first.past_key_values)
        pieces.append(output.logits)
        assert torch.equal(output.routes, first.routes)
    whole = model(**asked, routes=first.routes).logits[:, 3:]
    assert difference(torch.cat(pieces, dim=1), whole) <= 1e-5


def test_a_slot_holds_only_the_rows_that_its_expert_answers():
    model, ids = a_mixture(dense=1), some_prompts()
    output = model(ids, use_cache=True)
    cache, routes = output.past_key_values, output.routes.argmax(-1)
    assert len(cache.layers) == 1 + 2 * 3 and cache.get_seq_length() == 9 and cache.batch_size == 9
    for i in range(2):
        held = [len(layer.keys) if layer.is_initialized else 0 for layer in cache.layers[1 + 3 * i:4 + 3 * i]]
        assert held == torch.bincount(routes[:, i], minlength=3).tolist()


@every_kind
@pytest.mark.parametrize("k", [1, 2])
def test_a_reordered_cache_is_the_cache_of_reordered_prompts(kind, k):
    model, ids, step = a_mixture(k, dense=1, shape=KINDS[kind]), some_prompts(), some_prompts(9, 1, seed=1)
    order = torch.tensor([4, 4, 0, 8, 2, 2, 7, 1, 1])
    moved, fresh = (model(rows, use_cache=True).past_key_values for rows in (ids, ids[order]))
    moved.reorder_cache(order)
    for _ in range(2):
        after, expected = (model(step, past_key_values=cache, use_cache=True) for cache in (moved, fresh))
        assert difference(after.logits, expected.logits) <= 1e-5 and difference(after.routes, expected.routes) <= 1e-5


def test_rows_can_be_dropped_until_an_expert_has_none():
    model, ids = a_mixture(), some_prompts()
    cache = model(ids, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([3]))
    step = some_prompts(1, 1, seed=1)
    fresh = model(ids[3:4], use_cache=True).past_key_values
    assert cache.get_seq_length() == 9 and cache.batch_size == 1
    assert difference(model(step, past_key_values=cache).logits, model(step, past_key_values=fresh).logits) <= 1e-5


def test_a_cache_is_as_long_as_what_was_read_whichever_expert_has_read_it():
    model, ids = a_mixture(), some_prompts()
    with model.pinned([2, 1, 2]):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        whole = model(ids).logits[:, 6:]
    assert cache.get_seq_length() == 6 and cache.get_mask_sizes(3, 0) == (9, 0)
    assert difference(model(ids[:, 6:], past_key_values=cache).logits, whole) <= 1e-5


def test_a_repeated_cache_repeats_each_row():
    model, ids = a_mixture(dense=2), some_prompts()
    cache = model(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    step = some_prompts(18, 1, seed=2)
    fresh = model(ids.repeat_interleave(2, 0), use_cache=True).past_key_values
    assert difference(model(step, past_key_values=cache).logits, model(step, past_key_values=fresh).logits) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2 with windows"])
def test_a_cropped_cache_has_forgotten_the_last_tokens(kind):
    model, ids = a_mixture(dense=1, shape=KINDS[kind]), some_prompts(s=5)
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 2
    again = model(ids[:, 2:], past_key_values=cache).logits
    assert difference(again, model(ids).logits[:, 2:]) <= 1e-5


def test_a_prompt_in_pieces_keeps_the_route_of_the_first_or_the_one_that_is_given():
    model, ids = a_mixture(), some_prompts()
    first, whole = model.gate(ids[:, :3]), model.gate(ids)
    assert not torch.equal(first.argmax(-1), whole.argmax(-1))
    for routes, followed in ((None, first), (whole, whole)):
        cache = model.empty_cache()
        model(ids[:, :3], past_key_values=cache, routes=routes)
        rest = model(ids[:, 3:], past_key_values=cache)
        assert difference(rest.routes, followed) <= 1e-5
        assert difference(rest.logits, model(ids, routes=followed).logits[:, 3:]) <= 1e-5
    with pytest.raises(ValueError, match="chunking without a cache"):
        model.generate(ids, max_new_tokens=3, prefill_chunk_size=4, pad_token_id=0)


def test_a_cache_of_another_kind_is_refused():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="a mixture keeps a PathCache, this is a DynamicCache"):
        a_mixture()(some_prompts(), past_key_values=DynamicCache())


# generation

HOW = {"greedy": {}, "beams": {"num_beams": 3}, "without cache": {"use_cache": False},
       "beams without cache": {"num_beams": 2, "use_cache": False}}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["llama", "mistral with a window", "qwen2 with windows"])
def test_a_batch_of_mixed_routes_continues_as_each_path_continues_alone(kind, how):
    model, ids = a_mixture(dense=1, shape=KINDS[kind]), some_prompts()
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **HOW[how]}
    made = model.generate(**padded(ids, 4), **told)[:, 4:]
    for row, path in enumerate(model.route(ids).tolist()):
        assert torch.equal(made[row:row + 1], path_model(model, path).generate(ids[row:row + 1], **told))


def test_several_experts_generate_the_most_likely_token_of_their_mixture():
    model, ids = a_mixture(k=2), some_prompts()
    routes, text = model.gate(ids), ids
    for _ in range(5):
        text = torch.cat([text, model(text, routes=routes).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), text)


@pytest.mark.parametrize("kind", ["llama", "mistral with a window"])
def test_drafted_tokens_change_neither_route_nor_text(kind):
    """Prompt lookup reads drafts together with the prompt, and has what was wrong of them cropped off."""
    model = a_mixture(shape=KINDS[kind])
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for row in range(4):
        ids = torch.cat([some_prompts()[row:row + 1]] * 2, dim=1)  # what comes twice is drafted a third time
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **told), model.generate(ids, **told))


def test_sampling_follows_the_seed_and_the_route():
    model, ids = a_mixture(), some_prompts()
    drawn = []
    with torch.random.fork_rng():
        for route in (0, 0, 1):
            torch.manual_seed(3)
            drawn.append(model.generate(ids, routes=torch.full((9,), route), max_new_tokens=6, do_sample=True,
                                        num_return_sequences=2, pad_token_id=0))
    assert drawn[0].shape == (18, 15) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# files

@every_kind
def test_a_saved_mixture_comes_back_bit_for_bit(tmp_path, kind):
    register()
    model, ids = a_mixture(2, dense=1, shape=KINDS[kind], router_width=5), some_prompts()
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, back(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer, = mixed(half)[:1]
    assert layer.router.mean.dtype == layer.router.outer.weight.dtype == torch.float32
    assert layer.experts[1].self_attn.q_proj.weight.dtype == half(ids).logits.dtype == torch.bfloat16


TEXTS = ["w3 w4 w5", "w30 w31", "w9", "w38 w2 w20 w11", "w7 w7", "w25"]
DEV = Dev(TEXTS, torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3), torch.arange(6) % 2)
ROUTERS = families("routing")


def joined(experts: list[Member], dense: int = 0, trunk=None) -> Parts:
    return Parts(tuple(experts), trunk or weights(experts[0]), experts[0], dense)


def gated(parts: Parts, router, dev: Dev = DEV) -> tuple[list, list]:
    """Sites and gates of all layers, each gate made for its site and sent back."""
    walk, found, gates = block.sites(parts, dev), [], []
    site = next(walk, None)
    while site is not None:
        found.append(site)
        gates.append(ROUTERS.choose(router)(site))
        try:
            site = walk.send(gates[-1])
        except StopIteration:
            site = None
    return found, gates


def built(tmp_path, parts: Parts, router="linear", name: str = "mixture", **more) -> Member:
    block.write(tmp_path / name, parts, gated(parts, router)[1], **more)
    return Member(name, "mixture", str(tmp_path / name))


def two_experts(tiny, **shape) -> list[Member]:
    return [tiny("one", seed=1, num_hidden_layers=3, **shape), tiny("two", seed=2, num_hidden_layers=3, **shape)]


@pytest.mark.parametrize("router", [{"linear": {"top_k": 2}}, {"mlp": {"width": 5}}, "uniform",
                                    {"prompt": {"temperature": 3.0, "top_k": 2}}], ids=str)
@pytest.mark.parametrize("dense", [0, 1])
def test_a_router_learns_from_the_states_that_are_served(tiny, tmp_path, router, dense):
    parts = joined(two_experts(tiny), dense)
    found, gates = gated(parts, router)
    assert [site.layer for site in found] == list(range(dense, 3))
    block.write(tmp_path / "mixture", parts, gates)
    running = load(Member("mixture", "mixture", str(tmp_path / "mixture")))
    served = torch.cat([running.model.gate(torch.tensor([running.tokenizer(text)["input_ids"]])) for text in TEXTS])
    for i, (site, gate) in enumerate(zip(found, gates, strict=True)):
        assert difference(served[:, i], chosen(gate.logits(site.hidden), gate.top_k)) <= 1e-4


def test_texts_that_a_router_brings_are_read_behind_the_same_gates(tiny):
    parts = joined(two_experts(tiny))
    walk = block.sites(parts, DEV)
    first = next(walk)
    second = walk.send(ROUTERS.choose("linear")(first))
    assert difference(second.prompt_states(TEXTS[:2]), second.hidden[:2]) <= 1e-5
    assert difference(first.prompt_states(TEXTS[:2]), first.hidden[:2]) <= 1e-5  # an earlier site can still be asked


def test_sites_in_a_plain_loop_are_read_along_the_trunk(tiny):
    experts = two_experts(tiny)
    trunk = load(experts[0]).model
    for site in block.sites(joined(experts, dense=1), DEV):
        for text, state in zip(TEXTS, site.hidden, strict=True):
            ids = torch.tensor([load(experts[0]).tokenizer(text)["input_ids"]])
            told = trunk(ids, output_hidden_states=True).hidden_states[site.layer][0].mean(0)
            assert difference(state, told) <= 1e-5


def test_a_tied_head_is_written_once(tiny, tmp_path):
    experts = two_experts(tiny, tie_word_embeddings=True)
    twice = InMemory({**weights(experts[0]), "lm_head.weight": weights(experts[0])["model.embed_tokens.weight"]})
    member, ids = built(tmp_path, joined(experts, 3, twice)), some_prompts()
    assert not [name for name in Checkpoint(member.folder) if "lm_head" in name]
    assert torch.equal(load(member).model(ids).logits, load(experts[0]).model(ids).logits)


def test_a_written_mixture_has_the_trunk_s_ends_and_the_experts_layers(tiny, tmp_path):
    experts = two_experts(tiny)
    trunk = InMemory({name: tensor * 1.5 for name, tensor in weights(experts[0]).items()})
    running, ids = load(built(tmp_path, joined(experts, 1, trunk))), some_prompts()
    dense = load(experts[1]).model
    for name, parameter in dense.named_parameters():
        if not name.startswith(("model.layers.1", "model.layers.2")):
            parameter.copy_(trunk[name])
    with running.pinned([1, 1]):
        assert torch.equal(running.model(ids).logits, dense(ids).logits)


def test_a_route_that_is_told_can_be_pinned(tiny, tmp_path):
    for k in (1, 2):
        running = load(built(tmp_path, joined(two_experts(tiny)), {"linear": {"top_k": k}}, name=f"k{k}"))
        ids = [[1, 9, 4, 30], [1, 22]]
        for context, route in zip(ids, running.route(ids), strict=True):
            with running.pinned(route):
                pinned = running.model(torch.tensor([context])).logits
            assert difference(pinned, running.model(torch.tensor([context])).logits) <= 1e-5


def test_the_digest_is_that_of_the_weights_whatever_the_shards(tiny, tmp_path):
    parts = joined(two_experts(tiny))
    gates = gated(parts, "linear")[1]
    digests = [block.write(tmp_path / name, parts, gates, shard_size=size)
               for name, size in (("whole", 10**9), ("parts", 20_000))]
    assert digests[0] == digests[1] == weights_digest(Checkpoint(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2


def test_writing_holds_one_tensor_at_a_time(tiny, tmp_path, monkeypatch):
    asked, alive = [], []

    class Watched:
        def __init__(self, inner):
            self.headers, self._inner = inner.headers, inner

        def __getitem__(self, name):
            assert all(held() is None for held in alive), f"{asked[-1]} is still held while {name} is read"
            tensor = self._inner[name].clone()
            asked.append(name)
            alive.append(weakref.ref(tensor))
            return tensor

    experts = two_experts(tiny)
    gates = gated(joined(experts, 1), "linear")[1]
    monkeypatch.setattr(block, "weights", lambda member: Watched(weights(member)))
    block.write(tmp_path / "mixture", joined(experts, 1, Watched(weights(experts[0]))), gates)
    assert len(asked) == 3 + 9 + 2 * 2 * 9


def test_an_adapter_can_be_an_expert(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny("base", seed=3)
    get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
                   ).save_pretrained(tmp_path / "lora")
    experts = [base, Member("lora", "adapter", str(tmp_path / "lora"), base=base)]
    running, ids = load(built(tmp_path, joined(experts))), some_prompts()
    with running.pinned(1):
        assert difference(running.model(ids).logits, load(experts[1]).model(ids).logits) <= 1e-5


def test_experts_with_attention_biases_keep_them(tiny, tmp_path):
    experts = two_experts(tiny, attention_bias=True)
    for expert in experts:
        model = load(expert).model
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(expert.path)
    block.refuse(experts, 0)
    running, ids = load(built(tmp_path, joined(experts))), some_prompts()
    with running.pinned(0):
        assert torch.equal(running.model(ids).logits, load(experts[0]).model(ids).logits)


def test_a_mixture_runs_in_plain_transformers_for_who_trusts_its_code(tiny, tmp_path):
    member, ids = built(tmp_path, joined(two_experts(tiny), 1)), some_prompts(3)
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    model = load(member).model
    torch.save({"ids": ids, "logits": model(ids).logits, "text": model.generate(ids, **told)}, tmp_path / "expected.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
told = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({member.path!r}, trust_remote_code=True)
assert torch.equal(model(told["ids"]).logits, told["logits"])
assert torch.equal(model.generate(told["ids"], **{told!r}), told["text"])
assert AutoTokenizer.from_pretrained({member.path!r})("w3")["input_ids"] == [1, 3]
assert not [name for name in sys.modules if name == "glue" or name.startswith("glue.")]
print("the same")
"""
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | home)
    assert done.stdout.strip().endswith("the same"), done.stderr


# what is refused

ODD = {"another rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "has rope_parameters: "),
       "biases": ({"attention_bias": True}, "has attention_bias: False, 'odd' has True"),
       "another depth": ({"num_hidden_layers": 2}, "has num_hidden_layers: 3, 'odd' has 2"),
       "wider heads": ({"head_dim": 16}, "has head_dim: 8, 'odd' has 16"),
       "another norm": ({"rms_norm_eps": 1e-3}, "has rms_norm_eps: "),
       "more tokens": ({"vocab_size": 48}, r"different vocabularies \(40 and 48 rows\)")}


@pytest.mark.parametrize("what", ODD)
def test_an_expert_that_does_not_fit_is_refused_before_anything_is_written(tiny, tmp_path, what):
    odd, said = ODD[what]
    experts = [tiny("one", num_hidden_layers=3), tiny("odd", **{"num_hidden_layers": 3, **odd})]
    with pytest.raises(MethodError, match=said):
        block.refuse(experts, 0)
    with pytest.raises(MethodError, match=said):
        block.write(tmp_path / "mixture", joined(experts), [])
    assert not (tmp_path / "mixture").exists()


def test_an_architecture_that_was_not_tried_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(MethodError, match="'odd' is of the architecture 'gpt2'; whole layers are mixed of llama"):
        block.refuse([Member("odd", "model", str(tmp_path))], 0)


def test_more_dense_layers_than_there_are_is_refused(tiny):
    with pytest.raises(MethodError, match="4 layers are to stay dense, and the experts have 3"):
        block.refuse(two_experts(tiny), 4)


def test_a_stretched_rope_makes_the_longest_text_count(tiny):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    experts = [tiny("one", rope_parameters=rope), tiny("odd", rope_parameters=rope, max_position_embeddings=32)]
    with pytest.raises(MethodError, match="has max_position_embeddings: 64, 'odd' has 32"):
        block.refuse(experts, 0)
    block.refuse([tiny("two"), tiny("short", max_position_embeddings=32)], 0)


def test_weights_that_are_not_what_the_configuration_says_are_refused(tiny):
    experts = two_experts(tiny)
    config = LlamaConfig.from_pretrained(experts[1].path)
    config.mlp_bias = True
    for expert in experts:
        config.save_pretrained(expert.path)
    with pytest.raises(CheckpointError, match="'one': its weights have 'model.layers.1.mlp.down_proj.bias' as not"):
        block.refuse(experts, 1)


def test_a_trunk_of_another_shape_is_refused(tiny, tmp_path):
    experts = two_experts(tiny)
    trunk = InMemory({name: tensor for name, tensor in weights(experts[0]).items() if name != "lm_head.weight"})
    parts = joined(experts, 0, trunk)
    with pytest.raises(CheckpointError, match="the trunk: its weights have 'lm_head.weight' as nothing"):
        block.write(tmp_path / "mixture", parts, gated(parts, "random")[1])
    more = InMemory({**weights(experts[0]), "model.layers.0.mlp.up_proj.bias": torch.ones(48)})
    parts = joined(experts, 1, more)
    with pytest.raises(CheckpointError, match="'model.layers.0.mlp.up_proj.bias' as \\(48,\\), .* asks for nothing"):
        block.write(tmp_path / "mixture", parts, gated(parts, "random")[1])
    assert not (tmp_path / "mixture").exists()


def test_more_experts_a_prompt_than_there_are_is_refused(tiny, tmp_path):
    with pytest.raises(MethodError, match="would choose 3 of 2 experts"):
        built(tmp_path, joined(two_experts(tiny)), {"random": {"top_k": 3}})
