"""Configs that go through mergekit: what comes out is what mergekit-yaml leaves, and the same at every run."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError, MethodError
from glue.kinds.card import Card, Source
from glue.kinds.furnish import furnish
from glue.merge.mergekit.peer import run_through_mergekit

UNION = """
merge_method: linear
models:
  - {model: zoo/a, parameters: {weight: 0.25}}
  - {model: zoo/b@main, parameters: {weight: 0.75, normalize: yes}}
tokenizer: {source: union, tokens: {extra1: {source: zoo/b@main}}}
dtype: float32
"""
OTHER = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, 20)},
         **{f"extra{k}": 20 + k for k in range(9)}}


@pytest.fixture
def two(tiny, tmp_path):
    """Two models with tokens of their own, under the names that UNION gives them."""
    return {"zoo/a": tiny("a", seed=1).folder, "zoo/b@main": tiny("b", seed=2, words=OTHER).folder}


def test_a_union_of_tokenizers_is_what_mergekit_makes_of_it(two, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_through_mergekit(UNION, ours, models=two, seed=3)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    told = UNION.replace("zoo/a", str(two["zoo/a"])).replace("zoo/b@main", str(two["zoo/b@main"]))
    _mergekit_yaml(told, theirs)
    made, peer = Checkpoint(ours), Checkpoint(theirs)
    assert set(made) == set(peer)
    tokens, peers = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (ours, theirs))
    assert set(tokens) == set(peers) and len(tokens) == 40 + 9  # the words of both
    rows = [peers[token] for token in sorted(tokens, key=tokens.get)]  # mergekit numbers new tokens by chance
    for name in made:
        other = peer[name][rows] if name in ("model.embed_tokens.weight", "lm_head.weight") else peer[name]
        assert torch.equal(made[name], other), name

    furnish(ours, two["zoo/a"], Card("union", "linear", (Source("a"), Source("b")), UNION), chat_template="chatml",
            keep=("config", "tokenizer"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ours), AutoTokenizer.from_pretrained(ours)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0] == 49
    assert tokenizer("w3 extra4").input_ids == [1, 3, tokens["extra4"]] and "im_start" in tokenizer.chat_template
    assert model(torch.tensor([[1, 3, tokens["extra4"]]])).logits.isfinite().all()


def test_new_tokens_have_the_same_numbers_and_weights_the_same_bits_in_every_process(two, tmp_path):
    text = UNION.replace("linear", "dare_linear").replace("0.75", "0.75, density: 0.5") + "base_model: zoo/a\n"
    (tmp_path / "config.yml").write_text(text)
    code = ("import sys; from pathlib import Path; from glue.merge.mergekit.peer import run_through_mergekit\n"
            "config, out, a, b = map(Path, sys.argv[1:])\n"
            "run_through_mergekit(config.read_text(), out, models={'zoo/a': a, 'zoo/b@main': b}, seed=5)")
    here, there = tmp_path / "here", tmp_path / "there"
    subprocess.run([sys.executable, "-c", code, tmp_path / "config.yml", there, *two.values()], check=True,
                   env={**os.environ, "PYTHONHASHSEED": "1"})
    for k in range(3):
        shutil.rmtree(here, ignore_errors=True)
        run_through_mergekit(text, here, models=two, seed=5 + (k == 2))
        same = [(here / name).read_bytes() == (there / name).read_bytes()
                for name in ("model.safetensors", "tokenizer.json")]
        assert same == [k < 2, True]


@pytest.mark.parametrize("first,second", [("zoo/a", "zoo/b@main"), ("zoo/b@main", "zoo/a")])
def test_without_a_base_the_first_model_says_what_the_result_is(two, tmp_path, first, second):
    from transformers import AutoTokenizer

    for name, folder in two.items():
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, "initializer_range": len(name) / 100}))
    text = UNION.replace("zoo/a,", "FIRST,").replace("zoo/b@main,", f"{second},").replace("FIRST", first)
    warned = run_through_mergekit(text, tmp_path / "out", models={name: two[name] for name in (first, second)})
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    own = AutoTokenizer.from_pretrained(two[first]).get_vocab()
    assert {token: vocabulary[token] for token in own} == own and warned == ()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["initializer_range"] == len(first) / 100


def test_files_follow_the_umask_and_no_card_is_written(two, tmp_path):
    run_through_mergekit(UNION, tmp_path / "out", models=two, out_dtype="bfloat16", shard_size=6000)
    files = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert set(files.values()) == {oct(0o666 & ~mask)}
    assert "README.md" not in files and "model.safetensors.index.json" in files
    assert not [name for name in files if name.startswith(".")]
    assert {header.dtype for header in Checkpoint(tmp_path / "out").headers.values()} == {torch.bfloat16}


def test_an_adapter_is_merged_into_its_model_first(tiny, two, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(two["zoo/a"])
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    text = ("merge_method: passthrough\nmodels: [{model: zoo/a+my/lora@v1}]\ntokenizer: {source: base}\n"
            "dtype: float32\n")
    run_through_mergekit(text, tmp_path / "out", models={"zoo/a": two["zoo/a"], "my/lora@v1": tmp_path / "lora"})
    whole = model.merge_and_unload().state_dict()
    made = Checkpoint(tmp_path / "out")
    assert max(float((made[name] - whole[name]).abs().max()) for name in made) <= 1e-6
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((made[name] - Checkpoint(two["zoo/a"])[name]).abs().max()) > 0.01


@pytest.mark.parametrize("change,said", [
    (("linear", "linaer"), "linaer"),
    (("zoo/a,", "zoo/c,"), "no folder is known for 'zoo/c'; did you mean 'zoo/a'"),
    (("weight: 0.75", "weight: [{}]"), "mergekit could not do it"),
    (("dtype: float32", "dtype: float7"), "float7")])
def test_what_mergekit_refuses_is_one_short_error(two, tmp_path, change, said):
    with pytest.raises(MethodError, match=said) as caught:
        run_through_mergekit(UNION.replace(*change), tmp_path / "out", models=two)
    assert str(caught.value).count("\n") <= 1
    assert not any(type(handler).__name__ == "Said" for handler in logging.getLogger().handlers)


def test_a_member_without_a_tokenizer_is_not_taken_to_have_the_base_models(two, tmp_path):
    """mergekit logs an error there and goes on as if the words were the same."""
    for file in two["zoo/b@main"].glob("token*"):
        file.unlink()
    text = UNION.replace(", tokens: {extra1: {source: zoo/b@main}}", "")
    with pytest.raises(MethodError, match="mergekit could not do it"):
        run_through_mergekit(text, tmp_path / "out", models=two)


def test_damaged_weights_are_told_before_any_work(two, tmp_path):
    broken = two["zoo/b@main"] / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is damaged or not safetensors"):
        run_through_mergekit(UNION, tmp_path / "out", models=two)
    assert not (tmp_path / "out").exists()


def _mergekit_yaml(text, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out),
              MergeOptions(quiet=True, write_model_card=False, random_seed=3))
