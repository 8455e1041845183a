"""Models and adapters: how they load, how an adapter is read through its base, and what is said when they do not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glue.checkpoint import Checkpoint, InMemory
from glue.errors import CheckpointError, ZooError
from glue.kinds import load, weights
from glue.kinds.adapter import scale
from glue.kinds.frame import copy_frame
from glue.kinds.lora import linear_layers
from glue.kinds.model import assembled
from glue.kinds.text import continued
from glue.member import Member
from glue.writer import Writer


def adapter_over(base: Member, folder: Path, *, dtype=torch.float32, **lora) -> Member:
    """A peft adapter with random factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **lora})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype), config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    model.save_pretrained(folder)
    return Member(folder.name, "adapter", str(folder), base=base)


def edited(member: Member, **changes) -> Member:
    """The adapter with other words in its adapter_config.json."""
    file = member.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return member


# models

def test_a_model_loads_padding_on_the_left_with_the_end_of_text_and_ready_to_answer(tiny):
    running = load(tiny("a"))
    assert (running.tokenizer.padding_side, running.tokenizer.pad_token) == ("left", "</s>")
    assert not running.model.training and running.route is None and running.pinned is None


@pytest.mark.parametrize("dtype, loaded", [("float32", torch.float32), ("bfloat16", torch.bfloat16),
                                           ("auto", torch.float16)])
def test_a_model_has_the_type_that_was_asked_for(tiny, dtype, loaded):
    assert load(tiny("a", dtype=torch.float16), dtype=dtype).model.dtype == loaded


def test_a_tied_head_is_the_embedding_though_no_file_holds_it(tiny):
    member = tiny("tied", tie_word_embeddings=True)
    model = load(member).model
    assert "lm_head.weight" not in weights(member)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_missing_tensor_is_an_error_and_not_a_random_number(tiny):
    member = tiny("torn")
    file = member.folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors .* missing, e.g. model.layers.1.mlp.up_proj.weight"):
        load(member)


def test_code_of_a_model_is_never_run(tiny):
    member = tiny("strange")
    (member.folder / "config.json").write_text(json.dumps(
        {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}))
    (member.folder / "evil.py").write_text(f"open({str(member.folder / 'ran')!r}, 'w')")
    with pytest.raises(ZooError, match="brings code of its own for 'strange', which is never run"):
        load(member)
    assert not (member.folder / "ran").exists()


@pytest.mark.parametrize("text, said", [("{", "is not JSON"), ("[]", "is not a mapping"), ("{}", "not understood")])
def test_a_damaged_configuration_is_named(tiny, text, said):
    member = tiny("damaged")
    (member.folder / "config.json").write_text(text)
    with pytest.raises(ZooError, match=said):
        load(member)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ZooError, match="'empty' has no config.json"):
        load(Member("empty", "model", str(tmp_path)))


def test_a_dataset_neither_runs_nor_merges():
    dataset = Member("skills", "dataset", "/nowhere")
    with pytest.raises(ZooError, match="'skills' is a dataset; it does not run"):
        load(dataset)
    with pytest.raises(ZooError, match="'skills' is a dataset; it has no weights"):
        weights(dataset)


def test_tensors_in_memory_make_the_same_model_as_their_file(tiny):
    member, ids = tiny("a"), torch.tensor([[1, 5, 9, 7]])
    built = assembled(member, ((name, tensor) for name, tensor in weights(member).items()))
    assert torch.equal(built.model(ids).logits, load(member).model(ids).logits)


def test_an_assembled_model_lacking_a_tensor_is_refused(tiny):
    member = tiny("a")
    with pytest.raises(CheckpointError, match="20 tensors .* missing"):
        assembled(member, {"lm_head.weight": weights(member)["lm_head.weight"]})


def test_a_frame_makes_a_model_of_written_weights_and_says_their_type(tiny, tmp_path):
    source, out = tiny("a"), tmp_path / "out"
    out.mkdir()
    halved = InMemory({name: tensor.bfloat16() for name, tensor in weights(source).items()})
    writer = Writer(out, halved.headers)
    for name in halved:
        writer.write(name, halved[name])
    writer.close()
    copy_frame(source, out)
    made = load(Member("made", "model", str(out)), dtype="auto")
    assert made.model.dtype == torch.bfloat16 and made.tokenizer("w3 w4")["input_ids"] == [1, 3, 4]
    assert torch.equal(made.model.lm_head.weight, halved["lm_head.weight"])


def test_a_continuation_is_what_the_model_generates(tiny):
    running = load(tiny("a"))
    ids = running.tokenizer("w5 w6", return_tensors="pt")["input_ids"]
    for _ in range(4):
        ids = torch.cat([ids, running.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert continued(running, "w5 w6", 4) == running.tokenizer.decode(ids[0, 3:], skip_special_tokens=True)


# adapters

@pytest.mark.parametrize("lora", [
    {}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    {"rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 6}},
], ids=["plain", "rslora", "patterns", "regular expression"])
def test_an_adapter_read_through_its_base_is_what_peft_merges(tiny, tmp_path, lora):
    member = adapter_over(tiny("base"), tmp_path / "lora", **lora)
    seen, merged = weights(member), load(member).model.state_dict()
    assert sorted(seen) == sorted(merged)
    assert max(float((seen[name] - merged[name]).abs().max()) for name in seen) <= 1e-6
    changed = [name for name in seen if not torch.equal(seen[name], weights(member.base)[name])]
    assert len(changed) == 4 and all("q_proj" in name or "up_proj" in name for name in changed)


@pytest.mark.parametrize("lora, more", [
    ({"use_dora": True}, []), ({"use_dora": True, "use_rslora": True}, []),
    ({"bias": "lora_only"}, ["self_attn.q_proj.bias"]),
    ({"bias": "all"}, [f"self_attn.{side}_proj.bias" for side in "kqvo"]),
    ({"modules_to_save": ["lm_head"]}, ["lm_head.weight"]),
], ids=["dora", "dora and rslora", "biases of its layers", "all biases", "a saved head"])
def test_what_an_adapter_has_besides_factors_is_read_as_peft_merges_it(tiny, tmp_path, lora, more):
    member = adapter_over(tiny("base", attention_bias=True), tmp_path / "lora", **lora)
    file = member.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    extras = [name for name in tensors if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    save_file({name: tensor + 0.1 * (name in extras) for name, tensor in tensors.items()}, file)
    seen, merged = weights(member), load(member).model.state_dict()
    assert extras and max(float((seen[name] - merged[name]).abs().max()) for name in seen) <= 2e-6
    changed = {name for name in seen if not torch.equal(seen[name], weights(member.base)[name])}
    factors = {name for name in seen if name.endswith(("q_proj.weight", "up_proj.weight"))}
    assert changed == factors | {name for name in seen if name.endswith(tuple(more))} and len(factors) == 4
    assert all(seen.headers[name].file is None for name in changed)


def test_linear_layers_are_those_that_the_architecture_calls_so(tiny, tmp_path):
    from transformers import GPT2Config

    layers = linear_layers(tiny("base"))
    assert len(layers) == 2 * 7 and layers[0] == "model.layers.0.self_attn.q_proj" and "lm_head" not in layers
    GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, architectures=["GPT2LMHeadModel"]).save_pretrained(
        tmp_path / "gpt2")
    turned = Member("gpt2", "model", str(tmp_path / "gpt2"))
    assert linear_layers(turned) == [], "its matrices stand the other way round"


def test_an_adapter_that_lacks_what_its_configuration_says_is_refused(tiny, tmp_path):
    member = adapter_over(tiny("base"), tmp_path / "lora", use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora: false, and 'model.layers.0.mlp.up_proj' has a magnitude"):
        weights(edited(member, use_dora=False))


def test_an_adapter_is_added_in_fp32_and_rounded_once(tiny, tmp_path):
    member = adapter_over(tiny("base", dtype=torch.bfloat16), tmp_path / "lora")
    name, module = "model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj"
    factors = Checkpoint(member.folder / "adapter_model.safetensors")
    a, b = (factors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    exact = weights(member.base)[name].double() + 2.0 * b @ a
    found = weights(member)[name]
    assert found.dtype == torch.bfloat16
    assert float((found != exact.bfloat16()).double().mean()) <= 0.001  # fp32 sums may round to the other neighbour


def test_an_adapter_may_sit_on_an_adapter(tiny, tmp_path):
    first = adapter_over(tiny("base"), tmp_path / "first")
    second = replace(adapter_over(first.base, tmp_path / "second", target_modules=["q_proj"]), base=first)
    merged = load(second).model.state_dict()
    assert max(float((weights(second)[name] - merged[name]).abs().max()) for name in merged) <= 1e-6


def test_the_scale_follows_the_first_pattern_that_matches_whole_parts_of_the_name():
    config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"proj": 1, "q_proj": 4}, "alpha_pattern": {"1.q_proj": 2}}
    assert scale(config, "layers.0.q_proj") == 16 / 4
    assert scale(config, "layers.1.q_proj") == 2 / 4
    assert scale(config, "layers.1.up_proj") == 16 / 8
    assert scale({**config, "use_rslora": True}, "layers.0.q_proj") == 16 / math.sqrt(4)


def test_the_fingerprint_of_an_adapter_depends_on_its_base_its_factors_and_its_scale(tiny, tmp_path):
    one, other = tiny("base"), tiny("other", seed=1)
    member = adapter_over(one, tmp_path / "lora")
    prints = {weights(member).fingerprint, weights(replace(member, base=other)).fingerprint}
    edited(member, lora_alpha=9)
    prints.add(weights(member).fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize("changes, said", [
    ({"use_dora": True}, "use_dora: true"), ({"lora_bias": True}, "lora_bias"), ({"fan_in_fan_out": True}, "fan_in"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"init_lora_weights": "pissa"}, 'weights: "pissa"'),
    ({"new_in_2030": 1}, "new_in_2030"), ({"peft_type": "IA3"}, "only LoRA"), ({"r": 0}, "rank"), ({"r": "4"}, "rank"),
    ({"rank_pattern": {"(": 3}}, "is not understood"), ({"lora_alpha": None}, "alpha"), ({"rank_pattern": [3]}, "rank"),
    ({"r": 3}, "at rank 3"),
])
def test_what_is_not_plain_lora_is_refused(tiny, tmp_path, changes, said):
    member = edited(adapter_over(tiny("base"), tmp_path / "lora"), **changes)
    with pytest.raises(CheckpointError) as error:
        weights(member)
    assert said in str(error.value)


def test_an_adapter_of_another_base_is_refused(tiny, tmp_path):
    member = adapter_over(tiny("base"), tmp_path / "lora")
    with pytest.raises(CheckpointError, match="do not make"):
        weights(replace(member, base=tiny("wide", hidden_size=64)))
    with pytest.raises(CheckpointError, match="which its base does not have"):
        weights(replace(member, base=tiny("flat", num_hidden_layers=1)))


def test_factors_of_embeddings_are_refused(tiny, tmp_path):
    member = adapter_over(tiny("base"), tmp_path / "lora", target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="is not a LoRA factor of a linear layer"):
        weights(member)


def test_an_adapter_without_a_base_says_how_to_give_one(tiny, tmp_path):
    member = replace(adapter_over(tiny("base"), tmp_path / "lora"), base=None)
    for ask in (load, weights):
        with pytest.raises(ZooError, match="nothing says what it sits on\n  add  base:"):
            ask(member)


def test_pickled_factors_are_refused(tiny, tmp_path):
    member = adapter_over(tiny("base"), tmp_path / "lora")
    (member.folder / "adapter_model.safetensors").rename(member.folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        load(member)
