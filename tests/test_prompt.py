"""Kind "prompt": a model behind a few vectors runs like any model, and peft reads the folder and says the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from glue.errors import CheckpointError, ZooError
from glue.evaluate import fast
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Suite, Task, task_items, write_tasks
from glue.identity import identify
from glue.kinds import load, weights
from glue.kinds.prompt import read_prompt, write_prompt
from glue.kinds.size import Size, size
from glue.kinds.text import longest, losses
from glue.member import Member

TEXTS = [[1, 5, 9, 7, 3, 8], [1, 30, 21], [1, 17, 4, 4, 25, 6, 11, 12]]


def prompt_over(base: Member, folder: Path, tokens: int = 3, seed: int = 0) -> Member:
    """A prompt of random vectors over a base."""
    folder.mkdir()
    write_prompt(folder, torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed)))
    return Member(folder.name, "prompt", str(folder), base=base, digest=identify(folder)[1])


@pytest.fixture(params=["llama", "gpt2"])
def prompted(request, tiny, tmp_path) -> Member:
    """A prompt over a model whose positions are angles, or learned."""
    base = tiny("base", seed=3)
    if request.param == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(3)
        config = GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
                            bos_token_id=1, eos_token_id=2)
        GPT2LMHeadModel(config).save_pretrained(base.folder)
    return prompt_over(base, tmp_path / "prompt")


def by_hand(member: Member, text: list[int]) -> torch.Tensor:
    """Logits [s, v] of the base's model for the vectors and a text, of which those of the text are kept."""
    assert member.base is not None
    model = load(member.base).model
    vectors = torch.cat([read_prompt(member.folder), model.get_input_embeddings()(torch.tensor(text))])
    return model(inputs_embeds=vectors[None]).logits[0, -len(text):]


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The texts as one batch, with its mask."""
    ids, mask = torch.zeros(2, len(TEXTS), 8, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        place = slice(8 - len(text), 8) if left else slice(len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return ids, mask


@torch.no_grad()
def test_logits_are_those_of_the_base_behind_the_vectors_alone_and_in_batches(prompted):
    model = load(prompted).model
    for left in (True, False):
        ids, mask = padded(left)
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, text in enumerate(TEXTS):
            alone = model(torch.tensor([text])).logits[0]
            assert alone.shape == (len(text), 40)
            assert torch.allclose(alone, by_hand(prompted, text), atol=1e-5)
            assert torch.allclose(together[row][mask[row].bool()], alone, atol=2e-5)
    assert not torch.allclose(alone, load(prompted.base).model(torch.tensor([text])).logits[0], atol=0.1)


@torch.no_grad()
def test_peft_reads_the_folder_and_gives_the_same_logits(prompted):
    from peft import PeftModel

    assert prompted.base is not None
    peer = PeftModel.from_pretrained(load(prompted.base).model, prompted.folder).eval()
    model = load(prompted).model
    for text in TEXTS:
        ids = torch.tensor([text])
        assert torch.allclose(model(ids).logits, peer(input_ids=ids).logits[:, 3:], atol=1e-5)
    labels = torch.tensor([TEXTS[0]])
    assert float(model(labels, labels=labels).loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(by_hand(prompted, TEXTS[0])[:-1], labels[0, 1:])), rel=1e-5)


@torch.no_grad()
def test_what_peft_has_trained_is_read(tiny, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    base = tiny("base", seed=3)
    peer = get_peft_model(load(base).model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    model = load(Member("theirs", "prompt", str(tmp_path / "theirs"), base=base)).model
    ids = torch.tensor(TEXTS[:1])
    assert torch.allclose(model(ids).logits, peer(input_ids=ids).logits[:, 4:], atol=1e-5)


@torch.no_grad()
def test_reading_on_from_a_cache_is_reading_it_all(prompted):
    model = load(prompted).model
    ids, mask = padded(left=True)
    whole = model(input_ids=ids, attention_mask=mask).logits
    for given in (None, DynamicCache()):  # its own, or one that somebody brings, empty
        read = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=given, use_cache=True)
        cache = read.past_key_values
        assert cache.get_seq_length() == 5
        after = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 8 and after.logits.shape[1] == 3
        got = torch.cat([read.logits, after.logits], 1)
        assert torch.allclose(got[mask.bool()], whole[mask.bool()], atol=2e-5)
        cache.crop(-2)
        assert cache.get_seq_length() == 6
        cache.batch_select_indices(torch.tensor([2, 0]))
        again = model(input_ids=ids[[2, 0], 6:], attention_mask=mask[[2, 0]], past_key_values=cache).logits
        assert torch.allclose(again, whole[[2, 0], 6:], atol=2e-5)
    if given is not None:  # and what was read into it goes on too, although it is no PromptCache
        again = model(input_ids=ids[[2, 0], 6:], past_key_values=cropped(given, 2), attention_mask=mask[[2, 0]]).logits
        assert torch.allclose(again, whole[[2, 0], 6:], atol=2e-5)


def cropped(cache: DynamicCache, tokens: int) -> DynamicCache:
    cache.crop(-tokens)
    return cache


@torch.no_grad()
def test_only_what_is_asked_for_is_kept(prompted):
    model = load(prompted).model
    ids = torch.tensor(TEXTS[2:])
    whole = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=20).logits, whole, atol=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([0, 4, -1])).logits, whole[:, [0, 4, -1]], atol=1e-6)
    embedded = model.get_input_embeddings()(ids)
    assert torch.allclose(model(inputs_embeds=embedded).logits, whole, atol=1e-6)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@torch.no_grad()
def test_what_is_written_is_the_likeliest_token_again_and_again(prompted):
    running = load(prompted)
    ids, mask = padded(left=True)
    how = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    together = running.model.generate(input_ids=ids, attention_mask=mask, **how)[:, 8:]
    uncached = running.model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **how)[:, 8:]
    assert torch.equal(together, uncached)
    for row, text in enumerate(TEXTS):
        written = list(text)
        for _ in range(6):
            written.append(int(by_hand(prompted, written)[-1].argmax()))
        assert together[row].tolist() == written[len(text):]
    beams = running.model.generate(input_ids=ids, attention_mask=mask, num_beams=3, **how)
    plain = running.model.generate(input_ids=ids, attention_mask=mask, num_beams=3, use_cache=False, **how)
    assert torch.equal(beams, plain)


def test_the_prompt_takes_its_room_from_the_text(prompted):
    running, below = load(prompted), load(prompted.base)
    assert longest(running.model, running.tokenizer) == longest(below.model, below.tokenizer) - 3 == 61
    assert below.model.config.max_position_embeddings == 64
    with torch.no_grad():
        assert running.model(torch.ones(1, 61, dtype=torch.long)).logits.shape == (1, 61, 40)


def test_a_prompt_counts_beside_its_base_and_has_no_weights_to_merge(prompted):
    below = size(prompted.base)
    assert size(prompted) == Size(below.whole + 96, below.active + 96)
    with pytest.raises(ZooError, match="'prompt' is a prompt; it has no weights that could be compared or merged"):
        weights(prompted)


def test_a_model_in_sixteen_bits_reads_its_prompt_in_sixteen_bits(prompted):
    running = load(prompted, dtype="bfloat16")
    assert {parameter.dtype for parameter in running.model.parameters()} == {torch.bfloat16}
    assert running.model(torch.tensor(TEXTS[:1])).logits.dtype == torch.bfloat16


@pytest.fixture
def suite(tmp_path) -> tuple[list[Task], Path]:
    """Choices of one and of several tokens, and texts to write, over the words of the tiny tokenizer."""
    (tmp_path / "items").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(25):
        words = [f"w{k}" for k in rng.integers(3, 40, 9)]
        lines.append({"question": " ".join(words[:5]), "answer": words[5], "gold": 0,
                      "choices": [words[5], " ".join(words[6:8]), words[8]]})
    (tmp_path / "items" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [Task("pick", "items", "choice", "acc", 0.3), Task("norm", "items", "choice", "acc_norm", 0.3),
            Task("write", "items", "generate", "exact_match", 0.0, max_tokens=3)], tmp_path / "items"


def test_lm_eval_finds_what_the_fast_scorer_finds(tiny, tmp_path, suite):
    tasks, folder = suite
    running = load(prompt_over(tiny("base", seed=5), tmp_path / "prompt"))
    found = fast.ask(running, tasks, {task.name: task_items(task, folder, "test") for task in tasks})
    names = write_tasks(Suite("own", tuple(tasks)), "test", {"items": folder}, tmp_path / "tasks")
    theirs = evaluate(running, tmp_path / "tasks", names)
    for task, name in zip(tasks, names, strict=True):
        assert found[task.name].tolist() == theirs[name]
    assert 0 < found["pick"].mean() < 1
    assert fast._Reader(running, 8)._continues  # each question is read once for all of its choices


@torch.no_grad()
def test_a_prompt_sits_on_an_adapter_too(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny("base", seed=4)
    get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
                   ).save_pretrained(tmp_path / "adapter")
    adapter = Member("adapter", "adapter", str(tmp_path / "adapter"), base=base)
    member = prompt_over(adapter, tmp_path / "prompt")
    got = load(member).model(torch.tensor(TEXTS[:1])).logits[0]
    assert torch.allclose(got, by_hand(member, TEXTS[0]), atol=1e-5)
    assert not torch.allclose(got, by_hand(replace(member, base=base), TEXTS[0]), atol=0.01)


def test_losses_of_texts_are_those_of_the_logits(prompted):
    running = load(prompted)
    told = losses(running, ["w5 w9 w7"])
    with torch.no_grad():
        logs = by_hand(prompted, [1, 5, 9, 7]).double().log_softmax(-1)
    assert float(told[0]) == pytest.approx(-float(sum(logs[k, t] for k, t in enumerate([5, 9, 7]))) / 8, rel=1e-4)


@pytest.mark.parametrize("change, why", [
    ({"peft_type": "LORA"}, "peft_type is LORA"), ({"task_type": "SEQ_CLS"}, "not for a causal language model"),
    ({"num_transformer_submodules": 2}, "not for a causal language model"),
    ({"num_virtual_tokens": 0}, "0 tokens of 32"), ({"num_virtual_tokens": 4}, r"\(4, 32\) was said"),
    ({"num_virtual_tokens": True}, "True tokens"), ({"run_this": "rm"}, "'run_this' is not known")])
def test_a_folder_whose_configuration_is_another_is_refused(tiny, tmp_path, change, why):
    member = prompt_over(tiny("base"), tmp_path / "prompt")
    file = member.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=f"no soft prompt that is understood .*{why}"):
        load(member)


@pytest.mark.parametrize("tensors, why", [
    ({"prompt_embeddings": torch.full((3, 32), float("nan"))}, "not finite"),
    ({"prompt_embeddings": torch.zeros(96)}, r"\(96,\)"),
    ({"prompt_embeddings": torch.zeros(3, 32, dtype=torch.int32)}, "int32"),
    ({"prompt_embeddings": torch.zeros(3, 32), "more": torch.zeros(1)}, "more, prompt_embeddings"), ({}, "none")])
def test_a_folder_with_other_tensors_is_refused(tiny, tmp_path, tensors, why):
    member = prompt_over(tiny("base"), tmp_path / "prompt")
    save_file(tensors, member.folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"no soft prompt that is understood .*{why}"):
        load(member)


def test_pickled_damaged_and_missing_files_are_refused(tiny, tmp_path):
    member = prompt_over(tiny("base"), tmp_path / "prompt")
    file = member.folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(CheckpointError, match="no soft prompt that is understood"):
        load(member)
    file.rename(member.folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are never read"):
        load(member)
    (member.folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="no soft prompt that is understood"):
        load(member)


def test_a_prompt_of_another_base_or_without_one_is_refused(tiny, tmp_path):
    member = prompt_over(tiny("base"), tmp_path / "prompt")
    with pytest.raises(CheckpointError, match="vectors have 32 numbers, and those of its base 24"):
        load(replace(member, base=tiny("narrow", hidden_size=24)))
    with pytest.raises(ZooError, match="is a prompt, and nothing says what it sits on"):
        load(replace(member, base=None))
    with pytest.raises(ZooError, match="'data' below it is a dataset, which reads no vectors"):
        load(replace(member, base=Member("data", "dataset", str(tmp_path))))
    with pytest.raises(CheckpointError, match="a prompt of 3 tokens leaves no room for a text in the 3"):
        load(replace(member, base=tiny("short", max_position_embeddings=3)))
