"""Mixtures by mergekit-moe: what it is given is checked first, and what it leaves is a model that loads anywhere."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import yaml

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError, GlueError, MethodError, RecipeError, ZooError
from glue.kinds.card import Card, Source
from glue.merge.mergekit.experts import rotary
from glue.merge.mergekit.moe import build_moe, check_moe, read_moe

HIDDEN = """
base_model: zoo/a
gate_mode: hidden
dtype: float32
experts:
  - {source_model: zoo/b, positive_prompts: [w3 w4 w5, w6], negative_prompts: [w30]}
  - {source_model: zoo/c, positive_prompts: [w20 w21 w22]}
"""
RANDOM = "base_model: zoo/a\ngate_mode: random\nexperts: [{source_model: zoo/b}, {source_model: zoo/b}]\n"
SHARED = HIDDEN + "shared_experts: [{source_model: zoo/b, positive_prompts: [w9]}]\n"
IDS = torch.tensor([[1, 5, 9, 21, 7, 33]])


@pytest.fixture
def zoo(tiny):
    """Three Llamas under the names that the configs give them; angles and heads are none of the defaults."""
    shape = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
    return {f"zoo/{name}": tiny(name, seed=k, **shape).folder for k, name in enumerate("abc")}


@pytest.fixture
def said(tmp_path):
    """said(text) reads a config that is written down as text."""
    def read(text: str, **how):
        (tmp_path / "moe.yml").write_text(text)
        return read_moe(tmp_path / "moe.yml", **how)

    return read


def card(config):
    return Card("mixture", "mergekit-moe", (Source("a"), Source("b")), config.text,
                config_file="mergekit_moe_config.yml", tags=("moe", "mergekit", "merge"))


def logits(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        return model, model(IDS).logits


# --- what comes out ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text,kind", [
    *((HIDDEN.replace("hidden", gate), "Mixtral") for gate in ("hidden", "cheap_embed", "uniform_random")),
    (SHARED, "Qwen2Moe")])
def test_the_mixture_is_what_mergekit_moe_makes_of_it(zoo, said, tmp_path, text, kind):
    from transformers import set_seed

    config, ours, theirs = said(text), tmp_path / "ours", tmp_path / "theirs"
    build_moe(config, zoo, ours, card(config), seed=4)
    with torch.random.fork_rng():
        set_seed(4)
        _mergekit_moe(config, zoo, theirs)
    (model, made), (_, peer) = logits(ours), logits(theirs)
    assert type(model).__name__ == f"{kind}ForCausalLM" and made.isfinite().all()
    assert torch.equal(made, peer)


@pytest.mark.parametrize("shape", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 16},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}])
def test_a_mixture_of_copies_is_the_model_itself(tiny, said, tmp_path, shape):
    zoo = {"zoo/a": tiny("a", seed=1, **shape).folder}
    zoo["zoo/b"] = zoo["zoo/a"]
    config = said(RANDOM)
    digest, notes = build_moe(config, zoo, tmp_path / "out", card(config), seed=1)
    _, dense = logits(zoo["zoo/a"])
    _, mixed = logits(tmp_path / "out")
    assert float((mixed - dense).abs().max()) <= 1e-5 and float(dense.abs().max()) > 0.1
    assert len(digest) == 32 and notes == ()


def test_the_folder_is_complete_and_its_names_are_those_of_every_loader(zoo, said, tmp_path):
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer

    (zoo["zoo/a"] / "generation_config.json").write_text('{"eos_token_id": 2}')
    config, out = said(HIDDEN), tmp_path / "out"
    build_moe(config, zoo, out, card(config), shard_size=20_000)
    made, expert = Checkpoint(out), Checkpoint(zoo["zoo/c"])
    for theirs, own in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
        name = f"model.layers.1.block_sparse_moe.experts.1.{theirs}.weight"
        assert torch.equal(made[name], expert[f"model.layers.1.mlp.{own}.weight"])
    assert made.headers["model.layers.0.block_sparse_moe.gate.weight"].shape == (2, 32)
    assert not [name for name in made if "gate_up_proj" in name]
    assert (out / "tokenizer.json").read_bytes() == (zoo["zoo/a"] / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    assert (out / "mergekit_moe_config.yml").read_text() == HIDDEN
    assert ModelCard((out / "README.md").read_text()).data.tags == ["moe", "mergekit", "merge"]
    assert AutoTokenizer.from_pretrained(out)("w3").input_ids == [1, 3]
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~mask}
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_the_same_seed_gives_the_same_mixture_and_another_another(zoo, said, tmp_path):
    config = said(RANDOM.replace("zoo/b}", "zoo/b, noise_scale: 0.1}"))
    digests = [build_moe(config, zoo, tmp_path / str(k), card(config), seed=seed)[0]
               for k, seed in enumerate((7, 7, 8))]
    assert digests[0] == digests[1] != digests[2]


def test_qwen3_models_make_a_qwen3_mixture(said, tmp_path, tiny):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = tiny("words").folder
    folders = {f"zoo/{name}": tmp_path / f"q{name}" for name in "abc"}
    torch.manual_seed(0)
    for k, folder in enumerate(folders.values()):
        if k < 2:
            Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                         initializer_range=0.3)).save_pretrained(folder)
            shutil.copy(words / "tokenizer.json", folder)
            shutil.copy(words / "tokenizer_config.json", folder)
        else:
            shutil.copytree(folders["zoo/a"], folder)
    config = said(RANDOM.replace("zoo/b", "zoo/c"))
    build_moe(config, folders, tmp_path / "out", card(config))
    (model, mixed), (_, dense) = logits(tmp_path / "out"), logits(folders["zoo/a"])
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and float((mixed - dense).abs().max()) <= 1e-5


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape,words", [
    ({"attention_bias": True}, r"has \(16,\) for the tensor 'model.layers.0.self_attn.k_proj.bias', .* has nothing"),
    ({"mlp_bias": True}, r"has \(32,\) for the tensor 'model.layers.0.mlp.down_proj.bias', .* has nothing"),
    ({"vocab_size": 48}, "'zoo/b' has 48 for vocab_size, and the base 'zoo/a' has 40"),
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "has 1000000.0 for rope_theta, .* has 50000.0"),
    ({"rope_parameters": {"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0}}, "has 2.0 for factor, .* has None"),
    ({"intermediate_size": 40}, "has 40 for intermediate_size, .* has 48"),
    ({"num_hidden_layers": 3}, "has 3 for num_hidden_layers, .* has 2"),
    ({"num_attention_heads": 2, "head_dim": 16}, "has 2 for num_attention_heads, .* has 4"),
    ({"num_key_value_heads": 1}, "has 1 for num_key_value_heads, .* has 2")])
def test_an_expert_that_is_made_otherwise_is_refused_with_its_value(zoo, said, tiny, tmp_path, shape, words):
    shape = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, **shape}
    zoo["zoo/b"] = tiny("odd", seed=9, **shape).folder
    with pytest.raises(MethodError, match=words) as caught:
        build_moe(said(HIDDEN), zoo, tmp_path / "out", card(said(HIDDEN)))
    assert str(caught.value).startswith(f"{tmp_path}/moe.yml:6:6: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_that_all_models_have_would_be_dropped(tiny, said, key):
    zoo = {f"zoo/{name}": tiny(name, seed=k, **{key: True}).folder for k, name in enumerate("abc")}
    with pytest.raises(MethodError, match="has a bias 'model.layers.0.*', which a Mixtral has no place for") as caught:
        check_moe(said(HIDDEN), zoo)
    assert caught.value.place.line == 2  # where the base is named


def test_a_vocabulary_of_other_words_is_refused(zoo, said, tiny):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, 39)}, "other": 39}
    rope = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
    zoo["zoo/c"] = tiny("other", words=words, **rope).folder
    with pytest.raises(MethodError, match="'zoo/c' has .* for the number of token"):
        check_moe(said(HIDDEN), zoo)


@pytest.mark.parametrize("name,told,words", [
    ("zoo/b", {"model_type": "mistral"}, "'zoo/b' has mistral for model_type, and the base 'zoo/a' has llama"),
    ("zoo/a", {"model_type": "gemma"}, "no mixture of 'gemma' models"),
    ("zoo/c", {"quantization_config": {"bits": 4}}, "'zoo/c' is quantised")])
def test_another_kind_of_model_is_refused(zoo, said, name, told, words):
    assert check_moe(said(HIDDEN), zoo) == ("mixtral", ())
    file = zoo[name] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
    with pytest.raises(MethodError, match=words):
        check_moe(said(HIDDEN), zoo)


def test_a_folder_that_lacks_something_is_named(zoo, said):
    with pytest.raises(MethodError, match="no folder is known for 'zoo/c'"):
        check_moe(said(HIDDEN), {name: folder for name, folder in zoo.items() if name != "zoo/c"})
    (zoo["zoo/c"] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        check_moe(said(HIDDEN), zoo)
    (zoo["zoo/b"] / "config.json").unlink()
    with pytest.raises(ZooError, match="'zoo/b' has no config.json"):
        check_moe(said(HIDDEN), zoo)
    (zoo["zoo/a"] / "tokenizer.json").unlink()
    with pytest.raises(MethodError, match="'zoo/a' has no tokenizer"):
        check_moe(said(HIDDEN), zoo)


def test_one_shared_expert_with_prompts_makes_a_qwen_mixture(zoo, said):
    assert check_moe(said(SHARED), zoo) == ("qwen", ())
    assert check_moe(said(RANDOM + "shared_experts: [{source_model: zoo/a}]\narchitecture: qwen\n"), zoo)[0] == "qwen"


def test_what_needs_code_from_the_hub_and_what_nothing_makes_is_refused(zoo, said):
    plain = "shared_experts: [{source_model: zoo/b}]\n"
    with pytest.raises(MethodError, match="DeepSeek MoE, which runs only with code from the hub"):
        check_moe(said(HIDDEN + plain), zoo)
    with pytest.raises(MethodError, match="1 shared do not make a Mixtral"):
        check_moe(said(SHARED + "architecture: mixtral\n"), zoo)
    with pytest.raises(MethodError, match="no output 'mixtrel'; did you mean 'mixtral'"):
        check_moe(said(HIDDEN + "architecture: mixtrel\n"), zoo)
    other = {**zoo, "zoo/d": zoo["zoo/c"]}
    with pytest.raises(MethodError, match="shared expert 'zoo/d' is neither the base nor an expert"):
        check_moe(said(SHARED.replace("[{source_model: zoo/b", "[{source_model: zoo/d")), other)


def test_three_experts_are_not_for_llama_cpp(zoo, said):
    config = said(HIDDEN + "  - {source_model: zoo/a, positive_prompts: [w8]}\n")
    assert check_moe(config, zoo).notes == ("3 experts are no power of two, so llama.cpp cannot run the result",)


def test_rotary_angles_are_the_same_however_they_are_written():
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    assert rotary(new) == rotary({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}})
    assert rotary({}) == rotary({"rope_theta": 10000.0, "rope_scaling": None}) == {
        "rope_type": "default", "rope_theta": 10000.0}


# --- grammar ----------------------------------------------------------------------------------------------------------

def test_a_config_is_read_as_it_is_meant(said):
    config = said(HIDDEN + "experts_per_token: 1\n")
    assert [str(ref) for ref in config.referenced()] == ["zoo/a", "zoo/b", "zoo/c"]
    assert config.experts[0].positive_prompts == ("w3 w4 w5", "w6") and config.experts[0].negative_prompts == ("w30",)
    assert (config.gate_mode, config.dtype, config.experts_per_token, config.notes) == ("hidden", "float32", 1, ())
    assert said("base_model: a\nexperts: [{source_model: b, positive_prompts: [x]}]\nexperts_per_token: 1").gate_mode \
        == "hidden"


@pytest.mark.parametrize("change,where,words", [
    (("gate_mode: hidden", "gate_mode: hiden"), "3:1", "'gate_mode' cannot be 'hiden'; did you mean 'hidden'"),
    (("positive_prompts: [w20", "positive_promts: [w20"), "7:27", "did you mean 'positive_prompts'"),
    (("positive_prompts: [w20 w21 w22]", "noise_scale: 0.1"), "7:5", "'zoo/c' has no positive_prompts"),
    (("[w20 w21 w22]", "w20"), "7:27", "'positive_prompts' is a list of texts"),
    (("[w20 w21 w22]", "[w3 w4 w5, w6], negative_prompts: [w30]"), "5:1", "all experts have the same prompts"),
    (("source_model: zoo/c", "source_model: zoo/b"), "5:1", "all experts are the same model"),
    (("dtype: float32", "dtype: float23"), "4:1", "did you mean 'float32'"),
    (("dtype: float32", "dtype: float32\nexperts_per_token: 3"), "5:1", "from 1 to the number of experts, 2, not 3"),
    (("dtype: float32", "dtype: float32\nexperts_per_token: true"), "5:1", "not True"),
    (("zoo/c,", "zoo/c, noise_scale: .nan,"), "7:27", "'noise_scale' is a number between 0 and 10000, not nan"),
    (("zoo/c,", "zoo/c+lora,"), "7:6", "mergekit-moe takes whole models"),
    (("base_model: zoo/a", "bas_model: zoo/a"), "2:1", "did you mean 'base_model'"),
    (("experts:", "expert:"), "5:1", "did you mean 'experts'")])
def test_a_mistake_is_told_with_its_place(said, tmp_path, change, where, words):
    with pytest.raises(GlueError) as caught:
        said(HIDDEN.replace(*change))
    assert f"{tmp_path}/moe.yml:{where}: " in str(caught.value) and words in str(caught.value)
    assert str(caught.value).count("\n") < 8


def test_lenient_makes_notes_of_unknown_words(said):
    config = said(HIDDEN + "tokenizer: union\n", lenient=True)
    assert len(config.notes) == 1 and "'tokenizer' is not known here" in config.notes[0]
    with pytest.raises(RecipeError, match="'tokenizer' is not known here"):
        said(HIDDEN + "tokenizer: union\n")


def _mergekit_moe(config, folders, out):
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    text = config.text
    for name, folder in folders.items():
        text = text.replace(name, str(folder))
    build(MoEMergeConfig.model_validate(yaml.safe_load(text)), str(out), MergeOptions(quiet=True), device="cpu")
