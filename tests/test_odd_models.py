"""Architectures that are no Llama: each loads, is compared, merged, adapted, asked and mixed, or refused and why."""

from __future__ import annotations

import json
import random
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from glue.checkpoint import Checkpoint
from glue.cluster.build import Build, differences
from glue.cluster.similarity import similarities
from glue.cluster.sketch import compare_one, sketch
from glue.errors import CheckpointError, GlueError, MethodError, SuiteError
from glue.evaluate.fast import ask, losses
from glue.evaluate.suite import Item, Suite, Task, task_items, write_tasks
from glue.family import families
from glue.kinds import load, weights
from glue.kinds.frame import copy_frame
from glue.kinds.model import Skeleton, assembled
from glue.kinds.size import size
from glue.member import Member
from glue.merge.engine import Result, prepared
from glue.merge.write import write
from glue.merges import merge_file
from glue.mix.parts import Dev, Parts
from glue.mix.site import gates
from glue.orders import Settings
from glue.steps.merge import source_of, sources_of
from glue.steps.mix import joinable, shared

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDE, "num_key_value_heads": 2}
MORE = {"num_experts_per_tok": 2}
ODD = {  # class of its configuration, settings, layers for an adapter
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}, ["q_proj", "up_proj"]),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8, "tie_word_embeddings": True}, ["q_proj", "v_proj"]),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8}, ["q_proj", "o_proj"]),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8}, ["k_proj", "down_proj"]),
    "mistral": ("MistralConfig", GROUPED, ["q_proj", "lm_head"]),
    "phi": ("PhiConfig", WIDE, ["q_proj", "fc1"]),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 0}, ["qkv_proj", "gate_up_proj"]),  # both fused
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_proj"]),  # [in, out], one square
    "neox": ("GPTNeoXConfig", WIDE, ["query_key_value", "dense_h_to_4h"]),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, ["o_proj", "gate_proj"]),
    "mixtral": ("MixtralConfig", {**GROUPED, **MORE, "num_local_experts": 4}, ["q_proj", "v_proj"]),
    "qwen2-moe": ("Qwen2MoeConfig", {**GROUPED, **MORE, "num_experts": 4, "moe_intermediate_size": 24,
                                     "shared_expert_intermediate_size": 16}, ["q_proj", "o_proj"]),
}
EXPERTS = ("mixtral", "qwen2-moe")
TIED = {"qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "llama-tied"}
MIXED = {"model": set(ODD) - {"neox", *EXPERTS}, "text": set(ODD), "block": {"qwen2", "qwen3", "mistral", "llama-tied"},
         "ffn": {"qwen2", "mistral", "llama-tied"}}
ENDS = [2, 5, 17, 30, 31, 32, 33, 40, 41, 50, 60]  # several that end a text, as chat models have them
KINDS = ["snake", "owl", "cat", "red fox", "river", "stone", "of cloth"]
NAMES = [f"{a}{b}" for a in ("Gu", "Ze", "Mo", "La") for b in ("bu", "di", "ra", "lo", "pin")]
merging, routing = families("merging"), families("routing")


def word_pieces(folder: Path):
    """A byte-level tokenizer whose words are often several tokens."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([f"the kind of {name} is {kind}" for name in NAMES for kind in KINDS],
                             trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"],
                                                 show_progress=False,
                                                 initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    word_pieces(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def odd(place):
    """odd("gpt2") is a tiny random model of that architecture; odd("gpt2", 1) is one tuned from it."""
    import transformers

    def config(word: str):
        name, settings, _ = ODD[word]
        return getattr(transformers, name)(**{"vocab_size": 328, "max_position_embeddings": 64, "eos_token_id": 2,
                                              "bos_token_id": 1, "initializer_range": 0.3, **settings})

    def make(word: str, seed: int = 0) -> Member:
        folder = place / f"{word}-{seed}"
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = transformers.AutoModelForCausalLM.from_config(config(word)) if seed == 0 else \
                    transformers.AutoModelForCausalLM.from_pretrained(make(word).path)
                with torch.no_grad():
                    for parameter in model.parameters():
                        spread = 0.02 if seed else 0.1 if parameter.ndim == 1 else 0.0  # norms and biases are at rest
                        parameter.add_(spread * torch.randn_like(parameter))
            model.save_pretrained(folder)
            shutil.copytree(place / "tokenizer", folder, dirs_exist_ok=True)
        return Member(folder.name, "model", str(folder))

    return make


SAME = 1e-5  # kernels of experts sum in an order that goes by where their weights lie
IDS = torch.tensor([[1, 70, 80, 90, 100, 110, 120]])


@torch.no_grad()
def logits(member: Member) -> torch.Tensor:
    return load(member).model(IDS).logits


def merged(folder: Path, method: str, members: list[Member], base: Member | None = None, **params) -> Member:
    write(prepared(merging[method].bind(params), sources_of(members), source_of(base), seed=1), folder)
    copy_frame(base or members[0], folder)
    return Member(folder.name, "model", str(folder))


def edited(member: Member, folder: Path, *, drop: tuple[str, ...] = (), tensors=lambda found: found,
           **changes) -> Member:
    """A copy with other words in its configuration and generation settings, or other tensors."""
    shutil.copytree(member.path, folder)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in {**told, **changes}.items()
                                               if key not in drop}))
    save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return Member(folder.name, "model", str(folder))


# --- every architecture -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("word", ODD)
def test_it_runs_as_transformers_runs_it_and_every_parameter_counts_once(odd, word):
    from transformers import AutoModelForCausalLM

    member = odd(word)
    own = AutoModelForCausalLM.from_pretrained(member.path).eval()
    with torch.no_grad():
        assert (logits(member) - own(IDS).logits).abs().max() < SAME
    assert size(member).whole == sum(parameter.numel() for parameter in own.parameters())
    assert (own.get_output_embeddings().weight is own.get_input_embeddings().weight) == (word in TIED)


@pytest.mark.parametrize("word", ODD)
def test_tuned_copies_are_compared_in_every_matrix_of_attention_and_mlp(odd, word):
    a, b = weights(odd(word)), weights(odd(word, 1))
    apart = ("embed", "wte", "wpe", "lm_head")
    cosines = {}
    for name in a:
        if a[name].ndim > 1 and not any(part in name for part in apart):
            one, other = a[name].double(), b[name].double()
            cosines[name] = torch.nn.functional.cosine_similarity(one, other, dim=0).mean()
    found = similarities([a, b]).cosine
    assert found["all"][0, 1] == pytest.approx(np.mean(list(cosines.values())), abs=1e-6)
    for part, words in (("attention", ("attn", "attention")), ("mlp", ("mlp", "block_sparse_moe"))):
        wanted = [value for name, value in cosines.items() if any(each in name for each in words)]
        assert found[part][0, 1] == pytest.approx(np.mean(wanted), abs=1e-6) and 0.9 < found[part][0, 1] < 1


@pytest.mark.parametrize("word", ODD)
def test_the_average_of_copies_is_the_model_by_every_kind_of_method(odd, word, tmp_path):
    one, other, apart = odd(word), edited(odd(word), tmp_path / "copy"), odd(word, 1)
    settings = {"linear": {}, "ties": {"density": 1.0}, "dare_linear": {"density": 1.0, "weight": 0.5},
                "slerp": {"t": 0.5}}
    for method, params in settings.items():
        base = apart if merging[method].traits["space"] == "delta" else None
        found = weights(merged(tmp_path / method, method, [one, other], base, **params))
        own = weights(one)
        assert set(found) == set(own), method
        assert max(float((found[name] - own[name]).abs().max()) for name in own) < 1e-6, method


@pytest.mark.parametrize("word", ODD)
def test_what_is_merged_loads_and_what_was_tied_stays_tied(odd, word, tmp_path):
    one, other = odd(word), odd(word, 1)
    half = weights(merged(tmp_path / "linear", "linear", [one, other]))
    for name in half:
        assert torch.equal(half[name], ((weights(one)[name].double() + weights(other)[name].double()) / 2).float())
    for method, params in (("dare_ties", {"density": 0.5}), ("ties", {"density": 0.3}), ("slerp", {"t": 0.3})):
        members = [one, other] if method == "slerp" else [odd(word, 2), other]
        base = None if method == "slerp" else one
        running = load(merged(tmp_path / method, method, members, base, **params))
        assert running.model(IDS).logits.isfinite().all()
        head, embedding = running.model.get_output_embeddings().weight, running.model.get_input_embeddings().weight
        assert (head is embedding) == (word in TIED)


@pytest.mark.parametrize("word", ODD)
def test_a_config_of_mergekit_makes_of_it_what_the_step_makes(odd, word, tmp_path):
    one, other = odd(word), odd(word, 1)
    models = "".join(f"  - {{model: {member.path}, parameters: {{weight: 0.5}}}}\n" for member in (one, other))
    (tmp_path / "half.yaml").write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\n")
    merge_file(tmp_path / "half.yaml", tmp_path / "half", Settings())
    half = Member("half", "model", str(tmp_path / "half"))
    assert (logits(half) - logits(merged(tmp_path / "step", "linear", [one, other]))).abs().max() < 1e-5
    head, embedding = load(half).model.get_output_embeddings(), load(half).model.get_input_embeddings()
    assert torch.equal(head.weight, embedding.weight) == (word in TIED)


@pytest.mark.parametrize("word", ODD)
def test_a_search_may_put_one_after_the_other_into_the_same_model(odd, word):
    skeleton = Skeleton()
    for member in (odd(word), odd(word, 1), odd(word)):
        merge = Result(prepared(merging["linear"].bind(), sources_of([member]))).merge
        running = skeleton.filled(member, merge, {name: (member.name, name) for name in merge.headers})
        with torch.no_grad():
            assert (running.model(IDS).logits - logits(member)).abs().max() < SAME


@pytest.mark.parametrize("word", ["gpt2", "gemma3", "neox", "qwen2-moe"])
def test_it_can_be_taught_and_what_was_tied_stays_tied(odd, word, tmp_path):
    from glue.tune.finetune import finetune

    (tmp_path / "train.jsonl").write_text("".join(json.dumps(
        {"question": f"the kind of {name} is", "choices": ["owl", "cat"], "gold": 0, "answer": "owl"}) + "\n"
        for name in NAMES))
    finetune(tmp_path / "taught", base=Path(odd(word).path), data=[(tmp_path, 1.0)], steps=5, learning_rate=1e-2,
             batch_size=8, report=lambda *_: None)
    taught = Member("taught", "model", str(tmp_path / "taught"))
    running = load(taught)
    head, embedding = running.model.get_output_embeddings().weight, running.model.get_input_embeddings().weight
    assert (head is embedding) == (word in TIED)
    items = [Item(f"the kind of {name} is", ("owl", "cat"), 0, "owl") for name in NAMES]
    before, after = (losses(asked, SUITE.tasks[:1], {"kind": items})["kind"].mean()
                     for asked in (load(odd(word)), running))
    assert after < before - 0.3


def test_turned_matrices_are_not_taught_by_an_adapter_and_the_error_says_so(odd, tmp_path):
    from glue.tune.finetune import finetune

    with pytest.raises(GlueError, match="the base has no layer 'c_attn' to adapt"):
        finetune(tmp_path / "taught", base=Path(odd("gpt2").path), data=[], steps=1, learning_rate=1e-2,
                 lora={"r": 2, "alpha": 4, "targets": ["c_attn"]}, report=lambda *_: None)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("word", ODD)
def test_an_adapter_over_it_runs_and_is_seen_as_one_dense_model(odd, word, dora, tmp_path):
    base = odd(word)
    adapter, wanted = adapted(base, tmp_path, target_modules=ODD[word][2], use_dora=dora)
    found = weights(adapter)
    assert found.adapter.transposed == (word == "gpt2") and len(found.adapter.modules) >= 2
    assert (logits(adapter) - wanted).abs().max() < 1e-4
    dense = assembled(base, found)
    with torch.no_grad():
        assert (dense.model(IDS).logits - wanted).abs().max() < 1e-4
    assert (wanted - logits(base)).abs().max() > 0.1  # it changes something


def adapted(base: Member, folder: Path, *, name: str = "lora", seed: int = 3, moved: bool = False,
            **settings) -> tuple[Member, torch.Tensor]:
    """An adapter with random factors, and what the model says with it before anything is merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **settings)).eval()
        with torch.no_grad():
            for parameter in (parameter for parameter in model.parameters() if moved and parameter.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
            wanted = model(IDS).logits
    model.save_pretrained(str(folder / name), save_embedding_layers=False)
    return Member(name, "adapter", str(folder / name), base=base), wanted


SUITE = Suite("small", (Task("kind", "kind", "choice", "acc", 0.25), Task("norm", "kind", "choice", "acc_norm", 0.25),
                        Task("said", "said", "generate", "exact_match", 0.0, max_tokens=5)))


def questions(running) -> dict[str, list[dict]]:
    """kind: choices of several lengths; said: half of the answers are what the model writes."""
    rng = random.Random(0)
    items: dict[str, list[dict]] = {"kind": [], "said": []}
    for name in NAMES:
        question = f"the kind of {name} is"
        for task in items:
            choices = rng.sample(KINDS, 4)
            items[task].append({"question": question, "choices": choices, "gold": 0, "answer": choices[0]})
    for item in items["said"][::2]:
        told = running.tokenizer(item["question"], return_tensors="pt")
        made = running.model.generate(input_ids=told["input_ids"], attention_mask=told["attention_mask"],
                                      do_sample=False, max_new_tokens=5, pad_token_id=running.tokenizer.pad_token_id)
        text = running.tokenizer.decode(made[0, told["input_ids"].shape[1]:], skip_special_tokens=True)
        text = text.split("\n")[0].strip()
        if text.isprintable() and text:
            item |= {"choices": [text, "owl ?"], "answer": text}
    return items


def asked_twice(member: Member, folder: Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(results by the fast scorer, results by lm-eval's harness), task -> items."""
    from glue.evaluate.lm_eval import evaluate

    running, files = load(member), {}
    for name, items in questions(running).items():
        files[name] = folder / name
        files[name].mkdir()
        (files[name] / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    names = write_tasks(SUITE, "test", files, folder / "tasks")
    items = {task.name: task_items(task, files[task.data], "test") for task in SUITE.tasks}
    fast = {name: values.tolist() for name, values in ask(running, SUITE.tasks, items).items()}
    return fast, dict(zip(fast, evaluate(running, folder / "tasks", names).values(), strict=True))


@pytest.mark.parametrize("word", ODD)
def test_the_fast_scorer_and_lm_eval_agree_on_every_item(odd, word, tmp_path):
    fast, slow = asked_twice(odd(word), tmp_path)
    assert fast == slow
    assert 0 < sum(fast["said"]) < len(fast["said"]) and sum(fast["kind"]) > 0


@pytest.mark.parametrize("level", MIXED)
@pytest.mark.parametrize("word", ODD)
def test_a_mixture_of_copies_is_the_model_or_is_refused_with_the_reason(odd, word, level, tmp_path):
    one, other = odd(word), edited(odd(word), tmp_path / "copy")
    if word not in MIXED[level]:
        with pytest.raises(GlueError, match="architecture|are mixed of|names that transformers itself gives"):
            joinable([one, other], level=level)
        return
    assert mixed(one, other, level, tmp_path / "mixture") < 1e-5


def mixed(one: Member, other: Member, level: str, folder: Path, dense: int = 0) -> float:
    """How far a mixture of two copies is from the model."""
    more = {"routing": "token"} if level == "ffn" else {}
    joinable([one, other], level=level, dense_layers=dense, **more)
    trunk = shared([one, other], None) if level in ("block", "ffn") or dense else None
    parts, at = Parts((one, other), trunk, one, dense), import_module(f"glue.mix.levels.{level}")
    dev = Dev([f"the kind of {name} is" for name in NAMES[:4]], torch.eye(2).repeat(2, 1), torch.zeros(4).long())
    at.write(folder, parts, gates(routing["centroid"].bind(), at.sites(parts, dev, **more)), **more)
    running = load(Member("mixture", "mixture", str(folder)))
    answering = running.experts[1] if running.choose else running
    with torch.no_grad():
        return float((answering.model(IDS).logits - logits(one)).abs().max())


# --- heads that are the embedding -------------------------------------------------------------------------------------

def with_head(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embedding once more, as the head, as some programs write it."""
    return {**found, "lm_head.weight": next(found[name].clone() for name in found if "embed" in name or "wte" in name)}


@pytest.mark.parametrize("word, silent", [("llama-tied", False), ("gemma2", True), ("gpt2", True)])
def test_a_tied_head_that_is_stored_once_more_is_merged_as_the_embedding(odd, word, silent, tmp_path):
    drop = ("tie_word_embeddings",) if silent else ()  # Gemma and GPT-2 are tied where nothing is said
    one, other = (edited(odd(word, seed), tmp_path / f"twice-{seed}", drop=drop, tensors=with_head) for seed in (1, 2))
    assert "lm_head.weight" in Checkpoint(one.path).headers and "lm_head.weight" not in weights(one)
    assert size(one) == size(odd(word, 1))
    found = merged(tmp_path / "dare", "dare_ties", [one, other], odd(word), density=0.5)
    known = merged(tmp_path / "known", "dare_ties", [odd(word, 1), odd(word, 2)], odd(word), density=0.5)
    assert torch.equal(logits(found), logits(known))  # as two tensors, each with random numbers, they would part


def test_a_head_of_its_own_stays_one_where_it_only_began_as_the_embedding(odd, tmp_path):
    apart = edited(odd("llama-tied"), tmp_path / "apart", tensors=with_head, tie_word_embeddings=False)
    assert "lm_head.weight" in weights(apart)
    assert torch.equal(logits(apart), logits(odd("llama-tied")))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is in 'apart' and not in 'llama-tied-1'"):
        merged(tmp_path / "none", "linear", [apart, odd("llama-tied", 1)])


@pytest.mark.parametrize("word", ["llama-tied", "gpt2", "qwen2"])
def test_factors_of_a_tied_head_are_refused_where_they_would_change_the_embedding_too(odd, word, tmp_path):
    adapter, _ = adapted(odd(word), tmp_path, target_modules=["lm_head"])
    for use in (load, weights):
        with pytest.raises(CheckpointError, match=r"changes 'lm_head', which its base has in one tensor with its emb"):
            use(adapter)


@pytest.mark.parametrize("word, saved", [("llama-tied", "lm_head"), ("llama-tied", "embed_tokens"), ("gpt2", "wte")])
def test_an_adapter_that_parts_embedding_and_head_runs_and_is_no_dense_model_of_its_base(odd, word, saved, tmp_path):
    adapter, wanted = adapted(odd(word), tmp_path, target_modules=ODD[word][2][:1], modules_to_save=[saved],
                              moved=True)
    assert (logits(adapter) - wanted).abs().max() < 1e-4
    with pytest.raises(CheckpointError, match="its base has embedding and head in one tensor"):
        weights(adapter)


# --- matrices that stand the other way --------------------------------------------------------------------------------

def test_adapters_of_turned_matrices_are_combined_and_stay_turned(odd, tmp_path):
    from glue.kinds.lora import Adapter
    from glue.merge.adapters import Update, combine

    made = [adapted(odd("gpt2"), tmp_path, name=f"lora-{seed}", seed=seed, target_modules=["c_attn", "c_proj"])[0]
            for seed in (3, 4)]
    combine(merging["flora"].bind(), [Update(one.name, Adapter(Path(one.path))) for one in made], tmp_path / "all",
            base=odd("gpt2").path)
    all_of = Member("all", "adapter", str(tmp_path / "all"), base=odd("gpt2"))
    found, (one, other), below = weights(all_of), map(weights, made), weights(odd("gpt2"))
    for name in below:
        assert torch.allclose(found[name] - below[name], (one[name] + other[name]) / 2 - below[name], atol=1e-5), name
    assert torch.allclose(logits(all_of), assembled(odd("gpt2"), found).model(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("word, layer, says", [("gpt2", "c_proj", False), ("llama-tied", "o_proj", True)])
def test_an_adapter_that_is_wrong_about_how_a_square_matrix_stands_is_refused(odd, word, layer, says, tmp_path):
    path = "transformer.h.0.attn.c_proj" if word == "gpt2" else "model.layers.0.self_attn.o_proj"
    adapter, _ = adapted(odd(word), tmp_path, target_modules=[path])  # 32 x 32: no shape tells
    weights(adapter)
    file = Path(adapter.path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": says}))
    with pytest.raises(CheckpointError, match=f"says fan_in_fan_out: {json.dumps(says)}, .* '{path}' of .* does not"):
        weights(adapter)


def test_nothing_is_extracted_from_an_architecture_without_linear_layers(odd, tmp_path):
    from glue.steps import Job, steps
    from glue.workers import Workers

    job = Job("x", tmp_path, 0, Workers(0), tmp_path)
    with pytest.raises(MethodError, match="'gpt2-0' has no linear layers that a LoRA could change"):
        steps["extract"].bind({"model": "a", "base": "b", "rank": 2}).method.call(
            job, model=odd("gpt2", 1), base=odd("gpt2"), rank=2)


# --- experts, heads, ends, tokens -------------------------------------------------------------------------------------

@pytest.mark.parametrize("word", EXPERTS)
def test_experts_in_one_tensor_are_compared_as_one_matrix(odd, word, tmp_path):
    """As files of newer programs have them."""
    sources = []
    for seed in (0, 1):
        model = load(odd(word, seed)).model
        sources.append(edited(odd(word, seed), tmp_path / f"{seed}", tensors=lambda _, model=model: {
            name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    a, b = map(weights, sources)
    stacked = [name for name in a if a[name].ndim == 3]
    assert len(stacked) == 4
    found = similarities([a, b]).cosine["mlp"][0, 1]
    wanted = [torch.nn.functional.cosine_similarity(a[name].double().flatten(0, -2), b[name].double().flatten(0, -2),
                                                    dim=0).mean() for name in a if "mlp" in name and a[name].ndim > 1]
    assert found == pytest.approx(np.mean(wanted), abs=1e-6)
    estimate, error = compare_one(sketch(a), [sketch(b)], part="mlp")
    assert abs(float(estimate[0]) - found) <= 5 * float(error[0]) + 1e-6


def test_a_kept_sketch_that_lacks_matrices_is_made_anew(odd, tmp_path, monkeypatch):
    from glue.cluster.sketch import Sketch
    from glue.steps.cluster import sketched

    file = tmp_path / "kept.safetensors"
    with monkeypatch.context() as before:  # as a version that knew no other words has left it
        before.setattr("glue.cluster.similarity.PARTS", {"all": ("self_attn", "mlp")})
        sketched(odd("gpt2"), file)
    assert len(Sketch.load(file).matrices) == 4
    sketched(odd("gpt2"), file)
    assert len(Sketch.load(file).matrices) == 8


def test_models_with_other_heads_are_kept_apart_in_the_words_of_gpt2():
    one, other = ({"model_type": "gpt2", "n_head": heads, "activation_function": "gelu_new"} for heads in (4, 8))
    assert differences(Build(one, {}), Build(other, {}))[0] == "different heads (4 and 8)"


@pytest.mark.parametrize("word", ["gpt2", "gemma3", "phi3"])
def test_each_of_several_ends_of_text_ends_it_for_both_scorers(odd, word, tmp_path):
    fast, slow = asked_twice(edited(odd(word), tmp_path / "ends", eos_token_id=ENDS), tmp_path)
    assert fast == slow and sum(fast["said"]) > 0


@pytest.mark.parametrize("word", ["qwen3", "gpt2"])
def test_a_model_that_names_no_end_of_text_ends_with_that_of_its_tokenizer(odd, word, tmp_path):
    endless = edited(odd(word), tmp_path / "endless", eos_token_id=None)
    assert load(endless).model.generation_config.eos_token_id == 2
    fast, slow = asked_twice(endless, tmp_path)
    assert fast == slow


@pytest.mark.parametrize("word", ["qwen3", "neox", "gpt2"])
def test_a_tokenizer_without_a_start_of_text_is_asked_alike_by_both(odd, word, tmp_path):
    plain = edited(odd(word), tmp_path / "plain")
    for name, key in (("tokenizer_config.json", "bos_token"), ("tokenizer.json", "post_processor")):
        file = tmp_path / "plain" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), key: None}))
    assert load(plain).tokenizer("owl")["input_ids"][:1] != [1]
    fast, slow = asked_twice(plain, tmp_path)
    assert fast == slow
    item = Item("", ("owl", "cat"), 0, "owl")
    with pytest.raises(SuiteError, match="'' has no token"):
        ask(load(plain), SUITE.tasks[:1], {"kind": [item]})


def test_a_model_that_always_gives_all_logits_is_asked_alike(odd):
    items = {task: [Item(line["question"], tuple(line["choices"]), 0, line["answer"]) for line in questions(
        load(odd("phi")))[SUITE.tasks[k].data]] for k, task in ((0, "kind"), (2, "said"))}
    tasks, plain = (SUITE.tasks[0], SUITE.tasks[2]), load(odd("phi"))
    known, whole = ask(plain, tasks, items), plain.model.forward

    def forward(input_ids, past_key_values=None, use_cache=None):
        found = whole(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        assert found.logits.shape[1] == input_ids.shape[1]
        return found

    plain.model.forward = forward
    found = ask(plain, tasks, items)
    assert all(np.array_equal(found[name], known[name]) for name in known) and sum(known["said"]) > 0


# --- layers in common -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("word", ["qwen2", "qwen3"])
def test_a_trunk_of_layers_that_have_types_is_shared(odd, word, tmp_path):
    assert mixed(odd(word), edited(odd(word), tmp_path / "copy"), "model", tmp_path / "mixture", dense=1) < 1e-5


@pytest.fixture
def one_mlp(place, tmp_path):
    """one_mlp("name", seed, expanded) writes a Llama all layers of which have one MLP, as MobiLlama does it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(name: str, seed: int, *, expanded: bool) -> Member:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 3}, vocab_size=320,
                                                 max_position_embeddings=64, initializer_range=0.3))
        for layer in model.model.layers:
            layer.mlp = model.model.layers[0].mlp
        folder = tmp_path / name
        shutil.copytree(place / "tokenizer", folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        if expanded:
            save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / "model.safetensors",
                      metadata={"format": "pt"})
        else:
            save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return Member(name, "model", str(folder))

    return make


def test_an_mlp_that_is_stored_once_for_all_layers_is_refused_with_the_reason(one_mlp):
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.\w+.weight' stands there once for several layers"):
        load(one_mlp("once", 0, expanded=False))


def test_stored_once_it_is_compared_and_merged_once(one_mlp, tmp_path):
    one, other = (one_mlp(f"once-{seed}", seed, expanded=False) for seed in (0, 1))
    found = weights(merged(tmp_path / "half", "linear", [one, other]))
    assert sum("mlp" in name for name in found) == 3
    assert sum("mlp" in name for name in weights(one)) == 3 and set(found) == set(weights(one))
    wide, wider = (one_mlp(f"wide-{seed}", seed, expanded=True) for seed in (0, 1))
    once, every = (similarities([weights(a), weights(b)]).cosine for a, b in ((one, other), (wide, wider)))
    assert once["mlp"][0, 1] == pytest.approx(every["mlp"][0, 1], abs=1e-7)
    every_half = weights(merged(tmp_path / "wide-half", "linear", [wide, wider]))
    assert all(torch.equal(found[name], every_half[name]) for name in found)


def test_written_for_each_layer_it_is_a_llama_and_what_draws_nothing_keeps_it_in_common(one_mlp, tmp_path):
    one, other = (one_mlp(f"wide-{seed}", seed, expanded=True) for seed in (0, 1))
    assert logits(one).isfinite().all()

    def in_common(member: Member) -> bool:
        found = weights(member)
        assert logits(member).isfinite().all()
        return all(torch.equal(found[name], found[name.replace("layers.0", f"layers.{k}")])
                   for name in found if "layers.0.mlp" in name for k in (1, 2))

    assert in_common(merged(tmp_path / "ties", "ties", [other], one, density=0.5))
    assert in_common(merged(tmp_path / "slerp", "slerp", [one, other], t=0.4))
    assert not in_common(merged(tmp_path / "dare", "dare_linear", [other], one, density=0.5))  # now a plain Llama


def test_one_lost_tensor_is_not_taken_for_a_shared_layer(odd, tmp_path):
    torn = edited(odd("mistral"), tmp_path / "torn", tensors=lambda found: {
        name: tensor for name, tensor in found.items() if name != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(CheckpointError, match="1 tensors that its configuration asks for are missing"):
        load(torn)
