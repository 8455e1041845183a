"""Proxies: a large member's logits and what tuning changed in a small one, added exactly, cached, and refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from glue.errors import CheckpointError, GlueError, MethodError, RecipeError, ZooError
from glue.evaluate.fast import ask, losses
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Item, Suite, Task, task_items, write_tasks
from glue.family import families
from glue.identity import identify
from glue.kinds import Place, Running, load, weights
from glue.kinds.endpoint import connect
from glue.kinds.local_source import Local
from glue.kinds.modelling.proxied import GlueProxiedForCausalLM, GlueProxyConfig, ProxyCache
from glue.kinds.proxy import Pair, members
from glue.kinds.size import Size, size
from glue.member import Member
from glue.mix.levels import model as model_level
from glue.mix.levels import text as text_level
from glue.mix.parts import Dev, Parts
from glue.mix.site import gates
from glue.proxy.pair import write
from glue.steps.proxy import compared
from tests.conftest import WORDS
from tests.fake_server import FakeServer, listening

IDS = torch.tensor([[1, 5, 9, 7, 3], [1, 8, 3, 4, 30]])
SHORT, LONG = [1, 12, 6], [1, 5, 9, 7, 30, 22, 4]


def an_adapter(small: Member, folder: Path, *, zero: bool = False, **more: Any) -> Member:
    """A LoRA over the small model; where it is zero, B is, and it changes nothing."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = get_peft_model(load(small).model, LoraConfig(**{
            "r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "up_proj"], "init_lora_weights": zero, **more}))
    adapted.save_pretrained(folder)
    return Member(folder.name, "adapter", str(folder), base=small)


def a_proxy(out: Path, large: Member, tuned: Member, small: Member, alpha: float = 1.0) -> Member:
    write(out, large=large, tuned=tuned, small=small, alpha=alpha)
    return Member(out.name, "proxy", str(out), base=large)


@pytest.fixture
def parts(tiny, tmp_path) -> tuple[Member, Member, Member]:
    """Large, tuned (an adapter) and small."""
    small = tiny("small", seed=2)
    return tiny("large", seed=1, hidden_size=48, num_hidden_layers=3), an_adapter(small, tmp_path / "tuned"), small


@pytest.fixture(params=["adapter", "model"])
def running(request, parts, tiny, tmp_path) -> Running:
    """A proxy whose tuned member is an adapter, or a whole model."""
    large, tuned, small = parts
    if request.param == "model":
        tuned = tiny("whole", seed=5)
    return load(a_proxy(tmp_path / "proxy", large, tuned, small, 0.7))


@torch.no_grad()
def says(member: Member | Running, ids: Tensor = IDS, **how: Any) -> Tensor:
    running = load(member) if isinstance(member, Member) else member
    return running.model(ids, **how).logits


def written(running: Running, rows: list[list[int]], **how: Any) -> list[list[int]]:
    """What is written after prompts that are padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = running.model.generate(input_ids=ids, attention_mask=mask, min_new_tokens=8, max_new_tokens=8,
                                      pad_token_id=2, **how)
    return made[:, width:].tolist()


# --- the arithmetic -------------------------------------------------------------------------------------------------

def test_the_logits_are_those_of_the_large_member_and_what_tuning_has_changed(parts, tmp_path):
    large, tuned, small = parts
    for alpha in (0.5, 1.0, 1.5):
        mixed = says(a_proxy(tmp_path / f"p{alpha}", large, tuned, small, alpha))
        by_hand = says(large).double() + alpha * (says(tuned).double() - says(small).double())
        assert float((mixed - by_hand).abs().max()) < 1e-4
    assert float((mixed - says(large)).abs().max()) > 1


def test_with_alpha_0_it_is_the_large_member_to_the_bit(parts, tmp_path):
    large, tuned, small = parts
    running, alone = load(a_proxy(tmp_path / "p", large, tuned, small, 0.0)), load(large)
    assert torch.equal(says(running), says(alone))
    assert written(running, [SHORT, LONG]) == written(alone, [SHORT, LONG])
    assert written(running, [SHORT], num_beams=3) == written(alone, [SHORT], num_beams=3)
    running.model.small.forward = None  # and nobody else is asked
    first = running.model(IDS, use_cache=True, logits_to_keep=1)
    assert torch.equal(first.logits, alone.model(IDS, logits_to_keep=1).logits)
    assert type(first.past_key_values) is type(alone.model(IDS, use_cache=True).past_key_values)


def test_an_expert_that_learnt_nothing_leaves_the_large_member_as_it_is(parts, tmp_path):
    large, _, small = parts
    proxy = a_proxy(tmp_path / "p", large, an_adapter(small, tmp_path / "zero", zero=True), small, 1.3)
    assert torch.equal(says(proxy), says(large))


def test_where_the_large_member_is_the_untuned_one_it_is_the_expert(parts, tmp_path):
    _, tuned, small = parts
    proxy = a_proxy(tmp_path / "p", small, tuned, small, 1.0)
    assert float((says(proxy).softmax(-1) - says(tuned).softmax(-1)).abs().max()) < 1e-6


class Table(nn.Module):
    """A bigram model in fp64: the logits of the next token are a row of a table. It has no weights to ask for."""

    def __init__(self, seed: int, v: int = 11):
        super().__init__()
        self.table = torch.randn(v, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.generation_config, self.device, self.dtype = GenerationConfig(), torch.device("cpu"), torch.float64
        self.seen: list[int] = []

    def parameters(self, recurse: bool = True):
        raise AssertionError("a member that is only asked has no weights to look at")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutputWithPast:
        self.seen.append(input_ids.shape[1])
        return CausalLMOutputWithPast(logits=self.table[input_ids])


def of_tables(alpha: float, *tables: nn.Module) -> GlueProxiedForCausalLM:
    large, small, tuned = tables
    return GlueProxiedForCausalLM(GlueProxyConfig(vocab_size=10, max_position_embeddings=64), large, small, tuned,
                                  alpha=alpha).eval()


def test_bigram_tables_mix_in_closed_form_and_constants_change_nothing():
    large, small, tuned = Table(1), Table(2), Table(3)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    found = of_tables(0.6, large, small, tuned)(ids).logits.softmax(-1)[0]
    p, a, e = (table.table[ids[0], :10].softmax(-1) for table in (large, small, tuned))
    by_hand = p * (e / a)**0.6
    assert float((found - by_hand / by_hand.sum(-1, keepdim=True)).abs().max()) < 1e-14
    for k, table in enumerate((large, small, tuned)):  # any constant, and log-probabilities in place of logits
        table.table = table.table.log_softmax(-1) if k == 1 else table.table + 3.0 * k + 5.0
    again = of_tables(0.6, large, small, tuned)(ids).logits.softmax(-1)[0]
    assert float((found - again).abs().max()) < 1e-14


def test_rows_of_heads_that_are_no_tokens_are_cut_off_and_rows_that_lack_are_refused(tiny, tmp_path, parts):
    _, tuned, small = parts
    large = tiny("padded", seed=1, vocab_size=48)
    mixed = says(a_proxy(tmp_path / "p", large, tuned, small))
    assert mixed.shape[-1] == len(WORDS)
    assert float((mixed - (says(large)[..., :len(WORDS)] + says(tuned) - says(small))).abs().max()) < 1e-4
    short = a_proxy(tmp_path / "q", tiny("short", seed=1, vocab_size=32), tuned, small)
    with pytest.raises(CheckpointError, match="'short' has logits for 32 tokens, and its tokenizer knows 40"):
        load(short)


# --- caches, batches, decoding --------------------------------------------------------------------------------------

def test_what_is_read_with_a_cache_is_what_is_read_without(running):
    whole = says(running)
    with torch.no_grad():
        first = running.model(IDS[:, :2], use_cache=True)
        cache = first.past_key_values
        found = [first.logits]
        for k in range(2, 5):
            found.append(running.model(IDS[:, k:k + 1], past_key_values=cache).logits)
            assert cache.get_seq_length() == k + 1 and cache.get_mask_sizes(2) == (k + 3, 0)
    assert float((torch.cat(found, 1) - whole).abs().max()) < 1e-4
    assert float((says(running, logits_to_keep=2) - whole[:, -2:]).abs().max()) < 1e-4
    assert float((says(running, logits_to_keep=torch.tensor([1, 3])) - whole[:, [1, 3]]).abs().max()) < 1e-4


@torch.no_grad()
def test_caches_are_cropped_reordered_and_repeated_with_all_their_parts(running):
    model, new = running.model, torch.tensor([[11], [12]])

    def after(change) -> Tensor:
        cache = model(IDS, use_cache=True).past_key_values
        change(cache)
        more = new if cache.batch_size == 2 else new.repeat_interleave(2, 0)
        return model(more, past_key_values=cache).logits[:, -1]

    def fresh(ids: Tensor, more: Tensor = new) -> Tensor:
        return model(torch.cat([ids, more], 1)).logits[:, -1]

    for found, wanted in (
            (after(lambda cache: cache.crop(-2)), fresh(IDS[:, :3])), (after(lambda cache: cache.crop(0)), fresh(IDS)),
            (after(lambda cache: cache.reorder_cache(torch.tensor([1, 1]))), fresh(IDS[[1, 1]])),
            (after(lambda cache: cache.reset()), fresh(IDS[:, :0])),
            (after(lambda cache: cache.batch_repeat_interleave(2)),
             fresh(IDS.repeat_interleave(2, 0), new.repeat_interleave(2, 0)))):
        assert float((found - wanted).abs().max()) < 1e-4
    assert model(IDS, use_cache=True).past_key_values.is_croppable


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 7}, {"num_return_sequences": 2,
                                                                                        "do_sample": True}])
def test_decoding_with_a_cache_writes_what_it_writes_without(running, how):
    assert written(running, [SHORT, LONG], **how) == written(running, [SHORT, LONG], use_cache=False, **how)


def test_a_batch_padded_on_the_left_writes_what_its_rows_write_alone(running):
    alone = [written(running, [row])[0] for row in (SHORT, LONG)]
    assert written(running, [SHORT, LONG]) == alone
    beams = [written(running, [row], num_beams=4)[0] for row in (SHORT, LONG)]
    assert written(running, [SHORT, LONG], num_beams=4) == beams


def test_greedy_writing_takes_the_likeliest_token_of_the_mixed_logits(running):
    text = list(LONG)
    for _ in range(8):
        row = says(running, torch.tensor([text]))[0, -1]
        row[2] = -torch.inf  # the end of text, which may not come before eight tokens
        text.append(int(row.argmax()))
    assert written(running, [LONG], eos_token_id=2)[0] == text[len(LONG):]


def test_a_part_without_a_cache_and_without_weights_is_read_again_and_says_the_same():
    large, small, tuned = Table(1), Table(2), Table(3)
    model = of_tables(0.5, large, small, tuned)
    ids = torch.tensor([[3, 1, 4, 1], [1, 5, 9, 2]])
    whole = model(ids).logits
    first = model(ids[:, :2], use_cache=True)
    second = model(ids[:, 2:], past_key_values=first.past_key_values, logits_to_keep=1)
    assert isinstance(first.past_key_values, ProxyCache) and large.seen == [4, 2, 4]
    assert torch.equal(torch.cat([first.logits, second.logits], 1), whole[:, [0, 1, 3]])


# --- one set of weights ---------------------------------------------------------------------------------------------

def test_expert_and_anti_expert_are_one_set_of_weights_where_the_expert_is_an_adapter(parts, tiny, tmp_path):
    large, tuned, small = parts
    numbers = {member.name: sum(header.numel for header in weights(member).headers.values())
               for member in (large, small)}
    lora = 2 * 2 * ((32 + 16) + (32 + 48))  # two layers at rank 2: v_proj and up_proj
    shared = a_proxy(tmp_path / "p", large, tuned, small)
    model = load(shared).model
    assert model.tuned is None and sum(p.numel() for p in model.parameters()) == sum(numbers.values()) + lora
    apart = a_proxy(tmp_path / "q", large, tiny("whole", seed=5), small)
    whole = numbers["large"] + 2 * numbers["small"]
    assert sum(p.numel() for p in load(apart).model.parameters()) == whole
    assert size(shared) == Size(sum(numbers.values()), sum(numbers.values())) and size(apart) == Size(whole, whole)


def test_an_adapter_that_replaces_biases_cannot_be_switched_off_and_is_loaded_apart(parts, tiny, tmp_path):
    large = parts[0]
    small = tiny("biased", seed=6, attention_bias=True)
    running = load(small)
    tuned = an_adapter(small, tmp_path / "with-bias", bias="all")
    file = tmp_path / "with-bias" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file
    save_file({name: tensor + 0.5 if name.endswith("bias") else tensor for name, tensor in load_file(file).items()},
              file)
    proxy = load(a_proxy(tmp_path / "p", large, tuned, small))
    assert proxy.model.tuned is not None
    by_hand = says(large) + says(tuned) - says(running)
    assert float((says(proxy) - by_hand).abs().max()) < 1e-4 < float((says(tuned) - says(running)).abs().max())


def test_threads_that_ask_at_once_do_not_switch_each_other_s_adapter(parts, tmp_path):
    running = load(a_proxy(tmp_path / "p", *parts))
    wanted = says(running)
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: says(running), range(60)))
    assert max(float((one - wanted).abs().max()) for one in found) < 1e-4


# --- the folder -----------------------------------------------------------------------------------------------------

def test_the_pair_is_copied_and_counts_for_the_digest(parts, tmp_path):
    large, tuned, small = parts
    proxy = a_proxy(tmp_path / "p", large, tuned, small)
    before, (_, digest) = says(proxy), identify(proxy.folder)
    shutil.rmtree(small.folder)
    shutil.rmtree(tuned.folder)
    assert torch.equal(says(proxy), before)
    assert [part.kind for part in members(proxy)] == ["model", "model", "adapter"]
    assert not [file for file in proxy.folder.rglob("*") if file.is_symlink()]
    (proxy.folder / "config.json").write_text(json.dumps({**Pair.read(proxy.folder, "p").as_dict(), "alpha": 0.9}))
    assert identify(proxy.folder)[1] != digest
    (proxy.folder / "config.json").write_text(json.dumps(Pair.read(proxy.folder, "p").as_dict() | {"alpha": 1.0}))
    assert identify(proxy.folder)[1] == digest
    file = proxy.folder / "pair/tuned/adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert identify(proxy.folder)[1] != digest


def test_it_has_the_frame_of_the_large_member_and_sees_what_all_bothsee(tiny, tmp_path):
    small = tiny("small", seed=2, max_position_embeddings=32)
    large = tiny("large", seed=1, hidden_size=48)
    GenerationConfig(max_new_tokens=3, eos_token_id=7, do_sample=False).save_pretrained(large.folder)
    running = load(a_proxy(tmp_path / "p", large, an_adapter(small, tmp_path / "tuned"), small))
    assert running.model.generation_config.max_new_tokens == 3
    assert running.model.generation_config.eos_token_id == 7
    assert running.model.config.max_position_embeddings == 32 and running.model.config.hidden_size == 48
    assert running.tokenizer.padding_side == "left" and running.member.name == "p"


@pytest.mark.parametrize(("changed", "match"), [
    ({"small": "../../small"}, "config.json has small: '../../small'"),
    ({"tuned": "/etc"}, "config.json has tuned: '/etc'"), ({"model_type": "llama"}, "where a proxy has glue_proxy"),
    ({"alpha": "1"}, "has alpha: '1'"), ({"alpha": True}, "has alpha: True"), ({"alpha": float("nan")}, "alpha: nan"),
    ({"alpha": float("inf")}, "alpha: inf"), ({"alpha": -1}, "alpha: -1"), ({"alpha": None}, "alpha: None"),
    ({"vocabulary": 5}, "does not tell the vocabulary"), ({"vocabulary": "0" * 64}, "made for a vocabulary with the")])
def test_a_config_that_was_tampered_with_is_refused(parts, tmp_path, changed, match):
    proxy = a_proxy(tmp_path / "p", *parts)
    file = proxy.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(CheckpointError, match=match):
        load(proxy)


def test_a_folder_that_is_not_whole_is_refused(parts, tmp_path):
    proxy = a_proxy(tmp_path / "p", *parts)
    with pytest.raises(ZooError, match="nothing says what it sits on"):
        load(Member("p", "proxy", proxy.path))
    shutil.rmtree(proxy.folder / "pair/small")
    with pytest.raises(GlueError, match="pair/small does not exist"):
        load(proxy)
    (proxy.folder / "config.json").write_text("[")
    with pytest.raises(ZooError, match="is not JSON"):
        load(proxy)


# --- what does not fit ----------------------------------------------------------------------------------------------

def test_other_vocabularies_are_refused_whatever_their_size(tiny, parts, tmp_path):
    large, tuned, small = parts
    others = {word: 41 - k if k > 2 else k for word, k in WORDS.items()}  # as many tokens, and they mean others
    odd = tiny("odd", seed=4, words=others)
    for wrong in ({"large": odd, "tuned": tuned, "small": small}, {"large": large, "tuned": odd, "small": small}):
        with pytest.raises(MethodError, match="their numbers mean other tokens"):
            write(tmp_path / "p", alpha=1.0, **wrong)
    assert not (tmp_path / "p").exists()


def test_pairs_that_are_none_are_refused(tiny, parts, tmp_path):
    large, tuned, small = parts
    with pytest.raises(MethodError, match="'tuned' sits on 'small', and 'other' is named"):
        write(tmp_path / "p", large=large, tuned=tuned, small=tiny("other", seed=9), alpha=1.0)
    with pytest.raises(MethodError, match="they would cancel out"):
        write(tmp_path / "p", large=large, tuned=small, small=small, alpha=1.0)
    both = Parts((large, small), None, large)
    (tmp_path / "text").mkdir()
    site, = text_level.sites(both, Dev(["w5"], torch.eye(2)[:1], torch.tensor([0])))
    text_level.write(tmp_path / "text", both, gates(families("routing").choose("random"), [site]))
    mixture = Member("by-text", "mixture", str(tmp_path / "text"))
    with pytest.raises(MethodError, match="'by-text' is a mixture by text"):
        write(tmp_path / "p", large=mixture, tuned=tuned, small=small, alpha=1.0)


def test_words_of_the_step_that_do_not_go_together_are_refused():
    step = families("steps")["proxy"]
    for params, match in (({"alpha": [0, 1]}, "compared on dev items"), ({"suite": "s:dev"}, "nothing to choose")):
        choice = step.bind({"large": "l", "tuned": "t", **params})
        with pytest.raises(RecipeError, match=match):
            step.traits["words"](**choice.params)
    for wrong in ({"alpha": -1}, {"alpha": []}, {"alpha": "much"}):
        with pytest.raises(GlueError, match="alpha"):
            step.bind({"large": "l", "tuned": "t", **wrong})


# --- large members of other kinds, and who asks ---------------------------------------------------------------------

def test_a_mixture_is_steered_and_keeps_its_routes(tiny, parts, tmp_path):
    _, tuned, small = parts
    experts = tiny("one", seed=11), tiny("two", seed=12, hidden_size=48)
    sites = model_level.sites(Parts(experts, None, experts[0]), Dev(["w5", "w30"], torch.eye(2), torch.tensor([0, 1])))
    model_level.write(tmp_path / "mix", Parts(experts, None, experts[0]), gates(families("routing").choose("linear"),
                                                                             sites))
    mixture = Member("mix", "mixture", str(tmp_path / "mix"))
    running = load(a_proxy(tmp_path / "p", mixture, tuned, small))
    texts = [[1, k] for k in range(3, 40)]
    routes = running.route(texts)
    assert set(routes) == {0, 1}
    for text, route in zip(texts, routes, strict=True):
        by_hand = says(experts[route], torch.tensor([text])) + says(tuned, torch.tensor([text])) \
            - says(small, torch.tensor([text]))
        assert float((says(running, torch.tensor([text])) - by_hand).abs().max()) < 1e-4
        with running.pinned(1 - route):
            assert float((says(running, torch.tensor([text])) - by_hand).abs().max()) > 1e-2
    rows = [texts[routes.index(0)], texts[routes.index(1)]]
    assert written(running, rows) == written(running, rows, use_cache=False)


def some_items(count: int = 10) -> list[Item]:
    rng = np.random.default_rng(0)
    found = []
    for k in range(count):
        question = " ".join(f"w{n}" for n in rng.integers(3, 40, 3 + k % 3))
        choices = [f"w{n}" + " w9" * (n % 2) for n in rng.choice(np.arange(3, 40), 3, replace=False)]
        found.append(Item(question, tuple(choices), int(rng.integers(3)), ""))
    return [item._replace(answer=item.choices[item.gold]) for item in found]


def a_suite(folder: Path) -> tuple[Suite, dict[str, Path]]:
    """Two tasks over one dataset folder with a dev split."""
    folder.mkdir()
    (folder / "dev.jsonl").write_text("".join(json.dumps({
        "question": item.question, "choices": item.choices, "gold": item.gold, "answer": item.answer}) + "\n"
        for item in some_items()))
    tasks = (Task("pick", "words", "choice", "acc", 1 / 3), Task("write", "words", "generate", "exact_match", 0.0, 3))
    return Suite("words", tasks), {"words": folder}


def test_lm_eval_and_the_fast_scorer_hear_the_same_of_it(running, tmp_path):
    suite, folders = a_suite(tmp_path / "data")
    names = write_tasks(suite, "dev", folders, tmp_path / "tasks")
    items = {task.name: task_items(task, folders["words"], "dev") for task in suite.tasks}
    heard, fast = evaluate(running, tmp_path / "tasks", names), ask(running, suite.tasks, items)
    for name, task in zip(names, suite.tasks, strict=True):
        assert heard[name] == fast[task.name].tolist()
    assert 0 < np.mean(fast["pick"]) < 1


def test_alphas_are_judged_as_the_scorer_would_judge_each_and_the_least_loss_is_taken(parts, tmp_path):
    from glue.steps import Measured

    suite, folders = a_suite(tmp_path / "data")
    proxy = a_proxy(tmp_path / "p", *parts)
    measured = Measured(suite, "dev", {"words": Member("words", "dataset", str(folders["words"]))})
    alphas = [1.5, 0.0, 0.25, 1.0]
    told = compared(proxy, measured, alphas, Place())
    running = load(proxy)
    found = []
    for alpha, line in zip(alphas, told["tried"], strict=True):
        running.model.alpha = alpha
        bits = losses(running, suite.tasks, measured.items())
        for task, values in bits.items():
            assert line["tasks"][task]["loss"] == pytest.approx(values.mean() * np.log(2), abs=1e-5)
        found.append(np.mean([values.mean() for values in bits.values()]))
        moved = []
        for item in measured.items()["pick"]:
            length = len(running.tokenizer(item.question)["input_ids"])
            ids = torch.tensor([running.tokenizer(f"{item.question} {item.answer}")["input_ids"]])
            now, before = (says(one, ids)[0, length - 1:-1].double().log_softmax(-1) for one in (running, parts[0]))
            moved.append(float((now.exp() * (now - before)).sum(-1).mean()))
        assert line["tasks"]["pick"]["moved"] == pytest.approx(np.mean(moved), abs=1e-5)
    assert told["alpha"] == alphas[int(np.argmin(found))] and told["tried"][1]["moved"] == 0.0
    assert told["tried"][0]["moved"] > told["tried"][3]["moved"] > told["tried"][2]["moved"] > 0


def test_a_large_member_that_is_asked_over_http_is_steered_without_any_of_its_weights(parts, tmp_path):
    large, tuned, small = parts
    here = load(a_proxy(tmp_path / "here", large, tuned, small))
    wanted, texts = says(here).log_softmax(-1), [written(here, [SHORT, LONG]), written(here, [LONG], num_beams=3)]
    server = FakeServer(Local(load(large)))
    with listening(server) as url:
        connect(tmp_path / "far", url, tokenizer=large)
        shutil.rmtree(large.folder)
        running = load(a_proxy(tmp_path / "p", Member("far", "endpoint", str(tmp_path / "far")), tuned, small))
        assert sum(p.numel() for p in running.model.large.parameters()) == 0
        assert float((says(running).log_softmax(-1) - wanted).abs().max()) < 1e-4
        assert [written(running, [SHORT, LONG]), written(running, [LONG], num_beams=3)] == texts
        assert written(running, [SHORT, LONG], use_cache=False) == texts[0]
