"""Mixtures by text: the text of a question chooses a member, and that member answers as it answers alone."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError, MethodError, ZooError
from glue.evaluate.fast import ask
from glue.evaluate.lm_eval import as_lm, document_texts, evaluate
from glue.evaluate.suite import Item, Suite, Task, task_items, write_tasks
from glue.family import families
from glue.identity import identify
from glue.kinds import Place, Running, load
from glue.kinds.features import DEFINITION, text_features
from glue.kinds.text import continued, losses
from glue.member import Member
from glue.mix.levels import text as level
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, LossGate, gates

H = DEFINITION["width"]
ROUTERS = families("routing")
PROMPTS = ["sort : d b a c =", "the pet of Zoë is", "7 + 5 =", "a red fox", "sort : x q =",
           "what is the colour of Mo ?", "one two three", "b a"]
CHOICES = [" a snake", " cloth", " b", " twelve of them"]


def a_tokenizer(size: int, *, bos: bool = False, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Byte pairs learnt from the prompts; with a start of text in front, or without any such token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator([*PROMPTS, *CHOICES] * 4, trainers.BpeTrainer(
        vocab_size=size, special_tokens=[eos, "<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, **({"bos_token": "<s>"} if bos else {}))


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> tuple[Member, ...]:
    """A Llama, a GPT-2 and a Qwen2, each with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("experts")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
    made_of = {
        "llama": (LlamaForCausalLM, LlamaConfig, a_tokenizer(300, bos=True), shape),
        "gpt2": (GPT2LMHeadModel, GPT2Config, a_tokenizer(280),
                 {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 48, "initializer_range": 0.3}),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config, a_tokenizer(320, eos="<|endoftext|>"),
                  {**shape, "tie_word_embeddings": True})}
    for seed, (name, (model, config, tokenizer, more)) in enumerate(made_of.items()):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made_model = model(config(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=0,
                                      pad_token_id=0, **more))
        made_model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return tuple(Member(name, "model", str(folder / name)) for name in made_of)


def parts_of(experts) -> Parts:
    return Parts(tuple(experts), None, experts[0])


def always(i: int, e: int = 3) -> Gate:
    """The gate that sends every text to expert i."""
    return Gate(torch.zeros(e, H), torch.nn.functional.one_hot(torch.tensor(i), e).float(), torch.zeros(H),
                torch.ones(H))


def scattered(e: int = 3) -> Gate:
    """A gate whose choices differ between texts."""
    rng = torch.Generator().manual_seed(2)
    return Gate(torch.randn(e, H, generator=rng), torch.zeros(e), torch.zeros(H), torch.ones(H))


def built(folder: Path, experts, gate: Gate | LossGate) -> Member:
    level.write(folder, parts_of(experts), [gate])
    return Member(folder.name, "mixture", str(folder))


@pytest.fixture(scope="module")
def mixed(experts, tmp_path_factory) -> Member:
    return built(tmp_path_factory.mktemp("mixed") / "mixture", experts, scattered())


def asked(contexts=PROMPTS, choices=CHOICES, **more) -> list[Instance]:
    """Requests of a task with one document for each context."""
    return [Instance("loglikelihood", {}, (context, choice), k, metadata=("task", doc, 1), **more)
            for doc, context in enumerate(contexts) for k, choice in enumerate(choices)]


def heard(running: Running, requests: list[Instance], **more) -> list[tuple[float, bool]]:
    return as_lm(running, **more).loglikelihood(requests, disable_tqdm=True)


# answers

def test_every_expert_can_be_had_bit_for_bit(experts, tmp_path):
    for i, expert in enumerate(experts):
        running, alone = load(built(tmp_path / str(i), experts, always(i))), load(expert)
        assert heard(running, asked()) == heard(alone, asked())
        assert [continued(running, prompt, 8) for prompt in PROMPTS] == [continued(alone, prompt, 8)
                                                                         for prompt in PROMPTS]
        made_alone, made_here = alone.model.state_dict(), running.experts[i].model.state_dict()
        assert all(torch.equal(made_alone[name], made_here[name]) for name in made_alone)


def test_prompts_of_one_batch_are_answered_as_each_is_alone(mixed, experts):
    running, alone = load(mixed), [load(expert) for expert in experts]
    routes = running.choose(PROMPTS)
    assert len(set(routes)) == 3, "a test of mixed routes needs some"
    together = heard(running, asked())
    single = [found for prompt in PROMPTS for found in heard(running, asked([prompt]))]
    assert max(abs(one[0] - other[0]) for one, other in zip(together, single, strict=True)) <= 1e-5
    assert [one[1] for one in together] == [other[1] for other in single]
    assert [running.choose([prompt])[0] for prompt in PROMPTS] == routes
    for prompt, route in zip(PROMPTS, routes, strict=True):
        assert continued(running, prompt, 6) == continued(alone[route], prompt, 6)


def test_a_mixture_of_copies_is_the_model_itself(experts, tmp_path):
    same = (experts[1],) * 3
    for name, gate in (("features", scattered()), ("loss", LossGate())):
        running = load(built(tmp_path / name, same, gate))
        assert running.experts.members[2].name == f"{name}/gpt2-3"
        alone = heard(load(experts[1]), asked())
        found = heard(running, asked())
        assert max(abs(one[0] - other[0]) for one, other in zip(found, alone, strict=True)) <= 1e-5
        assert continued(running, PROMPTS[0], 6) == continued(load(experts[1]), PROMPTS[0], 6)


def test_all_requests_of_a_document_go_to_one_expert(mixed):
    running = load(mixed)
    fills = [Instance("loglikelihood", {}, (f"Mo ? {name}", " is right"), k, metadata=("fill", 0, 1))
             for k, name in enumerate(["sort", "a red fox", "7 + 5", "one two three", "b a"])]
    assert len(set(running.choose([request.args[0] for request in fills]))) > 1, "alone they would be torn apart"
    without = Instance("loglikelihood", {}, ("", " is right"), 5, metadata=("fill", 0, 1))
    assert document_texts([*fills, without]) == ["Mo ? "] * 6
    route, = running.choose(["Mo ? "])
    expected = heard(running.experts[route], [*fills, without])
    assert heard(running, [*fills, without]) == expected


def test_requests_that_belong_to_no_document_choose_for_themselves():
    some = [Instance("loglikelihood", {}, (text, " x"), 0) for text in ("sort : b", "sort : c")]
    assert document_texts(some) == ["sort : b", "sort : c"]


def test_a_whole_text_has_no_context_that_could_choose(mixed):
    running = load(mixed)
    route, = running.choose([""])
    some = [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", k, 1)) for k, text in enumerate(PROMPTS)]
    assert as_lm(running).loglikelihood_rolling(some, disable_tqdm=True) == \
        as_lm(running.experts[route]).loglikelihood_rolling(some, disable_tqdm=True)


def test_one_answer_loads_one_expert(mixed):
    running = load(mixed)
    route, = running.choose(PROMPTS[:1])
    continued(running, PROMPTS[0], 2)
    assert list(running.experts._loaded) == [route]
    assert running.answering(PROMPTS[0]) is running.experts[route]
    assert running.experts[route].answering(PROMPTS[0]) is running.experts[route], "any other member answers itself"
    assert running.experts[-1] is running.experts[2] and [one.member.short for one in running.experts[1:]] == [
        "gpt2", "qwen2"]
    with pytest.raises(IndexError):
        running.experts[3]


def test_experts_run_where_and_as_the_mixture_is_told(mixed, tmp_path):
    running = Place("auto", "bfloat16", 5, tmp_path).load(mixed)
    for expert in running.experts:
        assert {each.dtype for each in expert.model.parameters()} == {torch.bfloat16}
        assert expert.room is running.room and expert.room.size == 5
    running.experts[1].room.halve()
    assert Place("auto", "bfloat16", "auto", tmp_path).load(mixed).experts[2].room.halved == 1


def test_nobody_takes_one_expert_for_the_whole(mixed):
    running = load(mixed)
    with pytest.raises(ZooError, match="'mixture' is a mixture by text: it has no one model .* 'generate'"):
        running.model.generate()


def test_an_adapter_can_be_an_expert(experts, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(load(experts[0]).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
                   ).save_pretrained(tmp_path / "lora")
    adapted = Member("lora", "adapter", str(tmp_path / "lora"), base=experts[0])
    running = load(built(tmp_path / "mixture", (experts[1], adapted), always(1, 2)))
    found, alone = heard(running, asked()), heard(load(adapted), asked())
    assert max(abs(one[0] - other[0]) for one, other in zip(found, alone, strict=True)) <= 1e-4
    assert found != heard(load(experts[0]), asked())


# the suite

SMALL = Suite("small", (Task("kind", "kind", "choice", "acc", 0.25), Task("norm", "kind", "choice", "acc_norm", 0.25),
                        Task("said", "said", "generate", "exact_match", 0.0, max_tokens=4)))


def test_the_fast_scorer_and_lm_eval_agree_on_every_item(mixed, experts, tmp_path):
    running, alone, data = load(mixed), [load(expert) for expert in experts], {}
    said = [continued(alone[i], prompt, 4).split("\n")[0].strip()
            for prompt, i in zip(PROMPTS, running.choose(PROMPTS), strict=True)]
    words = [choice.strip() for choice in CHOICES]
    lines = {"kind": [{"question": prompt, "choices": words, "gold": k % 4, "answer": words[k % 4]}
                      for k, prompt in enumerate(PROMPTS)],
             "said": [{"question": prompt, "choices": [], "gold": 0, "answer": said[k] if k % 2 and said[k] else "z"}
                      for k, prompt in enumerate(PROMPTS)]}
    for name, some in lines.items():
        data[name] = tmp_path / name
        data[name].mkdir()
        (data[name] / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    names = write_tasks(SMALL, "test", data, tmp_path / "tasks")
    items = {task.name: task_items(task, data[task.data], "test") for task in SMALL.tasks}
    fast = ask(running, SMALL.tasks, items)
    theirs = evaluate(running, tmp_path / "tasks", names)
    assert {task.name: theirs[name] for task, name in zip(SMALL.tasks, names, strict=True)} == {
        name: values.tolist() for name, values in fast.items()}
    assert 0 < sum(fast["kind"]) < 8 and 0 < sum(fast["said"]) < 8
    scores = [ask(one, SMALL.tasks, items) for one in alone]
    for task in SMALL.tasks:
        chosen = running.choose([item.question for item in items[task.name]])
        assert fast[task.name].tolist() == [scores[i][task.name][k] for k, i in enumerate(chosen)]


def test_asking_any_other_member_is_preparing_and_scoring(experts):
    from glue.evaluate.fast import prepare, score

    task = Task("kind", "d", "choice", "acc", 0.5)
    items = {"kind": [Item(prompt, ("a snake", "cloth"), 0, "a snake") for prompt in PROMPTS]}
    running = load(experts[0])
    assert ask(running, [task], items)["kind"].tolist() == score(
        running, prepare(running.tokenizer, [task], items))["kind"].tolist()


# the folder

def test_a_mixture_that_was_moved_is_the_same_to_the_bit(mixed, experts, tmp_path):
    before, identity = heard(load(mixed), asked()), identify(mixed.folder)
    moved = tmp_path / "elsewhere"
    shutil.copytree(mixed.folder, moved)
    assert not [file for file in moved.rglob("*") if file.is_symlink()]
    assert heard(load(Member("moved", "mixture", str(moved))), asked()) == before
    assert identify(moved) == identity
    text = "".join(file.read_text() for file in moved.rglob("*.json"))
    assert not [expert.path for expert in experts if expert.path in text], "nothing points to where experts came from"


def test_the_same_parts_give_the_same_digest_whatever_the_shards(experts, tmp_path):
    digests = [level.write(tmp_path / name, parts_of(experts), [scattered()], shard_size=size)
               for name, size in (("whole", 10 ** 9), ("parts", 20_000))]
    assert digests[0] == digests[1] and len(list((tmp_path / "parts").rglob("model-*.safetensors"))) > 3
    assert heard(load(Member("m", "mixture", str(tmp_path / "parts"))), asked(PROMPTS[:2])) == heard(
        load(Member("m", "mixture", str(tmp_path / "whole"))), asked(PROMPTS[:2]))


def test_an_expert_is_an_ordinary_folder(mixed, experts):
    plain = AutoModelForCausalLM.from_pretrained(mixed.folder / "experts/qwen2")
    ids = AutoTokenizer.from_pretrained(mixed.folder / "experts/qwen2")(PROMPTS[1], return_tensors="pt")["input_ids"]
    assert torch.equal(plain(ids).logits, load(experts[2]).model(ids).logits)
    assert not list(mixed.folder.rglob("*.py"))


@pytest.mark.parametrize("change", ["gate", "weights", "tokenizer", "order"])
def test_the_digest_covers_the_gate_and_all_of_every_expert(mixed, tmp_path, change):
    folder, known = tmp_path / "changed", tmp_path / "digests.json"
    shutil.copytree(mixed.folder, folder)
    before = identify(folder, known)
    file = {"gate": "model.safetensors", "weights": "experts/gpt2/model.safetensors",
            "tokenizer": "experts/gpt2/tokenizer.json", "order": "config.json"}[change]
    if file.endswith(".safetensors"):
        tensors = load_file(folder / file)
        first = sorted(tensors)[0]
        tensors[first] = tensors[first] + 1
        save_file(tensors, folder / file, metadata={"format": "pt"})
    else:
        told = json.loads((folder / file).read_text())
        if change == "order":
            told["experts"].reverse()
        else:
            told["model"]["merges"].pop()
        (folder / file).write_text(json.dumps(told))
    after = identify(folder, known)
    assert after[1] != before[1] and (after[0] != before[0]) == (change in ("gate", "weights"))


def test_code_beside_a_member_is_left_behind(experts, tmp_path):
    source = tmp_path / "with-code"
    shutil.copytree(experts[0].folder, source)
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**told, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (source / "evil.py").write_text("raise SystemExit")
    member = built(tmp_path / "mixture", (Member("with-code", "model", str(source)), experts[1]), always(0, 2))
    assert not list(member.folder.rglob("*.py")) and "auto_map" not in (
        member.folder / "experts/with-code/config.json").read_text()
    assert heard(load(member), asked(PROMPTS[:2])) == heard(load(experts[0]), asked(PROMPTS[:2]))


@pytest.mark.parametrize("name", ["../../llama", "/etc", "a/b", "..", ".hidden", "", 3, None, "a\\b", "a\n"])
def test_a_name_that_could_lead_out_of_the_folder_is_refused(mixed, tmp_path, name):
    shutil.copytree(mixed.folder, tmp_path / "m")
    told = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**told, "experts": ["llama", name]}))
    with pytest.raises(CheckpointError, match="which cannot be a folder below experts/"):
        load(Member("m", "mixture", str(tmp_path / "m")))


@pytest.mark.parametrize("change, said", [
    ({"experts": []}, "does not list the experts"), ({"experts": "llama"}, "does not list the experts"),
    ({"experts": ["gpt2", "gpt2", "llama"]}, "each once"), ({"experts": ["llama", "gpt2"]}, "2 experts ask for"),
    ({"router": "pickle"}, "the router 'pickle'; known are features, loss"), ({"router": ["loss"]}, "the router"),
    ({"features": {"version": 2, "width": H}}, "was made for the text features"), ({"features": None}, "features None"),
    ({"experts": ["llama", "gpt2", "other"]}, "'m: other' has no config.json")])
def test_a_configuration_that_is_not_as_it_was_written_is_refused(mixed, tmp_path, change, said):
    shutil.copytree(mixed.folder, tmp_path / "m")
    told = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**told, **change}))
    with pytest.raises((CheckpointError, ZooError)) as wrong:
        load(Member("m", "mixture", str(tmp_path / "m")))
    assert said in str(wrong.value)


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("place", ["model.safetensors", "pytorch_model.bin", "experts/gpt2/model.safetensors",
                                   "experts/gpt2/pytorch_model.bin"])
def test_a_pickle_is_never_read(mixed, tmp_path, place):
    shutil.copytree(mixed.folder, tmp_path / "m")
    file = tmp_path / "m" / place
    file.with_name("model.safetensors").unlink()
    file.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="pickled|not safetensors"):
        load(Member("m", "mixture", str(tmp_path / "m")))
    with pytest.raises(CheckpointError, match="pickled|not safetensors"):
        identify(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, said", [
    ({"router.outer.bias": torch.zeros(2)}, "its gate has"), ({"router.more": torch.zeros(2)}, "its gate has"),
    ({"router.outer.bias": torch.tensor([0.0, torch.nan, 1])}, "holds NaN"),
    ({"router.scale": torch.zeros(H)}, "a scale that is not above 0"),
    ({"router.inner.bias": torch.zeros(4)}, "its gate has")])
def test_a_gate_that_does_not_fit_is_refused(mixed, tmp_path, change, said):
    shutil.copytree(mixed.folder, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    save_file({**load_file(file), **change}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        load(Member("m", "mixture", str(tmp_path / "m")))


# refusals

def test_layers_in_common_are_refused(experts, tmp_path):
    with pytest.raises(MethodError, match="dense_layers: 2 would give the experts 2 layers in common"):
        level.refuse(experts, 2)
    with pytest.raises(MethodError, match="dense_layers: 1"):
        level.write(tmp_path / "out", replace(parts_of(experts), dense=1), [always(0)])
    assert not (tmp_path / "out").exists()


def test_a_member_without_a_tokenizer_is_refused(experts, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(experts[0].folder, bare)
    some = (experts[1], Member("bare", "model", str(bare)))
    (bare / "tokenizer.json").write_text("{")
    level.refuse(some, 0)
    with pytest.raises(ZooError, match="'bare' has no tokenizer that can be loaded"):
        level.write(tmp_path / "out", parts_of(some), [always(0, 2)])
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ZooError, match="'bare' has no tokenizer in "):
        level.refuse(some, 0)
    assert not (tmp_path / "out").exists()


def test_a_member_that_does_not_continue_text_is_refused(experts, tmp_path):
    told = tmp_path / "t5"
    shutil.copytree(experts[0].folder, told)
    (told / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(MethodError, match="'t5' is a t5, which does not continue text"):
        level.refuse((experts[0], Member("t5", "model", str(told))), 0)
    with pytest.raises(ZooError, match="it has no weights"):
        level.refuse((experts[0], Member("data", "dataset", str(experts[0].folder))), 0)


@pytest.mark.parametrize("gate, said", [
    (replace(always(0), top_k=2), "2 experts would answer one question together"), (always(0, 2), "for 2 experts"),
    (Gate(torch.zeros(3, 32), torch.zeros(3), torch.zeros(32), torch.ones(32)), "judges 32 features")],
    ids=["several answer", "other experts", "hidden states"])
def test_a_gate_for_another_place_is_refused_before_anything_is_written(experts, tmp_path, gate, said):
    with pytest.raises(MethodError, match=said):
        level.write(tmp_path / "out", parts_of(experts), [gate])
    assert not (tmp_path / "out").exists()


# routers

TEXTS = [f"sort : {a} {b} =" for a in "abcdef" for b in "pqr"] + [f"the pet of {name} is" for name in (
    "Mo", "Zu", "Gubu", "Zedi", "La", "Be", "Zoë", "Tom", "Ann", "Kim", "Ole", "Pia", "Uwe", "Eva", "Max", "Ida", "Jan",
    "Lea")]


@pytest.mark.parametrize("router", ["linear", "mlp", "centroid", "prompt"])
def test_a_router_learns_texts_and_serves_what_it_learnt(experts, tmp_path, router):
    wins = torch.tensor([[0.0, 1.0, 0.0]] * 18 + [[1.0, 0.0, 0.0]] * 18)
    site, = level.sites(parts_of(experts), Dev(TEXTS, wins, torch.arange(36) // 18))
    gate, = gates(ROUTERS.choose(router), [site])
    running = load(built(tmp_path / "m", experts, gate))
    assert running.choose(TEXTS) == gate.logits(site.hidden).argmax(1).tolist() == [1] * 18 + [0] * 18
    assert running.choose(["sort : z y x =", "the pet of Bo is"]) == [1, 0]


def test_the_loss_router_asks_who_knows_the_text_best(experts, tmp_path):
    dev = Dev(TEXTS[:2], torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    gate, = gates(ROUTERS.choose("loss"), level.sites(parts_of(experts), dev))
    running = load(built(tmp_path / "m", experts, gate))
    assert not (tmp_path / "m/model.safetensors").exists()
    found = torch.stack([losses(load(expert), PROMPTS) for expert in experts], 1)
    assert running.choose(PROMPTS) == found.argmin(1).tolist() and len(set(running.choose(PROMPTS))) > 1
    assert continued(running, PROMPTS[2], 5) == continued(load(experts[int(found[2].argmin())]), PROMPTS[2], 5)
    assert identify(tmp_path / "m")[1] != identify(experts[0].folder)[1]


def test_the_loss_of_a_text_is_what_lm_eval_finds_over_its_bytes(experts):
    some = [Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", k, 1)) for k, text in enumerate(PROMPTS)]
    for expert in experts[1:]:  # in front of a text that has a start, lm-eval puts another
        theirs = as_lm(load(expert)).loglikelihood_rolling(some, disable_tqdm=True)
        ours = losses(load(expert), PROMPTS).tolist()
        assert max(abs(one + other / len(text.encode())) for one, other, text in zip(
            ours, theirs, PROMPTS, strict=True)) <= 1e-5


def test_the_loss_of_a_text_is_that_of_its_tokens_in_double_precision(experts):
    running = load(experts[2])
    found = losses(running, [*PROMPTS, ""])
    model = running.model.double()
    for text, loss in zip(PROMPTS, found.tolist(), strict=False):
        ids = torch.tensor([0, *running.tokenizer(text)["input_ids"]])  # it has no start: the end of text stands for it
        with torch.no_grad():
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        assert abs(loss + float(logs.gather(1, ids[1:, None]).sum()) / len(text.encode())) <= 1e-6
    assert float(found[-1]) == 0.0


def test_of_a_text_that_is_too_long_the_end_counts(experts):
    running = load(experts[1])
    long = " ".join(PROMPTS) * 6
    assert len(running.tokenizer(long)["input_ids"]) > 48
    ids = running.tokenizer(long)["input_ids"][-48:]
    with torch.no_grad():
        logs = running.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    nats = -float(logs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    size = len(long.encode()) * 47 / len(running.tokenizer(long)["input_ids"])
    assert abs(float(losses(running, [long])) - nats / size) <= 1e-5


def test_a_word_that_a_tokenizer_does_not_know_costs_as_much_as_its_bytes(tiny):
    running = load(tiny("words", spread=1e-6))
    known, unknown = losses(running, ["w3 w4", "zz zz"]).tolist()
    assert abs(known - 2 * math.log(40) / 5) <= 1e-4  # two guesses among 40 words, over five bytes
    assert abs(unknown - known - math.log(256)) <= 1e-4


# features

def test_features_are_the_shares_of_words_pairs_and_triples_of_bytes():
    import zlib

    text = "b a ë b"
    counts = [0] * H
    words = [b"b", b"a", "ë".encode(), b"b"]
    for part in [*words, b" b", b"b a", "a ë".encode(), "ë b".encode(), b"b "]:
        counts[zlib.crc32(part) >> 21] += 1
    data = b" " + text.encode() + b" "
    for k in range(len(data) - 2):
        counts[int.from_bytes(data[k:k + 3], "big") * 2654435761 % 2 ** 32 >> 21] += 1
    found = text_features([text])[0].double()
    assert max(abs(float(value) - math.sqrt(count / sum(counts))) for value, count in zip(found, counts,
                                                                                        strict=True)) <= 1e-7
    assert sum(counts) == 9 + len(text.encode())


def test_features_have_length_one_whatever_the_text():
    found = text_features(["x", " ", "w " * 5000, "\ud800", ""]).double().norm(dim=1)
    assert (found[:4] - 1).abs().max() <= 1e-6 and float(found[4]) == 0
    assert text_features([]).shape == (0, H)


def test_features_of_another_definition_are_refused():
    with pytest.raises(ValueError, match="are asked for, known are"):
        text_features(["a"], {"version": 0, "width": H})


def test_a_text_chooses_the_same_in_any_company(mixed):
    running = load(mixed)
    assert running.choose(TEXTS) == [running.choose([text])[0] for text in TEXTS]
    assert running.choose(TEXTS[::-1]) == running.choose(TEXTS)[::-1]


def test_experts_keep_the_type_of_their_numbers(experts, tmp_path):
    half = tmp_path / "half"
    model = AutoModelForCausalLM.from_pretrained(experts[0].path, dtype=torch.bfloat16)
    model.save_pretrained(half)
    AutoTokenizer.from_pretrained(experts[0].path).save_pretrained(half)
    member = built(tmp_path / "m", (Member("half", "model", str(half)), experts[1]), always(0, 2))
    kinds = [{header.dtype for header in Checkpoint(member.folder / "experts" / name).headers.values()}
             for name in ("half", "gpt2")]
    assert kinds == [{torch.bfloat16}, {torch.float32}]
    running = load(member, dtype="auto")
    assert [expert.model.dtype for expert in running.experts] == [torch.bfloat16, torch.float32]
