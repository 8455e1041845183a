"""Model-level mixtures: every prompt is answered by the experts its router chose, exactly as they answer alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from glue.checkpoint import Checkpoint
from glue.kinds.mixture import register
from glue.kinds.modelling.model_mixture import (
    GlueModelMixtureConfig,
    GlueModelMixtureForCausalLM,
    RoutedCache,
    averaged,
    chosen,
    entering,
)

SHAPE = {"vocab_size": 40, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "initializer_range": 0.3, "model_type": "llama"}
EXPERTS = [{**SHAPE, "hidden_size": 32, "num_hidden_layers": 2},
           {**SHAPE, "hidden_size": 24, "num_hidden_layers": 3, "tie_word_embeddings": True},
           {**SHAPE, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 48}]


LIKE = {**SHAPE, "hidden_size": 32, "num_hidden_layers": 3}  # of experts that share their first layers
KINDS = {"llama": {}, "mistral": {"model_type": "mistral", "sliding_window": 4},
         "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
         "qwen3": {"model_type": "qwen3", "head_dim": 8}, "tied": {"tie_word_embeddings": True}}
every_depth = pytest.mark.parametrize("dense", [0, 1, 2])


def a_mixture(k: int = 1, dense: int = 0, kind: str = "llama", **more) -> GlueModelMixtureForCausalLM:
    """Three experts, of three shapes or on one trunk, and a router whose choices differ between prompts."""
    experts = [{**LIKE, **KINDS[kind]}] * 3 if dense else EXPERTS
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = GlueModelMixtureForCausalLM(GlueModelMixtureConfig(
            experts, experts_per_prompt=k, dense=dense, bos_token_id=1, eos_token_id=None, **more)).eval()
        torch.nn.init.normal_(model.router.outer.weight, std=2.0)
    if dense:  # states on a trunk have more in common than final ones
        with torch.no_grad():
            model.router.mean.copy_(model.trunk(some_prompts()).last_hidden_state.mean((0, 1)))
    model.generation_config.eos_token_id = None
    return model


def wholes(model: GlueModelMixtureForCausalLM) -> list[PreTrainedModel]:
    """Each expert as a model that stands alone, put together from the trunk and what it has of its own."""
    dense = model.config.dense
    if not dense:
        return model.experts
    made = []
    for expert, told in zip(model.experts, model.config.experts, strict=True):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**told, "tie_word_embeddings": False})).eval()
        tensors = {f"model.{name}": tensor for name, tensor in model.trunk.state_dict().items()}
        for name, tensor in expert.state_dict().items():
            words = name.split(".")
            if words[1] == "layers":
                words[2] = str(int(words[2]) + dense)
            tensors[".".join(words)] = tensor
        whole.load_state_dict(tensors)
        made.append(whole)
    return made


def some_prompts(b: int = 9, s: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, (b, s), generator=torch.Generator().manual_seed(seed))


def padded(ids: torch.Tensor, by: int) -> dict[str, torch.Tensor]:
    """The same prompts with junk on the left that the mask hides."""
    junk = torch.full((len(ids), by), 17)
    mask = torch.cat([torch.zeros_like(junk), torch.ones_like(ids)], dim=1)
    return {"input_ids": torch.cat([junk, ids], dim=1), "attention_mask": mask}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# routes

@every_depth
def test_prompts_of_one_batch_go_to_different_experts(dense):
    assert len(set(a_mixture(dense=dense).route(some_prompts()).tolist())) == 3


@every_depth
def test_an_expert_that_is_pinned_answers_bit_for_bit_as_it_does_alone(dense):
    model, ids = a_mixture(dense=dense), some_prompts()
    for i, expert in enumerate(wholes(model)):
        alone = expert(ids).logits
        assert torch.equal(model(ids, routes=torch.full((9,), i)).logits, alone)
        with model.pinned(i):
            assert torch.equal(model(ids).logits, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_can_be_cut_into_a_trunk_and_what_stands_on_it(kind):
    model, text = a_mixture(dense=1, kind=kind), some_prompts(s=12)
    for i, expert in enumerate(wholes(model)):
        routes = torch.full((9,), i)
        assert torch.equal(model(text, routes=routes).logits, expert(text).logits)
        first = model(text[:, :8], routes=routes, use_cache=True)
        after = model(text[:, 8:], past_key_values=first.past_key_values).logits
        assert difference(torch.cat([first.logits, after], dim=1), expert(text).logits) <= 1e-5


@every_depth
def test_each_sample_of_a_mixed_batch_is_answered_as_its_expert_answers_it(dense):
    model, ids = a_mixture(dense=dense), some_prompts()
    found, experts = model(ids), wholes(model)
    for row, route in enumerate(model.route(ids).tolist()):
        assert difference(found.logits[row], experts[route](ids[row:row + 1]).logits[0]) <= 1e-5
        assert difference(found.logits[row], model(ids[row:row + 1]).logits[0]) <= 1e-5
        assert found.routes[row].tolist() == [float(i == route) for i in range(3)]


@every_depth
def test_several_experts_mix_their_next_token_probabilities(dense):
    model, ids = a_mixture(2, dense), some_prompts()
    found, shares = model(ids).logits.double().softmax(-1), model.gate(ids).double()
    assert set((shares > 0).sum(1).tolist()) == {2}
    parts = torch.stack([expert(ids).logits.double().softmax(-1) for expert in wholes(model)])
    assert difference(found, torch.einsum("be,ebsv->bsv", shares, parts)) <= 1e-5


@every_depth
def test_a_router_of_zeros_over_all_experts_gives_their_mean_probabilities(dense):
    model, ids = a_mixture(3, dense), some_prompts()
    torch.nn.init.zeros_(model.router.outer.weight)
    torch.nn.init.zeros_(model.router.outer.bias)
    mean = torch.stack([expert(ids).logits.double().softmax(-1) for expert in wholes(model)]).mean(0)
    assert difference(model(ids).logits.double().softmax(-1), mean) <= 1e-5


@pytest.mark.parametrize("k", [1, 2, 3])
@every_depth
def test_a_mixture_of_copies_has_the_logits_of_the_model(k, dense):
    model, ids = a_mixture(k, dense) if dense else GlueModelMixtureForCausalLM(
        GlueModelMixtureConfig([EXPERTS[0]] * 3, experts_per_prompt=k)).eval(), some_prompts()
    for expert in model.experts[1:]:
        expert.load_state_dict(model.experts[0].state_dict())
    assert difference(model(**padded(ids, 3)).logits[:, 3:], wholes(model)[0](ids).logits) <= 1e-5


# what the router judges

@every_depth
def test_the_router_judges_the_mean_state_of_its_layer(dense):
    model, ids = a_mixture(dense=dense, layer=1), some_prompts()
    plain = wholes(model)[0](ids, output_hidden_states=True).hidden_states[dense or 1].mean(1)
    assert difference(chosen(model.router(plain), 1), model.gate(ids)) <= 1e-5


def ran(module: torch.nn.Module) -> list[torch.Size]:
    """A list that grows by the shape of what enters each call of a module."""
    seen: list[torch.Size] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    return seen


def test_a_reader_that_is_chosen_reads_the_prompt_once():
    model, ids = a_mixture(), some_prompts()
    routes = model.route(ids)
    row = int((routes == 0).nonzero()[0])
    passes = [ran(model.experts[0].model.layers[0]), ran(model.experts[0].lm_head)]
    one = model(ids[row:row + 1], use_cache=True, logits_to_keep=1)
    assert passes == [[(1, 7, 32)], [(1, 1, 32)]]
    alone = model.experts[0](ids[row:row + 1], use_cache=True, logits_to_keep=1)
    assert torch.equal(one.logits, alone.logits)
    for ours, theirs in zip(one.past_key_values.slots[0].layers, alone.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    passes[1].clear()
    model(ids, logits_to_keep=1)
    assert passes[1] == [(int((routes == 0).sum()), 1, 32)]  # the head runs for the rows that the reader answers


def test_a_router_on_an_early_layer_spares_the_reader_the_others():
    model, ids = a_mixture(layer=1), some_prompts()
    passes = [ran(layer.mlp) for layer in model.experts[0].model.layers]
    model.gate(ids)
    assert passes == [[(9, 7, 32)], []]


def test_a_trunk_runs_once_for_all_rows_and_an_expert_for_its_own():
    model, ids = a_mixture(dense=1), some_prompts()
    counts = torch.bincount(model.route(ids), minlength=3).tolist()
    passes = [ran(part.layers[0]) for part in (model.trunk, *(expert.model for expert in model.experts))]
    model(ids)
    assert passes == [[(9, 7, 32)], *([(count, 7, 32)] for count in counts)]


@pytest.mark.parametrize("shape", [
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 3,
     "num_attention_heads": 4, "max_position_embeddings": 64},
    {**LIKE, **KINDS["qwen2"]}], ids=lambda shape: shape["model_type"])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_a_state_from_within_is_the_one_that_transformers_tells(shape, layer):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"vocab_size": 40, **shape})).eval().base_model
    ids = some_prompts()
    told = model(ids, output_hidden_states=True)
    assert torch.equal(entering(model, layer, input_ids=ids, use_cache=False), told.hidden_states[layer])
    assert torch.equal(model(ids).last_hidden_state, told.last_hidden_state)  # and the model is as it was


def test_weights_can_be_pinned_and_given_too():
    model, ids = a_mixture(k=3), some_prompts()
    with model.pinned((0.25, 0.0, 0.75)):
        pinned = model(ids).logits
    assert torch.equal(pinned, model(ids, routes=torch.tensor([[1.0, 0.0, 3.0]] * 9)).logits)
    assert not torch.equal(pinned, model(ids).logits)


def test_pins_nest_and_end_even_after_an_error():
    model, ids = a_mixture(), some_prompts()
    free = model(ids).logits
    with pytest.raises(RuntimeError, match="boom"), model.pinned(0):
        with model.pinned(1):
            assert torch.equal(model(ids).logits, model.experts[1](ids).logits)
        assert torch.equal(model(ids).logits, model.experts[0](ids).logits)
        raise RuntimeError("boom")
    assert torch.equal(model(ids).logits, free)


@pytest.mark.parametrize("routes", [torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([0.5, 0.5]),
                                    torch.ones(2, 2), torch.zeros(2, 3)])
def test_routes_that_are_none_are_refused(routes):
    with pytest.raises(ValueError, match="routes are expert indices"):
        a_mixture()(some_prompts(2), routes=routes)


def test_the_first_of_equal_experts_is_chosen():
    assert chosen(torch.zeros(2, 5), 1).argmax(1).tolist() == [0, 0]
    assert chosen(torch.tensor([[0.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_temperature_evens_weights_and_keeps_their_order():
    ids = some_prompts()
    cold, warm = a_mixture(k=3).gate(ids), a_mixture(k=3, router_temperature=10.0).gate(ids)
    assert torch.equal(cold.argsort(1), warm.argsort(1))
    assert bool((warm.amax(1) < cold.amax(1)).all())


@pytest.mark.parametrize("more", [{"layer": 0}, {"layer": 1}, {"layer": 2}, {"layer": -1}, {"dense": 1}, {"dense": 2}],
                         ids=str)
def test_padding_on_the_left_changes_neither_route_nor_logits(more):
    model, ids = a_mixture(**more), some_prompts()
    assert difference(model.gate(ids), model.gate(**padded(ids, 5))) <= 1e-5
    assert difference(model(ids).logits, model(**padded(ids, 5)).logits[:, 5:]) <= 5e-6


def test_padding_on_the_left_moves_no_absolute_position():
    """Rotary positions forgive a shift; those that GPT-2 looks up in a table do not."""
    shape = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = GlueModelMixtureForCausalLM(GlueModelMixtureConfig([shape, EXPERTS[0]])).eval()
    ids = some_prompts()
    for routes in (None, torch.zeros(9, dtype=torch.long)):
        shifted = model(**padded(ids, 5), routes=routes).logits[:, 5:]
        assert difference(model(ids, routes=routes).logits, shifted) <= 1e-5


@every_depth
def test_positions_of_the_caller_are_respected(dense):
    model, ids = a_mixture(dense=dense), some_prompts()
    expert = wholes(model)[1]
    asked = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7).expand(9, 7) * 3}
    alone = expert(ids, **asked, use_cache=False).logits
    assert torch.equal(model(ids, **asked, routes=torch.ones(9, dtype=torch.long)).logits, alone)
    assert difference(alone, expert(ids).logits) > 1e-2


@pytest.mark.parametrize("asked, said", [
    ({"inputs_embeds": torch.zeros(2, 3, 32)}, "give input_ids"),
    ({"input_ids": some_prompts(2), "attention_mask": torch.ones(2, 1, 7, 7)}, r"the attention mask is \[b, s\]"),
    ({"input_ids": some_prompts(2), "routes": torch.tensor([0, 1, 2])}, "2 prompts, but routes for 3")])
def test_what_a_mixture_cannot_follow_is_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        a_mixture()(**asked)


def test_the_loss_is_that_of_the_mixed_logits():
    model, ids = a_mixture(k=2), some_prompts()
    logits = model(ids).logits[:, :-1].reshape(-1, 40)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    assert abs(float(model(ids, labels=ids).loss - expected)) <= 1e-5


# the cache

@pytest.mark.parametrize("k", [1, 2, 3])
@every_depth
def test_decoding_with_the_cache_is_reading_the_whole_text_on_frozen_routes(k, dense):
    model, text = a_mixture(k, dense), some_prompts(s=12)
    first = model(**padded(text[:, :6], 3), use_cache=True)
    pieces, mask = [first.logits[:, 3:]], torch.cat([padded(text, 3)["attention_mask"]], dim=1)
    for step in range(6, 12):
        output = model(text[:, step:step + 1], attention_mask=mask[:, :step + 4], use_cache=True,
                       past_key_values=first.past_key_values)
        pieces.append(output.logits)
    whole = model(**padded(text, 3), routes=first.routes).logits[:, 3:]
    assert difference(torch.cat(pieces, dim=1), whole) <= 1e-5
    assert torch.equal(output.routes, first.routes)


@every_depth
def test_an_expert_caches_only_the_rows_it_answers(dense):
    model, ids = a_mixture(dense=dense), some_prompts()
    cache = model(ids, use_cache=True).past_key_values
    assert (cache.trunk.layers[0].keys.shape[0] if dense else cache.trunk) == (9 if dense else None)
    rows = [slot.layers[0].keys.shape[0] for slot in cache.slots]
    assert rows == torch.bincount(model.route(ids), minlength=3).tolist()
    assert cache.get_seq_length() == 7 and cache.batch_size == 9


@pytest.mark.parametrize("k", [1, 2])
@every_depth
def test_a_reordered_cache_is_the_cache_of_reordered_prompts(k, dense):
    model, ids, step = a_mixture(k, dense), some_prompts(), some_prompts(9, 1, seed=1)
    order = torch.tensor([4, 4, 0, 8, 2, 2, 7, 1, 1])
    moved, fresh = (model(rows, use_cache=True).past_key_values for rows in (ids, ids[order]))
    moved.reorder_cache(order)
    after, expected = (model(step, past_key_values=cache).logits for cache in (moved, fresh))
    assert difference(after, expected) <= 1e-5


@every_depth
def test_a_cropped_cache_has_forgotten_the_last_tokens(dense):
    model, ids = a_mixture(dense=dense), some_prompts()
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 4
    again = model(ids[:, 4:], past_key_values=cache).logits
    assert difference(again, model(ids).logits[:, 4:]) <= 1e-5


@every_depth
def test_a_repeated_cache_repeats_each_row(dense):
    model, ids = a_mixture(dense=dense), some_prompts()
    cache = model(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    step = some_prompts(18, 1, seed=2)
    fresh = model(ids.repeat_interleave(2, 0), use_cache=True).past_key_values
    assert difference(model(step, past_key_values=cache).logits, model(step, past_key_values=fresh).logits) <= 1e-5


def test_a_cache_of_another_kind_is_refused():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="a mixture keeps a RoutedCache, this is a DynamicCache"):
        a_mixture()(some_prompts(), past_key_values=DynamicCache())


# generation

HOW = {"greedy": {"do_sample": False}, "beams": {"do_sample": False, "num_beams": 3},
       "without cache": {"do_sample": False, "use_cache": False},
       "beams without cache": {"do_sample": False, "num_beams": 2, "use_cache": False}}


@pytest.mark.parametrize("how", HOW)
@every_depth
def test_a_batch_of_mixed_routes_continues_as_each_expert_continues_alone(how, dense):
    model, ids = a_mixture(dense=dense), some_prompts()
    routes = model.route(ids)
    made = model.generate(**padded(ids, 4), max_new_tokens=8, pad_token_id=0, **HOW[how])[:, 4:]
    for i, expert in enumerate(wholes(model)):
        expert.generation_config.eos_token_id = None
        alone = expert.generate(ids[routes == i], max_new_tokens=8, pad_token_id=0, **HOW[how])
        assert torch.equal(made[routes == i], alone)


def test_several_experts_generate_the_most_likely_token_of_their_mixture():
    model, ids = a_mixture(k=2), some_prompts()
    routes, text = model.gate(ids), ids
    for _ in range(5):
        text = torch.cat([text, model(text, routes=routes).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), text)


def test_sampling_follows_the_seed_and_the_route():
    model, ids = a_mixture(), some_prompts()
    drawn = []
    with torch.random.fork_rng():
        for route in (0, 0, 1):
            torch.manual_seed(3)
            drawn.append(model.generate(ids, routes=torch.full((9,), route), max_new_tokens=6, do_sample=True,
                                        num_return_sequences=2, pad_token_id=0))
    assert drawn[0].shape == (18, 13) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# files

@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_mixture_on_a_trunk_comes_back_bit_for_bit(tmp_path, kind):
    register()
    model, ids = a_mixture(2, dense=1, kind=kind), some_prompts()
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, back(ids).logits)
    assert not [name for name in Checkpoint(tmp_path) if "embed_tokens" in name and not name.startswith("trunk.")]


@pytest.mark.parametrize("more", [{}, {"router_width": 5}], ids=["linear", "mlp"])
def test_a_saved_mixture_comes_back_bit_for_bit(tmp_path, more):
    register()
    model, ids = a_mixture(2, **more), some_prompts()
    model.save_pretrained(tmp_path)
    assert not [name for name in Checkpoint(tmp_path) if "expert_1.lm_head" in name]  # tied, so not written
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, back(ids).logits)
    assert back.config.max_position_embeddings == 48 and back.config.vocab_size == 40
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.router.mean.dtype == half.router.outer.weight.dtype == torch.float32
    assert half.experts[1].dtype == torch.bfloat16


def test_a_cache_made_by_hand_is_empty():
    model = a_mixture()
    assert RoutedCache(torch.eye(3), model.experts).get_seq_length() == 0


def test_what_stands_at_padding_does_not_count_whatever_it_is():
    state, mask = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    for junk in (7.0, torch.inf, torch.nan):
        state[0, :2] = junk
        found = averaged(state, mask)
        assert torch.allclose(found, torch.stack([state[0, 2:].mean(0), state[1].mean(0)]), atol=1e-6)
    assert torch.equal(averaged(state, mask)[1], averaged(state[1:], None)[0])
    assert averaged(state, mask * 0).tolist() == [[0.0] * 3] * 2
