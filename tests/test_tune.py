"""Training: what it learns, what it writes, and what it says of wrong input."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from glue.checkpoint import Checkpoint
from glue.errors import GlueError
from glue.tune.bpe import train_tokenizer
from glue.tune.finetune import finetune
from glue.tune.items import Item, draw_batches, read_items
from glue.tune.loop import Course, pad, share_of_rate, train
from glue.tune.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 16}
LORA = {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj", "up_proj"]}
PAIRS = [("a b c =", "c b a"), ("who is it ?", "Ann"), ("one two =", "three"), ("x y =", "y x")]


def written(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"question": question, "answer": answer, "choices": [answer], "gold": 0}) + "\n"
             for question, answer in pairs]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("data") / "pairs", PAIRS)


def taught(out: Path, dataset: Path, **changed) -> list[float]:
    """Pretrain a one-layer model on four items; the loss of every step."""
    losses: list[float] = []
    given = {"data": [(dataset, 1.0)], "vocabulary": [dataset], "architecture": TINY, "steps": 60, "batch_size": 4,
             "learning_rate": 1e-2, "seed": 0, "report": lambda step, steps, loss: losses.append(loss)}
    pretrain(out, **{**given, **changed})
    return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory, dataset) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("models") / "base"
    taught(out, dataset)
    return out


def test_a_small_model_learns_a_few_items_by_heart(tmp_path, dataset):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = taught(tmp_path, dataset)
    assert len(losses) == 60 and losses[0] > 4 and losses[-1] < 0.3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for question, answer in PAIRS:
        asked = tokenizer(question, return_tensors="pt")
        told = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1]:]
        assert tokenizer.decode(told, skip_special_tokens=True) == f" {answer}"


def test_pretraining_writes_an_ordinary_folder_that_others_may_read(base):
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["hidden_size"] == 32
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert (base / "generation_config.json").is_file() and (base / "tokenizer.json").is_file()
    weights = Checkpoint(base)
    assert weights.headers["model.embed_tokens.weight"].shape == (config["vocab_size"], 32)
    assert (base / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_two_processes_write_the_same_bytes(tmp_path, dataset):
    """Also where the hashes of text differ: sets of words must not reach a file in their own order."""
    code = ("import sys, torch; torch.set_num_threads(1); from pathlib import Path\n"
            "from glue.tune.finetune import finetune; from glue.tune.pretrain import pretrain\n"
            f"out, data = Path(sys.argv[1]), [(Path({str(dataset)!r}), 1.0)]\n"
            "quiet = lambda step, steps, loss: None\n"
            f"pretrain(out / 'a', data=data, vocabulary=[data[0][0]], architecture={TINY}, steps=5, "
            "learning_rate=1e-2, seed=3, report=quiet)\n"
            f"finetune(out / 'b', base=Path({str(tmp_path / 'one' / 'a')!r}), data=data, steps=3, learning_rate=1e-3, "
            f"seed=4, lora={LORA}, report=quiet)")
    for folder, hashes in (("one", "1"), ("two", "2")):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / folder)], check=True, cwd=Path(__file__).parents[1],
                       env={"PYTHONHASHSEED": hashes, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1"}, capture_output=True)
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert {"a/model.safetensors", "a/tokenizer.json", "b/adapter_model.safetensors", "b/adapter_config.json"} <= \
        {str(file) for file in files}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_the_seed_of_the_caller_is_left_alone(tmp_path, dataset):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    taught(tmp_path, dataset, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_full_tuning_moves_every_matrix_and_keeps_the_tokenizer(tmp_path, base, dataset):
    finetune(tmp_path, base=base, data=[(dataset, 1.0)], steps=3, batch_size=4, learning_rate=1e-3,
             report=lambda step, steps, loss: None)
    before, after = Checkpoint(base), Checkpoint(tmp_path)
    assert set(before) == set(after)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_an_adapter_of_no_steps_changes_nothing_and_a_trained_one_does(tmp_path, base, dataset):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([[1, 5, 6, 7]])
    plain = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    moved = {}
    for steps in (0, 20):
        out = tmp_path / str(steps)
        finetune(out, base=base, data=[(dataset, 1.0)], steps=steps, batch_size=4, learning_rate=1e-2, lora=LORA,
                 report=lambda step, steps, loss: None)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 2, 4)
        assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]
        assert (out / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
        assert not (out / "model.safetensors").exists()
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        moved[steps] = (adapted(tokens).logits - plain).abs().max().item()
    assert moved[0] == 0 and moved[20] > 0.05


def test_the_loss_is_the_weighted_mean_that_torch_computes_item_by_item(base, dataset):
    """An fp64 oracle without padding or cutting."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    items = read_items(dataset, AutoTokenizer.from_pretrained(base), 16)
    model = AutoModelForCausalLM.from_pretrained(base)
    losses: list[float] = []
    train(model, iter([items]), steps=1, learning_rate=0.0, weight_decay=0.0, prompt_weight=0.25,
          report=lambda step, steps, loss: losses.append(loss))
    total = weight = 0.0
    exact = model.double().requires_grad_(False)
    for item in items:
        tokens = torch.tensor([item.tokens])
        logs = exact(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        weights = torch.tensor([0.25 if k < item.question else 1.0 for k in range(1, len(item.tokens))])
        total -= float((weights * logs).sum())
        weight += float(weights.sum())
    assert losses[0] == pytest.approx(total / weight, rel=1e-5)


def test_padding_counts_for_nothing_and_questions_for_little():
    tokens, weights = pad([Item([1, 5, 6, 2], 2), Item([1, 7, 2], 2)], 0.1)
    assert tokens.tolist() == [[1, 5, 6, 2], [1, 7, 2, 2]]
    assert weights.tolist() == [[pytest.approx(0.1), 1, 1], [pytest.approx(0.1), 1, 0]]


def test_the_learning_rate_warms_up_and_comes_down_to_a_twentieth():
    rates = [share_of_rate(step, 100) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) == 1
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == pytest.approx(0.05)
    assert share_of_rate(1, 1) == 1


def test_batches_follow_the_weights_and_use_every_item_before_any_again():
    few, many = [Item([k], 0) for k in range(10)], [Item([k], 0) for k in range(100, 200)]
    batches = islice(draw_batches([few, many], [1, 3], 40, random.Random(0)), 100)
    seen = [item.tokens[0] for batch in batches for item in batch]
    share = sum(number < 100 for number in seen) / len(seen)
    assert share == pytest.approx(0.25, abs=0.03)
    counts = Counter(number for number in seen if number < 100)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_question_ends_where_its_answer_begins(base, dataset):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    for item, (question, answer) in zip(read_items(dataset, tokenizer, 16), PAIRS, strict=True):
        assert item.tokens[0] == tokenizer.bos_token_id and item.tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(item.tokens[1:item.question]) == question
        assert tokenizer.decode(item.tokens[item.question:-1]) == f" {answer}"


def test_a_tokenizer_knows_its_words_and_spells_everything_else(tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(["red dog runs 12"] * 3, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("red dog runs") == ["red", "Ġdog", "Ġruns"]
    assert tokenizer.tokenize(" 12") == ["Ġ1", "2"], "digits stand alone"
    for text in ("red dog", "größer ∑ 7\n\tx", "runs  runs"):
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == 1 and tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens[1:]) == text


@pytest.mark.parametrize(("changed", "message"), [
    ({"architecture": {**TINY, "hidden_sise": 32}}, "no field 'hidden_sise'; did you mean 'hidden_size'"),
    ({"architecture": {**TINY, "vocab_size": 32}}, "sets 'vocab_size', which follows from the tokenizer"),
    ({"learning_rate": 1e30}, r"diverged at step 2 of 60: loss .*, gradient norm nan\s+lower learning_rate \(1e\+30\)"),
])
def test_pretraining_says_what_is_wrong(tmp_path, dataset, changed, message):
    with pytest.raises(GlueError, match=message):
        taught(tmp_path, dataset, **changed)


def test_an_empty_dataset_is_named(tmp_path, base):
    empty = written(tmp_path / "empty", [])
    with pytest.raises(GlueError, match="empty/train.jsonl holds no items to train on"):
        finetune(tmp_path / "out", base=base, data=[(empty, 1.0)], steps=1, learning_rate=1e-3, report=print)


def test_an_item_beyond_the_limit_is_named_with_its_line(tmp_path, base):
    long = written(tmp_path / "long", [("a =", "b"), ("a a a a a a a a =", "b b b b b b b b")])
    with pytest.raises(GlueError, match=r"long/train.jsonl:2 is 19 tokens long with its end token; the model takes 16"):
        finetune(tmp_path / "out", base=base, data=[(long, 1.0)], steps=1, learning_rate=1e-3, report=print)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_is_spread_learns_what_it_learns_in_one_place(tmp_path, base, dataset, lora, checkpointing,
                                                                   monkeypatch):
    """With the hooks by which accelerate brings what layers read to where they are."""
    from accelerate import dispatch_model

    def spread(model, word, times):
        assert (word, times) == ("cuda", 1 if lora else 4)
        parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
        return dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)

    given = {"base": base, "data": [(dataset, 1.0)], "steps": 5, "learning_rate": 1e-2, "batch_size": 4, "lora": lora,
             "report": lambda step, steps, loss: None, "course": Course(checkpointing=checkpointing)}
    finetune(tmp_path / "one", **given)
    monkeypatch.setattr("glue.tune.finetune.settled", spread)
    finetune(tmp_path / "spread", **given, device="cuda")
    one, other = (Checkpoint(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "spread"))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_an_unknown_layer_of_an_adapter_is_named(tmp_path, base, dataset):
    with pytest.raises(GlueError, match="no layer 'q_prj' to adapt; did you mean 'q_proj'"):
        finetune(tmp_path, base=base, data=[(dataset, 1.0)], steps=1, learning_rate=1e-3,
                 lora={**LORA, "targets": ["q_prj"]}, report=print)
