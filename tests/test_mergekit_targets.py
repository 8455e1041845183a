"""Planning merge configs: which tensors are made of which, where models are not all alike, and at what cost."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from glue.checkpoint import InMemory
from glue.errors import GlueError
from glue.merge.mergekit import architecture as lists
from glue.merge.mergekit.config import read_configs
from glue.merge.mergekit.nouns import ModelRef
from glue.merge.mergekit.targets import Model, Planned, merge_of, planned

BLOCK = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
         "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
TIES = "merge_method: ties\nbase_model: z\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"


def llama(layers: int = 2, *, head: bool = True, value: float = 1.0, dtype: torch.dtype = torch.float32,
          more: dict[str, torch.Tensor] | None = None, **config: Any) -> tuple[InMemory, dict[str, Any]]:
    """Tensors of ones, times `value`, under the names of a Llama; and its config.json."""
    names = ["model.embed_tokens", "model.norm", *(["lm_head"] if head else []),
             *(f"model.layers.{k}.{word}" for k in range(layers) for word in BLOCK)]
    tensors = {f"{name}.weight": torch.full((6, 4), value, dtype=dtype) for name in names}
    return InMemory({**tensors, **(more or {})}), {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "vocab_size": 6,
        "tie_word_embeddings": not head, **config}


def plan(folder: Path, text: str, untie: bool = False, **models: tuple[InMemory, dict[str, Any]]) -> Planned:
    (folder / "c.yaml").write_text(text)
    config, = read_configs(folder / "c.yaml")
    return planned(config, lambda ref: Model(ref, ref.path, *models[ref.path]), untie=untie)


def refused(folder: Path, text: str, **models: Any) -> str:
    with pytest.raises(GlueError) as caught:
        plan(folder, text, **models)
    return str(caught.value).removeprefix(f"{folder}/")


def target(found: Planned, name: str):
    return next(each for each in found.targets if each.name == name)


def test_layers_are_numbered_anew_and_the_config_says_how_many(tmp_path):
    types = ["full", "sliding", "full"]
    models = {name: llama(3, layer_types=types) for name in "ab"}
    found = plan(tmp_path, "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
                           "- sources: [{model: b, layer_range: [1, 3]}]\n- sources: [{model: a, layer_range: [1, "
                           "2]}]\n", **models)
    made = {each.name: (each.inputs[0].source.name, each.inputs[0].name) for each in found.targets}
    assert [made[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(5)] == [
        (word, f"model.layers.{k}.mlp.up_proj.weight")
        for word, k in (("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 1))]
    assert made["model.embed_tokens.weight"][0] == "a" and made["model.norm.weight"][0] == "a"
    assert found.config == {"num_hidden_layers": 5, "dtype": "float32",
                            "layer_types": ["full", "sliding", "sliding", "full", "sliding"]}


def test_the_nearest_setting_counts(tmp_path):
    text = """merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 1], parameters: {weight: 1}}
  - {model: b, layer_range: [0, 1]}
  parameters: {weight: 2}
- sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}]
parameters: {weight: 3}
"""
    found = plan(tmp_path, text, a=llama(), b=llama())
    weights = {name: target(found, name).choice.params["weight"] for name in
               ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight",
                "model.norm.weight")}
    assert list(weights.values()) == [[1.0, 2.0], [1.0, 2.0], [3.0, 3.0], [3.0, 3.0]]


def test_a_gradient_ends_with_the_last_layer_and_starts_outside_of_the_layers(tmp_path):
    text = LINEAR.replace("0.5", "[0, 1], normalize: false")
    found = plan(tmp_path, text, a=llama(3), b=llama(3))
    names = ["model.embed_tokens", *(f"model.layers.{k}.mlp.up_proj" for k in range(3)), "model.norm"]
    assert [target(found, f"{name}.weight").choice.params["weight"][0] for name in names] == [0.0, 0.0, 0.5, 1.0, 0.0]
    one = plan(tmp_path, text, a=llama(1), b=llama(1))
    assert target(one, "model.layers.0.mlp.up_proj.weight").choice.params["weight"] == [1.0, 1.0]


def test_a_gradient_of_whole_numbers_with_fractions_between_them_is_refused(tmp_path):
    text = "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters:\n  max_iter: [1, 2]\n"
    assert refused(tmp_path, text, a=llama(3), b=llama(3)).startswith(
        "c.yaml:4:3: 'max_iter' at 'model.layers.1.input_layernorm.weight': 1.5 is not a whole number")


def test_a_head_that_all_share_with_their_embedding_is_left_out(tmp_path):
    found = plan(tmp_path, LINEAR, a=llama(head=False), b=llama(head=False))
    assert "lm_head.weight" not in {each.name for each in found.targets} and "tie_word_embeddings" not in found.config


def test_members_that_differ_in_tying_are_refused_unless_they_are_to_be_untied(tmp_path):
    models = {"a": llama(), "b": llama(head=False, value=3.0)}
    assert "c.yaml:2:23: 'b' shares 'lm_head.weight' with its embedding" in refused(tmp_path, LINEAR, **models)
    found = plan(tmp_path, LINEAR, untie=True, **models)
    assert [each.name for each in target(found, "lm_head.weight").inputs] == ["lm_head.weight",
                                                                              "model.embed_tokens.weight"]
    assert found.config["tie_word_embeddings"] is False
    assert float(merge_of(found).tensor("lm_head.weight")[0, 0]) == 2.0


def test_a_tensor_that_one_model_lacks_is_named_with_that_model(tmp_path):
    less, config = llama()
    broken = InMemory({name: less[name] for name in less if "layers.1.mlp" not in name})
    said = refused(tmp_path, LINEAR, a=llama(), b=(broken, config))
    assert said.startswith("c.yaml:2:23: 'model.layers.1.mlp.up_proj.weight' is not in 'b' (3 tensors are missing)")


@pytest.mark.parametrize("text, made", [
    ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}", "passthrough of b"),
    ("merge_method: nearswap\nbase_model: b\nmodels: [{model: a}]\nparameters: {t: 0.5}", "passthrough of b"),
    ("merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}", "not in the base_model"),
    ("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}", "linear of b"),
    ("merge_method: ties\nbase_model: b\nmodels: [{model: a}, {model: z}]\nparameters: {weight: "
     "1}", "passthrough of b"),
    ("merge_method: ties\nbase_model: a\nmodels: [{model: b}, {model: z}]\nparameters: {weight: "
     "1}", "not in the base_model"),
    ("merge_method: model_stock\nbase_model: b\nmodels: [{model: a}, {model: z}]", "passthrough of b"),
    ("merge_method: model_stock\nbase_model: a\nmodels: [{model: b}, {model: z}]", "left out")])
def test_a_tensor_that_only_one_has_is_kept_or_refused_as_by_mergekit(tmp_path, text, made):
    models = {"a": llama(), "b": llama(more={"extra.bias": torch.ones(3)}), "z": llama()}
    if "of" not in made.split():
        if made == "left out":
            found = plan(tmp_path, text, **models)
            assert "extra.bias" not in {each.name for each in found.targets}
            assert any("left out" in note for note in found.notes)
            return
        assert made in refused(tmp_path, text, **models)
        return
    one = target(plan(tmp_path, text, **models), "extra.bias")
    assert f"{one.choice.method.name} of {', '.join(one.names)}" == made and one.base is None


def test_tensors_that_the_list_of_an_architecture_lacks_are_merged_too_and_noted(tmp_path):
    more = {f"model.layers.{k}.self_attn.q_proj.bias": torch.ones(3) for k in range(2)}
    tables = {f"model.layers.{k}.self_attn.rotary_emb.inv_freq": torch.ones(3) for k in range(2)}
    found = plan(tmp_path, LINEAR, a=llama(more=more | tables), b=llama(more=more))
    made = {each.name for each in found.targets}
    assert set(more) <= made and not set(tables) & made
    assert "'model.layers.0.self_attn.q_proj.bias' and 1 more are not on mergekit's list" in found.notes[0]


def test_an_architecture_without_a_list_is_made_out_by_its_names(tmp_path):
    tensors = {"stem.weight": torch.ones(2), **{f"body.block.{k}.w": torch.ones(2) for k in range(3)}}
    models = {name: (InMemory(tensors), {"architectures": ["Mystery"], "n_layer": 3}) for name in "ab"}
    found = plan(tmp_path, "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
                           "- sources: [{model: b, layer_range: [2, 3]}]\n", **models)
    assert [each.name for each in found.targets] == ["stem.weight", *(f"body.block.{k}.w" for k in range(4))]
    assert found.config == {"n_layer": 4, "dtype": "float32"}
    assert target(found, "body.block.3.w").inputs[0].name == "body.block.2.w"


def test_models_of_two_architectures_are_refused(tmp_path):
    said = refused(tmp_path, LINEAR, a=llama(), b=llama(architectures=["GPT2LMHeadModel"], model_type="gpt2"))
    assert said.startswith("c.yaml:2:23: 'b' is a GPT2LMHeadModel and 'a' a LlamaForCausalLM")


def test_architectures_with_the_same_tensors_merge(tmp_path):
    found = plan(tmp_path, LINEAR, a=llama(), b=llama(architectures=["MistralForCausalLM"], model_type="mistral"))
    assert len(found.targets) == 3 + 2 * len(BLOCK)


def test_whole_numbers_are_kept_and_must_be_alike_in_kind(tmp_path):
    one, other = torch.arange(3), torch.arange(3.0)
    found = plan(tmp_path, LINEAR + "dtype: bfloat16", a=llama(more={"ids": one}), b=llama(more={"ids": one}))
    assert target(found, "ids").header.dtype == torch.int64
    assert torch.equal(merge_of(found).tensor("ids"), one)
    assert "'ids' holds torch.int64 in 'a' and torch.float32 in 'b'" in refused(
        tmp_path, LINEAR, a=llama(more={"ids": one}), b=llama(more={"ids": other}))


def test_types_are_those_asked_for_or_one_that_holds_all(tmp_path):
    half, single = llama(dtype=torch.bfloat16), llama(torch_dtype="float32")
    for more, dtype, work in (("", "float32", None), ("dtype: float16", "float16", None),
                              ("dtype: float32\nout_dtype: bfloat16", "bfloat16", torch.float32),
                              ("dtype: float64", "float64", torch.float64)):
        found = plan(tmp_path, LINEAR + more, a=single, b=half)
        assert {str(each.header.dtype) for each in found.targets} == {f"torch.{dtype}"} and found.work == work
        assert found.config["torch_dtype"] == dtype
    assert plan(tmp_path, LINEAR, a=half, b=half).config["dtype"] == "bfloat16"


def test_work_that_mergekit_has_to_do_itself_is_named(tmp_path):
    rows = torch.ones(8, 4)
    longer = llama(more={"model.embed_tokens.weight": rows, "lm_head.weight": rows}, vocab_size=8)
    assert "tokenizer: {source: union}" in refused(tmp_path, LINEAR, a=llama(), b=longer)
    found = plan(tmp_path, LINEAR + "tokenizer: {source: union}", a=llama(), b=longer)
    assert found.through == "it changes the vocabulary ('tokenizer')" and found.targets == []
    experts = {f"model.layers.0.block_sparse_moe.experts.{k}.w1.weight": torch.ones(2) for k in range(2)}
    mixture = llama(1, more=experts, architectures=["MixtralForCausalLM"], model_type="mixtral")
    assert "transformers has to convert them" in plan(tmp_path, LINEAR, a=mixture, b=mixture).through


def test_a_module_that_is_not_there_is_an_error_with_the_nearest_word(tmp_path):
    text = "merge_method: linear\nmodules: {defualt: {models: [{model: a}]}}\nparameters: {weight: 1}\n"
    assert "did you mean 'default'" in refused(tmp_path, text, a=llama())


def test_inputs_keep_their_order_only_where_mergekits_sums_are_matched(tmp_path):
    models = {"a": llama(value=3.0), "b": llama(), "z": llama(value=0.0)}
    assert plan(tmp_path, LINEAR, **models).keeps_order and not plan(tmp_path, TIES, **models).keeps_order
    def order(text: str) -> list[str]:
        return merge_of(plan(tmp_path, text, **models)).targets["lm_head.weight"].names

    assert order(TIES) == order(TIES.replace("{model: a}, {model: b}", "{model: b}, {model: a}"))


def test_several_models_that_are_not_there_are_told_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text(LINEAR)
    config, = read_configs(tmp_path / "c.yaml")

    def nowhere(ref: ModelRef) -> Model:
        raise GlueError(f"there is no model '{ref}'")

    with pytest.raises(GlueError) as caught:
        planned(config, nowhere)
    assert [line.split(":", 1)[1] for line in str(caught.value).splitlines()] == [
        "2:11: there is no model 'a'", "2:23: there is no model 'b'"]


def test_layers_are_counted_by_the_names_of_tensors_where_the_config_does_not_say():
    part = lists.known({"architectures": ["LlamaForCausalLM"]}).parts["default"]
    weights, config = llama(3)
    assert part.layers({}, weights.headers) == part.layers(config, ()) == part.layers({"n_layer": 3}, ()) == 3


def test_planning_four_models_of_201_tensors_is_quick_and_imports_nothing_heavy(tmp_path):
    rows = "\n".join(f"- {{model: {name}, parameters: {{weight: [0.1, 0.5], density: "
                     f"[{{filter: mlp, value: [0.5, 0.7]}}"
                     f", {{value: 0.4}}]}}}}" for name in "abcd")
    text = f"merge_method: ties\nbase_model: z\nmodels:\n{rows}\nparameters: {{normalize: true, int8_mask: true}}\n"
    models = {name: llama(22) for name in "abcdz"}
    plan(tmp_path, text, **models)
    began = time.perf_counter()
    found = plan(tmp_path, text, **models)
    assert time.perf_counter() - began < 0.5 and len(found.targets) == 201
    code = ("import sys, glue.merge.mergekit.targets; from glue.merge.mergekit.architecture import known\n"
            "assert known({'architectures': ['LlamaForCausalLM']})\n"
            "print([name for name in ('mergekit', 'transformers', 'peft') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
